/* The keys and values of the encoded tokens: rings for the sliding layers, which only ever look back one window, and a
 * store of n_ctx tokens for the full layers. */
#ifndef DG_KV_CACHE_H
#define DG_KV_CACHE_H

#include "device/backend.h"

typedef struct dg_kv_cache {
    const dg_model *model;
    const dg_backend_ops *ops;
    dg_backend *backend;
    void *memory[1 + DG_MAX_GPUS]; /* by place + 1: the allocations that `layers` and `canvas` point into */
    dg_kv *layers;                 /* (n_layers) */
    dg_kv *canvas;   /* (n_layers) keys and values of the canvas being denoised; all of a place in the same memory,
                        since no layer needs another's */
    int32_t *tokens; /* (n_ctx) ids of the encoded tokens, on the host */
    int32_t n_ctx;
    int32_t n_past;     /* tokens encoded */
    int32_t first_held; /* the rings hold positions from here on */
    int32_t type_k, type_v;
} dg_kv_cache;

typedef struct dg_kv_plan {
    int32_t n_ctx, n_batch, n_rewind;
    int32_t type_k, type_v;
} dg_kv_plan;

/* Bytes that a cache of this plan takes at one place. */
uint64_t dg_kv_cache_bytes(const dg_model *model, const dg_kv_plan *plan, int32_t place);

dg_status dg_kv_cache_create(const dg_model *model, dg_backend *backend, const dg_kv_plan *plan, dg_kv_cache *cache,
                             dg_error *error);
void dg_kv_cache_free(dg_kv_cache *cache);

/* Bytes of one head's key or value of one token in `layer`. */
uint64_t dg_kv_k_row_bytes(const dg_kv_cache *cache, const dg_layer *layer);
uint64_t dg_kv_v_row_bytes(const dg_kv_cache *cache, const dg_layer *layer);

/* To be called before `n` tokens at n_past are written: the rings will forget what they replace. */
void dg_kv_cache_reserve(dg_kv_cache *cache, int32_t n);
/* After they are written. */
void dg_kv_cache_append(dg_kv_cache *cache, const int32_t *tokens, int32_t n);
/* Forgets positions from `n` on, or everything where the rings no longer reach back one window from `n`. */
void dg_kv_cache_truncate(dg_kv_cache *cache, int32_t n);

/* The cached tokens that a query at `position` or later can see in `layer`, and that lie before `end`. */
dg_kv_span dg_kv_cache_span(const dg_kv_cache *cache, int layer, int32_t position, int32_t end);

#endif
