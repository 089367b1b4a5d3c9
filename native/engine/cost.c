#include "engine/cost.h"

/* Of a product of `rows` rows with a weight, of which every matrix is read once. */
static dg_cost product(const dg_weight *w, double rows) {
    return (dg_cost){2.0 * rows * (double)w->n_rows * (double)w->n_cols, (double)w->matrix_bytes * w->n_matrices};
}

dg_cost dg_cost_of_mlp(const dg_mlp *m, double n) {
    return dg_cost_add(dg_cost_add(product(&m->gate, n), product(&m->up, n)), product(&m->down, n));
}

dg_cost dg_cost_of_moe(const dg_model *model, const dg_moe *m, double n) {
    const double rows = n * model->n_experts_used;
    const dg_cost router = {2.0 * n * model->n_experts * model->n_embd, 0};
    const dg_cost into =
        dg_cost_add(dg_cost_add(product(&m->gate_up, rows), product(&m->gate, rows)), /* one is empty */
                    product(&m->up, rows));
    return dg_cost_add(dg_cost_add(into, product(&m->down, rows)), router);
}

dg_cost dg_cost_of_keys_and_values(const dg_layer *layer, double n) {
    return dg_cost_add(product(&layer->attn_k, n), product(&layer->attn_v, n));
}

dg_cost dg_cost_of_queries(const dg_layer *layer, double n) { return product(&layer->attn_q, n); }

dg_cost dg_cost_of_output(const dg_layer *layer, double n) { return product(&layer->attn_output, n); }

dg_cost dg_cost_of_attention(const dg_model *model, const dg_layer *layer, double n_queries, double n_keys,
                             double key_bytes) {
    return (dg_cost){4.0 * n_queries * n_keys * model->n_heads * layer->head_dim,
                     n_keys * layer->n_kv_heads * key_bytes};
}

dg_cost dg_cost_of_head(const dg_model *model) {
    return (dg_cost){2.0 * model->canvas_length * (double)model->n_vocab * model->n_embd,
                     (double)model->token_embd.matrix_bytes};
}
