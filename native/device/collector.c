#include "device/collector.h"

#include <stdlib.h>

#include "base/error.h"

struct dg_collector {
    int32_t n;
    dg_squares *squares; /* (n) */
    double *sums;        /* of all of them */
    int64_t *counts;
};

/* The weight of `model` that is tensor `index` of the file; NULL where that is no weight (norms, scales, the router).
 */
static const dg_weight *weight_of(const dg_model *model, int64_t index) {
    const dg_mlp *sc = &model->self_conditioning;
    const dg_weight *common[] = {&model->token_embd, &sc->gate, &sc->up, &sc->down};
    for (size_t i = 0; i < sizeof common / sizeof *common; i++)
        if (common[i]->index == index) return common[i];
    for (int32_t il = 0; il < model->n_layers; il++) {
        const dg_layer *l = &model->layers[il];
        const dg_weight *weights[] = {&l->attn_q,      &l->attn_k, &l->attn_v,   &l->attn_output,
                                      &l->mlp.gate,    &l->mlp.up, &l->mlp.down, &l->moe.gate,
                                      &l->moe.gate_up, &l->moe.up, &l->moe.down};
        for (size_t i = 0; i < sizeof weights / sizeof *weights; i++)
            if (weights[i]->index == index && weights[i]->data != NULL) return weights[i];
    }
    return NULL;
}

dg_status dg_collector_create(const dg_model *model, dg_collector **out, dg_error *error) {
    const int64_t n_tensors = dg_file_n_tensors(model->file);
    dg_collector *c = calloc(1, sizeof *c);
    *out = NULL;
    if (c != NULL) c->squares = calloc((size_t)n_tensors, sizeof *c->squares);
    if (c == NULL || c->squares == NULL) goto no_memory;

    size_t n_sums = 0, n_counts = 0;
    for (int64_t i = 0; i < n_tensors; i++) {
        dg_tensor_info tensor;
        const dg_weight *w = weight_of(model, i);
        if (w == NULL) continue;
        dg_file_tensor(model->file, i, &tensor);
        c->squares[c->n++] = (dg_squares){.name = tensor.name, .weight = w};
        n_sums += (size_t)w->n_matrices * (size_t)w->n_cols;
        n_counts += (size_t)w->n_matrices;
    }
    c->sums = calloc(n_sums, sizeof *c->sums);
    c->counts = calloc(n_counts, sizeof *c->counts);
    if (c->sums == NULL || c->counts == NULL) goto no_memory;
    double *sums = c->sums;
    int64_t *counts = c->counts;
    for (int32_t i = 0; i < c->n; i++) {
        const dg_weight *w = c->squares[i].weight;
        c->squares[i].sums = sums;
        c->squares[i].counts = counts;
        sums += w->n_matrices * w->n_cols;
        counts += w->n_matrices;
    }
    *out = c;
    return DG_OK;

no_memory:
    dg_collector_free(c);
    return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory to collect the squares of activations");
}

void dg_collector_free(dg_collector *collector) {
    if (collector == NULL) return;
    free(collector->counts);
    free(collector->sums);
    free(collector->squares);
    free(collector);
}

const dg_squares *dg_collector_squares(const dg_collector *collector, int32_t *n) {
    *n = collector->n;
    return collector->squares;
}

dg_squares *dg_collector_of(dg_collector *collector, const dg_weight *weight) {
    if (collector == NULL) return NULL;
    for (int32_t i = 0; i < collector->n; i++)
        if (collector->squares[i].weight == weight) return &collector->squares[i];
    return NULL;
}

void dg_squares_add(dg_squares *squares, int64_t matrix, int64_t first_col, const float *x, int64_t n) {
    double *sums = squares->sums + matrix * squares->weight->n_cols + first_col;
    for (int64_t i = 0; i < n; i++) sums[i] += (double)x[i] * (double)x[i];
    if (first_col == 0) squares->counts[matrix]++;
}
