/* The forward pass, written once for every device (docs/model.md). */
#ifndef DG_FORWARD_H
#define DG_FORWARD_H

#include <stdatomic.h>

#include "base/profile.h"
#include "engine/kv_cache.h"

typedef struct dg_forward {
    const dg_model *model;
    const dg_backend_ops *ops;
    dg_backend *backend;
    void *memory;              /* the one allocation behind the fields below */
    float *x;                  /* (max_rows, n_embd) the residual stream */
    float *q;                  /* (max_rows, n_heads, largest head_dim) */
    float *a;                  /* (max_rows, n_heads, largest head_dim) what attention returns */
    float *d;                  /* (max_rows, n_embd) dense MLP; in the place of q */
    float *e;                  /* (max_rows, n_embd) experts; likewise */
    float *soft;               /* (canvas_length, n_embd) soft embedding of the previous denoising step */
    const atomic_bool *cancel; /* looked at between layers */
    dg_profile *profile;
} dg_forward;

uint64_t dg_forward_bytes(const dg_model *model, int32_t max_rows);
dg_status dg_forward_create(const dg_model *model, dg_backend *backend, int32_t max_rows, const atomic_bool *cancel,
                            dg_profile *profile, dg_forward *forward, dg_error *error);
void dg_forward_free(dg_forward *forward);

/* Encodes `tokens` (n ≤ max_rows) behind the cache and appends them to it. */
dg_status dg_forward_encode(dg_forward *forward, dg_kv_cache *cache, const int32_t *tokens, int32_t n, dg_error *error);

/* Decodes the canvas `tokens` (canvas_length), or with NULL the canvas under way, into forward->x, conditioned on
 * forward->soft unless it is the first step. The head comes next: ops->logits or ops->denoise. */
dg_status dg_forward_decode(dg_forward *forward, const dg_kv_cache *cache, const int32_t *tokens, bool conditioned,
                            dg_error *error);

#endif
