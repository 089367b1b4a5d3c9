#include "engine/forward.h"

#include "base/error.h"

/* One pass over the layers: which tokens, and how they attend. */
typedef struct pass {
    dg_kv_cache *cache; /* written when encoding, read in both modes */
    int32_t n;          /* tokens in this pass */
    int32_t position;   /* of the first of them */
    bool encoding;      /* causal, keys and values go to the cache; otherwise bidirectional over the canvas */
} pass;

/* ---- What an operation costs, for the profile ---------------------------------------------------------------- */

static double weight_bytes(const dg_weight *w) { return (double)w->matrix_bytes * w->n_matrices; }
static double weight_flop(const dg_weight *w, double rows) {
    return 2.0 * rows * (double)w->n_rows * (double)w->n_cols;
}

static double mlp_flop(const dg_mlp *m, double n) {
    return weight_flop(&m->gate, n) + weight_flop(&m->up, n) + weight_flop(&m->down, n);
}
static double mlp_bytes(const dg_mlp *m) {
    return weight_bytes(&m->gate) + weight_bytes(&m->up) + weight_bytes(&m->down);
}

static double moe_flop(const dg_model *model, const dg_moe *m, double n) {
    double rows = n * model->n_experts_used;
    return weight_flop(&m->gate_up, rows) + weight_flop(&m->gate, rows) + weight_flop(&m->up, rows) +
           weight_flop(&m->down, rows) + 2.0 * n * model->n_experts * model->n_embd;
}
static double moe_bytes(const dg_moe *m) {
    return weight_bytes(&m->gate_up) + weight_bytes(&m->gate) + weight_bytes(&m->up) + weight_bytes(&m->down);
}

static double attention_flop(const dg_model *model, const dg_layer *layer, double n_queries, double n_keys) {
    return 4.0 * n_queries * n_keys * model->n_heads * layer->head_dim;
}

/* ---- The layers ---------------------------------------------------------------------------------------------- */

static void attention(dg_forward *f, int il, const pass *p) {
    const dg_layer *layer = &f->model->layers[il];
    const dg_kv *own = p->encoding ? &p->cache->layers[il] : &p->cache->canvas[il];
    dg_kv_span spans[2];
    int n_spans = 0;
    double n_keys = 0;

    f->ops->project_qkv(f->backend, layer, f->x, p->n, p->position, f->q, own);
    dg_profile_stop(f->profile, DG_OP_QKV,
                    weight_flop(&layer->attn_q, p->n) + weight_flop(&layer->attn_k, p->n) +
                        weight_flop(&layer->attn_v, p->n),
                    weight_bytes(&layer->attn_q) + weight_bytes(&layer->attn_k) + weight_bytes(&layer->attn_v));

    int32_t end = p->encoding ? p->position + p->n : p->position;
    spans[n_spans++] = dg_kv_cache_span(p->cache, il, p->position, end);
    if (!p->encoding) spans[n_spans++] = (dg_kv_span){own, p->position, p->n};
    for (int i = 0; i < n_spans; i++) n_keys += spans[i].n;
    if (p->encoding) n_keys -= 0.5 * p->n; /* half of a chunk's own keys are masked */
    f->ops->attend(f->backend, layer, f->q, p->n, p->position, p->encoding, spans, n_spans, f->a);
    dg_profile_stop(f->profile, DG_OP_ATTENTION, attention_flop(f->model, layer, p->n, n_keys),
                    n_keys * layer->n_kv_heads *
                        (double)(dg_kv_k_row_bytes(p->cache, layer) + dg_kv_v_row_bytes(p->cache, layer)));

    f->ops->project_output(f->backend, layer, f->a, p->n, f->x);
    dg_profile_stop(f->profile, DG_OP_ATTENTION_OUTPUT, weight_flop(&layer->attn_output, p->n),
                    weight_bytes(&layer->attn_output));
}

static void feed_forward(dg_forward *f, int il, const pass *p) {
    const dg_layer *layer = &f->model->layers[il];

    f->ops->mlp(f->backend, &layer->mlp, f->x, p->n, f->d);
    dg_profile_stop(f->profile, DG_OP_MLP, mlp_flop(&layer->mlp, p->n), mlp_bytes(&layer->mlp));

    f->ops->moe(f->backend, &layer->moe, f->x, p->n, f->e);
    dg_profile_stop(f->profile, DG_OP_EXPERTS, moe_flop(f->model, &layer->moe, p->n), moe_bytes(&layer->moe));

    f->ops->combine(f->backend, layer, f->x, f->d, f->e, p->n,
                    p->encoding ? layer->encoder_scalar : layer->decoder_scalar);
    dg_profile_stop(f->profile, DG_OP_NORMS, 0, 0);
}

static dg_status layers(dg_forward *f, const pass *p, dg_error *error) {
    int last = f->model->n_layers - 1;
    for (int il = 0; il <= last; il++) {
        if (atomic_load_explicit(f->cancel, memory_order_relaxed)) {
            DG_TRY(f->ops->finish(f->backend, error));
            return dg_fail(error, DG_ERROR_CANCELLED, "cancelled");
        }
        if (p->encoding && il == last) {
            /* Nothing reads what the encoder returns: of its last layer only the keys and values are needed. */
            const dg_layer *layer = &f->model->layers[il];
            f->ops->project_qkv(f->backend, layer, f->x, p->n, p->position, NULL, &p->cache->layers[il]);
            dg_profile_stop(f->profile, DG_OP_QKV,
                            weight_flop(&layer->attn_k, p->n) + weight_flop(&layer->attn_v, p->n),
                            weight_bytes(&layer->attn_k) + weight_bytes(&layer->attn_v));
        } else {
            attention(f, il, p);
            feed_forward(f, il, p);
        }
    }
    return DG_OK;
}

dg_status dg_forward_encode(dg_forward *f, dg_kv_cache *cache, const int32_t *tokens, int32_t n, dg_error *error) {
    pass p = {.cache = cache, .n = n, .position = cache->n_past, .encoding = true};
    dg_kv_cache_reserve(cache, n);
    dg_profile_start(f->profile);
    f->ops->embed(f->backend, tokens, n, f->x);
    dg_profile_stop(f->profile, DG_OP_EMBED, 0, 0);
    DG_TRY(layers(f, &p, error));
    DG_TRY(f->ops->finish(f->backend, error));
    dg_kv_cache_append(cache, tokens, n);
    return DG_OK;
}

dg_status dg_forward_decode(dg_forward *f, const dg_kv_cache *cache, const int32_t *tokens, bool conditioned,
                            dg_error *error) {
    const dg_model *model = f->model;
    /* The cache itself is only read: of it, a decoding pass writes the canvas's own keys and values. */
    pass p = {.cache = (dg_kv_cache *)cache, .n = model->canvas_length, .position = cache->n_past, .encoding = false};
    dg_profile_start(f->profile);
    f->ops->embed(f->backend, tokens, p.n, f->x);
    dg_profile_stop(f->profile, DG_OP_EMBED, 0, 0);
    /* x0 = rms(embed + sc(s)); on the first step s = 0, and sc(0) = 0 */
    if (conditioned) f->ops->mlp(f->backend, &model->self_conditioning, f->soft, p.n, f->d);
    f->ops->add_norm(f->backend, f->x, conditioned ? f->d : NULL, p.n);
    dg_profile_stop(f->profile, DG_OP_SELF_CONDITIONING, conditioned ? mlp_flop(&model->self_conditioning, p.n) : 0,
                    conditioned ? mlp_bytes(&model->self_conditioning) : 0);
    return layers(f, &p, error);
}

/* ---- Memory -------------------------------------------------------------------------------------------------- */

static int64_t largest_head_dim(const dg_model *model) {
    int64_t largest = 0;
    for (int32_t i = 0; i < model->n_layers; i++)
        if (model->layers[i].head_dim > largest) largest = model->layers[i].head_dim;
    return largest;
}

/* Hands out consecutive, aligned pieces of `base`; with base NULL it only counts. */
static float *carve(char *base, uint64_t *offset, int64_t n_floats) {
    float *piece = base != NULL ? (float *)(base + *offset) : NULL;
    *offset += ((uint64_t)n_floats * sizeof(float) + 63) / 64 * 64;
    return piece;
}

static uint64_t lay_out(const dg_model *model, int32_t max_rows, char *base, dg_forward *f) {
    uint64_t offset = 0;
    int64_t embd = (int64_t)max_rows * model->n_embd;
    int64_t heads = (int64_t)max_rows * model->n_heads * largest_head_dim(model);
    f->x = carve(base, &offset, embd);
    f->a = carve(base, &offset, heads);
    f->soft = carve(base, &offset, (int64_t)model->canvas_length * model->n_embd);
    /* The layers write d and e when attention has read q, and read them before the next q: all share one place. */
    uint64_t behind_q = offset;
    f->q = carve(base, &behind_q, heads);
    f->d = carve(base, &offset, embd);
    f->e = carve(base, &offset, embd);
    return offset > behind_q ? offset : behind_q;
}

uint64_t dg_forward_bytes(const dg_model *model, int32_t max_rows) {
    return lay_out(model, max_rows, NULL, &(dg_forward){0});
}

dg_status dg_forward_create(const dg_model *model, dg_backend *backend, int32_t max_rows, const atomic_bool *cancel,
                            dg_profile *profile, dg_forward *f, dg_error *error) {
    *f = (dg_forward){.model = model, .ops = model->backend, .backend = backend, .cancel = cancel, .profile = profile};
    DG_TRY(f->ops->allocate(backend, DG_PLACE_BOTH, dg_forward_bytes(model, max_rows), &f->memory, error));
    lay_out(model, max_rows, f->memory, f);
    return DG_OK;
}

void dg_forward_free(dg_forward *f) {
    if (f->memory != NULL) f->ops->release(f->backend, f->memory);
    *f = (dg_forward){0};
}
