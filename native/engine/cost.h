/* What operations cost, counted from the model's sizes: two flop a multiply-add, bytes of weights and cache read. */
#ifndef DG_COST_H
#define DG_COST_H

#include "model/model.h"

typedef struct dg_cost {
    double flop, bytes;
} dg_cost;

/* Of n rows. */
dg_cost dg_cost_of_mlp(const dg_mlp *mlp, double n);
dg_cost dg_cost_of_moe(const dg_model *model, const dg_moe *moe, double n);
dg_cost dg_cost_of_keys_and_values(const dg_layer *layer, double n);
dg_cost dg_cost_of_queries(const dg_layer *layer, double n);
dg_cost dg_cost_of_output(const dg_layer *layer, double n);
/* Of n_queries rows that each see n_keys keys, of key_bytes with their values. */
dg_cost dg_cost_of_attention(const dg_model *model, const dg_layer *layer, double n_queries, double n_keys,
                             double key_bytes);
dg_cost dg_cost_of_head(const dg_model *model);

static inline dg_cost dg_cost_add(dg_cost a, dg_cost b) { return (dg_cost){a.flop + b.flop, a.bytes + b.bytes}; }

#endif
