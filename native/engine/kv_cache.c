#include "engine/kv_cache.h"

#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "quant/quant.h"

#define ALIGNMENT 64 /* of every layer's keys and values: a cache line */

static uint64_t align_up(uint64_t n) { return (n + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

static int32_t min_i32(int32_t a, int32_t b) { return a < b ? a : b; }
static int32_t max_i32(int32_t a, int32_t b) { return a > b ? a : b; }

/* A batch is written before its first token looks back, so a ring holds a window and a batch. It holds n_rewind tokens
 * more, so that what is taken back has not been overwritten. */
static int64_t slots(const dg_model *model, const dg_layer *layer, const dg_kv_plan *plan) {
    if (!layer->sliding) return plan->n_ctx;
    int64_t ring = (int64_t)model->sliding_window - 1 + plan->n_batch + plan->n_rewind;
    return ring < plan->n_ctx ? ring : plan->n_ctx;
}

static uint64_t row_bytes(int32_t type, int32_t dim) {
    const dg_type_traits *traits = dg_type_traits_of(type);
    int64_t n_blocks = (dim + traits->block_size - 1) / traits->block_size;
    return (uint64_t)n_blocks * (uint64_t)traits->block_bytes;
}

uint64_t dg_kv_k_row_bytes(const dg_kv_cache *cache, const dg_layer *layer) {
    return row_bytes(cache->type_k, dg_layer_k_dim(layer));
}

uint64_t dg_kv_v_row_bytes(const dg_kv_cache *cache, const dg_layer *layer) {
    return row_bytes(cache->type_v, layer->head_dim);
}

/* Lays keys, then values of `n_slots` tokens out at `offset` of `base`; returns the offset behind them. */
static uint64_t place(const dg_layer *layer, const dg_kv_plan *plan, int64_t n_slots, char *base, uint64_t offset,
                      dg_kv *kv) {
    uint64_t rows = (uint64_t)n_slots * (uint64_t)layer->n_kv_heads;
    uint64_t k_bytes = align_up(rows * row_bytes(plan->type_k, dg_layer_k_dim(layer)));
    uint64_t v_bytes = align_up(rows * row_bytes(plan->type_v, layer->head_dim));
    if (kv != NULL) *kv = (dg_kv){base + offset, base + offset + k_bytes, n_slots};
    return offset + k_bytes + v_bytes;
}

/* The layers of place `where`. Fills their `layers` and `canvas` where these are not NULL; returns the bytes in all. */
static uint64_t lay_out(const dg_model *model, const dg_kv_plan *plan, int32_t where, char *base, dg_kv *layers,
                        dg_kv *canvas) {
    uint64_t offset = 0, end = 0;
    for (int32_t i = 0; i < model->n_layers; i++)
        if (model->layers[i].place == where)
            offset = place(&model->layers[i], plan, slots(model, &model->layers[i], plan), base, offset,
                           layers != NULL ? &layers[i] : NULL);
    for (int32_t i = 0; i < model->n_layers; i++) {
        if (model->layers[i].place != where) continue;
        uint64_t behind =
            place(&model->layers[i], plan, model->canvas_length, base, offset, canvas != NULL ? &canvas[i] : NULL);
        if (behind > end) end = behind;
    }
    return end;
}

uint64_t dg_kv_cache_bytes(const dg_model *model, const dg_kv_plan *plan, int32_t where) {
    return lay_out(model, plan, where, NULL, NULL, NULL);
}

dg_status dg_kv_cache_create(const dg_model *model, dg_backend *backend, const dg_kv_plan *plan, dg_kv_cache *cache,
                             dg_error *error) {
    *cache = (dg_kv_cache){.model = model,
                           .ops = model->backend,
                           .backend = backend,
                           .n_ctx = plan->n_ctx,
                           .type_k = plan->type_k,
                           .type_v = plan->type_v};
    cache->layers = calloc((size_t)model->n_layers, sizeof *cache->layers);
    cache->canvas = calloc((size_t)model->n_layers, sizeof *cache->canvas);
    cache->tokens = calloc((size_t)plan->n_ctx, sizeof *cache->tokens);
    dg_status status = DG_OK;
    if (cache->layers == NULL || cache->canvas == NULL || cache->tokens == NULL)
        status = dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory for the tokens of a context of %d", plan->n_ctx);
    for (int32_t where = DG_PLACE_CPU; where < DG_MAX_GPUS && status == DG_OK; where++) {
        const uint64_t n_bytes = dg_kv_cache_bytes(model, plan, where);
        void **memory = &cache->memory[where + 1];
        if (n_bytes == 0) continue;
        status = cache->ops->allocate(backend, where, n_bytes, memory, error);
        if (status == DG_OK) lay_out(model, plan, where, *memory, cache->layers, cache->canvas);
    }
    if (status != DG_OK) dg_kv_cache_free(cache);
    return status;
}

void dg_kv_cache_free(dg_kv_cache *cache) {
    for (int i = 0; i < 1 + DG_MAX_GPUS; i++)
        if (cache->memory[i] != NULL) cache->ops->release(cache->backend, cache->memory[i]);
    free(cache->layers);
    free(cache->canvas);
    free(cache->tokens);
    *cache = (dg_kv_cache){0};
}

void dg_kv_cache_reserve(dg_kv_cache *cache, int32_t n) {
    for (int32_t i = 0; i < cache->model->n_layers; i++)
        if (cache->model->layers[i].sliding)
            cache->first_held = max_i32(cache->first_held, (int32_t)(cache->n_past + n - cache->layers[i].capacity));
}

void dg_kv_cache_append(dg_kv_cache *cache, const int32_t *tokens, int32_t n) {
    memcpy(cache->tokens + cache->n_past, tokens, (size_t)n * sizeof *tokens);
    cache->n_past += n;
}

void dg_kv_cache_truncate(dg_kv_cache *cache, int32_t n) {
    if (n >= cache->n_past) return;
    bool reaches = cache->first_held <= max_i32(0, n - (cache->model->sliding_window - 1));
    cache->n_past = reaches ? n : 0;
    if (cache->n_past == 0) cache->first_held = 0;
}

dg_kv_span dg_kv_cache_span(const dg_kv_cache *cache, int layer, int32_t position, int32_t end) {
    int32_t first = 0;
    if (cache->model->layers[layer].sliding) first = max_i32(0, position - (cache->model->sliding_window - 1));
    first = min_i32(first, end);
    return (dg_kv_span){&cache->layers[layer], first, end - first};
}
