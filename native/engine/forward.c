#include "engine/forward.h"

#include "base/error.h"

/* docs/model.md, "A layer"; each operation says in operations.h what it computes. */
static void run_layer(dg_forward *f, const dg_pass *p, const dg_layer *layer) {
    dg_project_qkv(f, p, layer);
    dg_attend(f, p, layer);
    dg_project_output(f, p, layer);

    dg_dense(f, p, layer);
    dg_experts(f, p, layer);
    dg_combine(f, p, layer);
}

static dg_status run_layers(dg_forward *f, const dg_pass *p, dg_error *error) {
    const dg_layer *last = &f->model->layers[f->model->n_layers - 1];
    for (const dg_layer *layer = f->model->layers; layer <= last; layer++) {
        if (atomic_load_explicit(f->cancel, memory_order_relaxed)) {
            DG_TRY(dg_wait(f, error));
            return dg_fail(error, DG_ERROR_CANCELLED, "cancelled");
        }
        if (p->encoding && layer == last)
            dg_project_kv(f, p, layer); /* what the encoder returns is never used: only its keys and values are */
        else
            run_layer(f, p, layer);
    }
    return DG_OK;
}

dg_status dg_forward_encode(dg_forward *f, dg_kv_cache *cache, const int32_t *tokens, int32_t n, dg_error *error) {
    const dg_pass p = {.cache = cache, .n = n, .position = cache->n_past, .encoding = true};
    dg_kv_cache_reserve(cache, n);
    dg_embed(f, &p, tokens);
    DG_TRY(run_layers(f, &p, error));
    DG_TRY(dg_wait(f, error));
    dg_kv_cache_append(cache, tokens, n);
    return DG_OK;
}

dg_status dg_forward_decode(dg_forward *f, const dg_kv_cache *cache, const int32_t *tokens, bool conditioned,
                            dg_error *error) {
    /* The tokens' keys and values are only read. A decoding pass writes those of the canvas, which the cache also has.
     */
    const dg_pass p = {.cache = (dg_kv_cache *)cache, .n = f->model->canvas_length, .position = cache->n_past};
    dg_embed(f, &p, tokens);
    dg_self_condition(f, &p, conditioned);
    return run_layers(f, &p, error);
}
