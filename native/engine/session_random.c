/* A context of any length without encoding one, for measuring. */
#include <stdlib.h>

#include "base/error.h"
#include "base/philox.h"
#include "engine/session.h"
#include "quant/quant.h"

enum { N_ROWS = 64 }; /* different ones; then they come again */

/* Random rows of `dim` elements, encoded as `type`, in memory to be freed; NULL where there is none. In size they are
 * what norms leave: a variance of 1. */
static void *random_rows(int32_t type, int32_t dim) {
    const dg_type_traits *traits = dg_type_traits_of(type);
    const int64_t n_blocks = (dim + traits->block_size - 1) / traits->block_size,
                  n_cols = n_blocks * traits->block_size;
    float *values = malloc((size_t)(N_ROWS * n_cols) * sizeof *values);
    void *rows = malloc((size_t)(N_ROWS * n_blocks * traits->block_bytes));
    dg_status status = DG_ERROR_OUT_OF_MEMORY;
    if (values != NULL && rows != NULL) {
        for (int64_t i = 0; i < N_ROWS * n_cols; i++)
            values[i] = 3.4641f * (dg_random_uniform(dg_random(0, 0, 0, (uint32_t)i, DG_STREAM_INITIAL)) - 0.5f);
        status = dg_quantize(DG_TYPE_F32, values, type, rows, N_ROWS, n_cols, NULL, NULL, 1, NULL);
    }
    free(values);
    if (status == DG_OK) return rows;
    free(rows);
    return NULL;
}

/* Puts them at positions `first` … `end` − 1 of every head; in a ring, the last ones remain. */
static dg_status fill(dg_kv_cache *cache, const dg_kv *kv, void *memory, int32_t n_heads, uint64_t row_bytes,
                      int32_t type, int32_t dim, int32_t first, int32_t end, dg_error *error) {
    if (row_bytes == 0) return DG_OK;
    void *rows = random_rows(type, dim);
    if (rows == NULL) return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory for random keys and values");
    if (end - first > kv->capacity) first = (int32_t)(end - kv->capacity);
    for (int32_t head = 0; head < n_heads; head++)
        for (int32_t position = first; position < end;) {
            int64_t slot = position % kv->capacity, n = end - position;
            if (n > N_ROWS) n = N_ROWS;
            if (n > kv->capacity - slot) n = kv->capacity - slot;
            cache->ops->upload(cache->backend, (char *)memory + (uint64_t)(head * kv->capacity + slot) * row_bytes,
                               rows, (uint64_t)n * row_bytes);
            position += (int32_t)n;
        }
    free(rows);
    return DG_OK;
}

dg_status dg_session_append_random(dg_session *session, int32_t n, dg_error *error) {
    const dg_model *model = session->model;
    dg_kv_cache *cache = &session->cache;
    const int32_t first = cache->n_past, room = session->params.n_ctx - model->canvas_length - first;
    if (n < 0) return dg_fail(error, DG_ERROR_ARGUMENT, "%d random tokens; expected 0 or more", n);
    if (n > room)
        return dg_fail(error, DG_ERROR_CONTEXT_LENGTH,
                       "%d random tokens behind the %d in the cache leave no room for a canvas of %d in a context of "
                       "%d: raise n_ctx",
                       n, first, model->canvas_length, session->params.n_ctx);
    int32_t *tokens = malloc((size_t)(n + 1) * sizeof *tokens);
    if (tokens == NULL) return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory for %d random tokens", n);
    for (int32_t i = 0; i < n; i++)
        tokens[i] = dg_random_token(dg_random(0, 1, 0, (uint32_t)i, DG_STREAM_INITIAL), model->n_vocab);

    dg_status status = DG_OK;
    session->denoiser.active = false;
    dg_kv_cache_reserve(cache, n);
    for (int32_t i = 0; i < model->n_layers && status == DG_OK; i++) {
        const dg_layer *layer = &model->layers[i];
        const dg_kv *kv = &cache->layers[i];
        status = fill(cache, kv, kv->k, layer->n_kv_heads, dg_kv_k_row_bytes(cache, layer), cache->type_k,
                      dg_layer_k_dim(layer), first, first + n, error);
        if (status == DG_OK)
            status = fill(cache, kv, kv->v, layer->n_kv_heads, dg_kv_v_row_bytes(cache, layer), cache->type_v,
                          layer->head_dim, first, first + n, error);
    }
    if (status == DG_OK) status = cache->ops->finish(session->backend, error);
    if (status == DG_OK) dg_kv_cache_append(cache, tokens, n);
    free(tokens);
    return status;
}
