#include "engine/operations.h"

#include "base/error.h"
#include "engine/cost.h"

static void stop(dg_forward *f, dg_operation_id operation, dg_cost cost) {
    dg_profile_stop(f->profile, operation, cost.flop, cost.bytes);
}

static const dg_cost free_of_charge; /* little arithmetic, and no weights */

/* Where the keys and values of a pass go. */
static const dg_kv *own_store(const dg_pass *p, const dg_layer *layer) {
    return p->encoding ? &p->cache->layers[layer->index] : &p->cache->canvas[layer->index];
}

void dg_embed(dg_forward *f, const dg_pass *p, const int32_t *tokens) {
    dg_profile_start(f->profile);
    f->ops->embed(f->backend, tokens, p->n, f->x);
    stop(f, DG_OP_EMBED, free_of_charge);
}

void dg_self_condition(dg_forward *f, const dg_pass *p, bool conditioned) {
    const dg_mlp *mlp = &f->model->self_conditioning;
    if (conditioned) f->ops->mlp(f->backend, mlp, f->soft, p->n, f->dense);
    f->ops->add_norm(f->backend, f->x, conditioned ? f->dense : NULL, p->n);
    stop(f, DG_OP_SELF_CONDITIONING, conditioned ? dg_cost_of_mlp(mlp, p->n) : free_of_charge);
}

void dg_project_qkv(dg_forward *f, const dg_pass *p, const dg_layer *layer) {
    f->ops->project_qkv(f->backend, layer, f->x, p->n, p->position, f->q, own_store(p, layer));
    stop(f, DG_OP_QKV, dg_cost_add(dg_cost_of_queries(layer, p->n), dg_cost_of_keys_and_values(layer, p->n)));
}

void dg_project_kv(dg_forward *f, const dg_pass *p, const dg_layer *layer) {
    f->ops->project_qkv(f->backend, layer, f->x, p->n, p->position, NULL, own_store(p, layer));
    stop(f, DG_OP_QKV, dg_cost_of_keys_and_values(layer, p->n));
}

void dg_attend(dg_forward *f, const dg_pass *p, const dg_layer *layer) {
    const int32_t end = p->encoding ? p->position + p->n : p->position;
    const dg_kv_span seen[] = {dg_kv_cache_span(p->cache, layer->index, p->position, end),
                               {own_store(p, layer), p->position, p->n}};
    f->ops->attend(f->backend, layer, f->q, p->n, p->position, p->encoding, seen, p->encoding ? 1 : 2, f->attended);

    /* Of a chunk's own keys half are masked. */
    const double n_keys = p->encoding ? seen[0].n - 0.5 * p->n : (double)seen[0].n + seen[1].n;
    const uint64_t key_bytes = dg_kv_k_row_bytes(p->cache, layer) + dg_kv_v_row_bytes(p->cache, layer);
    stop(f, DG_OP_ATTENTION, dg_cost_of_attention(f->model, layer, p->n, n_keys, (double)key_bytes));
}

void dg_project_output(dg_forward *f, const dg_pass *p, const dg_layer *layer) {
    f->ops->project_output(f->backend, layer, f->attended, p->n, f->x);
    stop(f, DG_OP_ATTENTION_OUTPUT, dg_cost_of_output(layer, p->n));
}

void dg_dense(dg_forward *f, const dg_pass *p, const dg_layer *layer) {
    f->ops->mlp(f->backend, &layer->mlp, f->x, p->n, f->dense);
    stop(f, DG_OP_MLP, dg_cost_of_mlp(&layer->mlp, p->n));
}

void dg_experts(dg_forward *f, const dg_pass *p, const dg_layer *layer) {
    f->ops->moe(f->backend, &layer->moe, f->x, p->n, f->experts);
    stop(f, DG_OP_EXPERTS, dg_cost_of_moe(f->model, &layer->moe, p->n));
}

void dg_combine(dg_forward *f, const dg_pass *p, const dg_layer *layer) {
    const float scalar = p->encoding ? layer->encoder_scalar : layer->decoder_scalar;
    f->ops->combine(f->backend, layer, f->x, f->dense, f->experts, p->n, scalar);
    stop(f, DG_OP_NORMS, free_of_charge);
}

void dg_denoise(dg_forward *f, bool soft) { f->ops->denoise(f->backend, f->x, soft ? f->soft : NULL); }

dg_status dg_wait(dg_forward *f, dg_error *error) { return f->ops->finish(f->backend, error); }

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
    f->attended = carve(base, &offset, heads);
    f->soft = carve(base, &offset, (int64_t)model->canvas_length * model->n_embd);
    /* The layers write `dense` and `experts` when attention has read q, and read them before the next q: all share one
     * place. */
    uint64_t behind_q = offset;
    f->q = carve(base, &behind_q, heads);
    f->dense = carve(base, &offset, embd);
    f->experts = carve(base, &offset, embd);
    return offset > behind_q ? offset : behind_q;
}

uint64_t dg_forward_bytes(const dg_model *model, int32_t max_rows) {
    return lay_out(model, max_rows, NULL, &(dg_forward){0});
}

dg_status dg_forward_create(const dg_model *model, dg_backend *backend, int32_t max_rows, const atomic_bool *cancel,
                            dg_profile *profile, dg_forward *f, dg_error *error) {
    *f = (dg_forward){.model = model, .ops = model->backend, .backend = backend, .cancel = cancel, .profile = profile};
    DG_TRY(f->ops->allocate(backend, DG_PLACE_ALL, dg_forward_bytes(model, max_rows), &f->memory, error));
    lay_out(model, max_rows, f->memory, f);
    return DG_OK;
}

void dg_forward_free(dg_forward *f) {
    if (f->memory != NULL) f->ops->release(f->backend, f->memory);
    *f = (dg_forward){0};
}
