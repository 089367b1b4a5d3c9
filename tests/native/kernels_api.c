/* The CPU backend's operations as plain functions of arrays, for tests. Each builds a model of just what the operation
 * reads, runs it once, and returns a dg_status. Matrices are (rows, columns) in the encoding of `type`. */
#include "kernels_api.h"

#include "base/error.h"
#include "cpu/cpu.h"
#include "device/backend.h"
#include "quant/quant.h"

static dg_weight weight_of(int32_t type, const void *data, const float *scale, int32_t n_matrices, int64_t n_rows,
                           int64_t n_cols) {
    return (dg_weight){.data = data,
                       .scale = scale,
                       .type = type,
                       .n_matrices = n_matrices,
                       .n_rows = n_rows,
                       .n_cols = n_cols,
                       .matrix_bytes = (uint64_t)n_rows * dg_row_bytes(type, n_cols)};
}

/* The smallest model there is; an operation's own sizes replace these. */
static dg_model small_model(dg_layer *layer) {
    *layer = (dg_layer){.head_dim = 2, .n_kv_heads = 1, .n_rot = 2, .rope_base = 1e4f};
    return (dg_model){.n_layers = 1,
                      .n_embd = 32,
                      .n_vocab = 32,
                      .n_heads = 1,
                      .n_ff = 32,
                      .n_experts = 1,
                      .n_experts_used = 1,
                      .n_ff_expert = 32,
                      .canvas_length = 1,
                      .rms_eps = 1e-6f,
                      .logit_softcap = 30.0f,
                      .layers = layer};
}

static dg_status open_backend(const dg_model *model, int32_t n_threads, int32_t n, int32_t type_k, int32_t type_v,
                              float bound, dg_backend **backend) {
    dg_backend_params params = {.model = model,
                                .n_threads = n_threads,
                                .max_rows = n,
                                .type_k = type_k,
                                .type_v = type_v,
                                .soft_embedding_bound = bound};
    return dg_cpu_backend.create(&params, backend, NULL);
}

const char *test_isa(void) { return dg_cpu_kernels_choose()->name; }

/* What weights of this type are multiplied in: 0 float32, 1 integers, 2 bfloat16 */
int32_t test_operands(int32_t type) {
    const dg_form form = dg_cpu_kernels_choose()->form_of(type);
    return form.weight_tiles ? 2 : form.integer ? 1 : 0;
}

/* out (n, n_embd) = mlp(rms(x, norm)) */
int test_mlp(int32_t n_embd, int32_t n_ff, int32_t gate_type, const void *gate, int32_t up_type, const void *up,
             int32_t down_type, const void *down, const float *scales, const float *norm, const float *x, int32_t n,
             int32_t n_threads, float *out) {
    dg_layer layer;
    dg_model model = small_model(&layer);
    dg_backend *backend;
    model.n_embd = n_embd;
    layer.mlp = (dg_mlp){.norm = norm,
                         .gate = weight_of(gate_type, gate, scales, 1, n_ff, n_embd),
                         .up = weight_of(up_type, up, scales + 1, 1, n_ff, n_embd),
                         .down = weight_of(down_type, down, scales + 2, 1, n_embd, n_ff)};
    DG_TRY(open_backend(&model, n_threads, n, DG_TYPE_F32, DG_TYPE_F32, 0, &backend));
    dg_cpu_backend.mlp(backend, &layer.mlp, x, n, out);
    dg_cpu_backend.free(backend);
    return DG_OK;
}

int test_moe(const test_moe_params *p, const float *x, int32_t n, int32_t n_threads, float *out) {
    dg_layer layer;
    dg_model model = small_model(&layer);
    dg_backend *backend;
    model.n_embd = p->n_embd;
    model.n_experts = p->n_experts;
    model.n_experts_used = p->n_used;
    model.n_ff_expert = p->n_ff;
    dg_moe moe = {
        .router = p->router, .router_scale = p->router_scale, .norm = p->norm, .expert_scale = p->expert_scale};
    if (p->gate_up != NULL) {
        moe.gate_up = weight_of(p->type, p->gate_up, p->scales, p->n_experts, 2 * p->n_ff, p->n_embd);
    } else {
        moe.gate = weight_of(p->type, p->gate, p->scales, p->n_experts, p->n_ff, p->n_embd);
        moe.up = weight_of(p->type, p->up, p->scales, p->n_experts, p->n_ff, p->n_embd);
    }
    moe.down = weight_of(p->down_type, p->down, p->scales, p->n_experts, p->n_embd, p->n_ff);
    DG_TRY(open_backend(&model, n_threads, n, DG_TYPE_F32, DG_TYPE_F32, 0, &backend));
    dg_cpu_backend.moe(backend, &moe, x, n, out);
    dg_cpu_backend.free(backend);
    return DG_OK;
}

static dg_status open_attention(const test_attention_params *p, int32_t n, dg_model *model, dg_layer *layer,
                                dg_backend **backend) {
    *model = small_model(layer);
    model->n_embd = p->n_embd;
    model->n_heads = p->n_heads;
    model->sliding_window = p->window;
    layer->sliding = p->window > 0;
    layer->head_dim = p->head_dim;
    layer->n_kv_heads = p->n_kv_heads;
    layer->n_rot = p->n_rot;
    layer->rope_base = p->rope_base;
    if (p->complete_keys) layer->attn_v.data = ""; /* only asked whether it is there */
    return open_backend(model, p->n_threads, n, p->type_k, p->type_v, 0, backend);
}

/* out (n, n_heads·head_dim): attention of q over the keys and values of the spans whose span_n is not 0 */
int test_attend(const test_attention_params *p, const float *q, int32_t n, int32_t position, int32_t causal,
                float *out) {
    dg_layer layer;
    dg_model model;
    dg_backend *backend;
    dg_kv kv[2];
    dg_kv_span spans[2];
    int n_spans = 0;
    for (int i = 0; i < 2; i++) {
        kv[i] = (dg_kv){p->k[i], p->v[i], p->capacity[i]};
        if (p->span_n[i] > 0) spans[n_spans++] = (dg_kv_span){&kv[i], p->span_position[i], p->span_n[i]};
    }
    DG_TRY(open_attention(p, n, &model, &layer, &backend));
    dg_cpu_backend.attend(backend, &layer, q, n, position, causal != 0, spans, n_spans, out);
    dg_cpu_backend.free(backend);
    return DG_OK;
}

/* q (n, n_heads, head_dim), and keys and values into span 0's memory. The weights are float32; wv may be NULL. */
int test_project_qkv(const test_attention_params *p, const float *wq, const float *wk, const float *wv,
                     const float *norm, const float *q_norm, const float *k_norm, const float *x, int32_t n,
                     int32_t position, float *q) {
    dg_layer layer;
    dg_model model;
    dg_backend *backend;
    DG_TRY(open_attention(p, n, &model, &layer, &backend));
    const int64_t n_q = (int64_t)p->n_heads * p->head_dim, n_kv = (int64_t)p->n_kv_heads * p->head_dim;
    layer.attn_norm = norm;
    layer.attn_q_norm = q_norm;
    layer.attn_k_norm = k_norm;
    layer.attn_q = weight_of(DG_TYPE_F32, wq, NULL, 1, n_q, p->n_embd);
    layer.attn_k = weight_of(DG_TYPE_F32, wk, NULL, 1, n_kv, p->n_embd);
    layer.attn_v = weight_of(DG_TYPE_F32, wv, NULL, 1, n_kv, p->n_embd);
    dg_kv kv = {p->k[0], p->v[0], p->capacity[0]};
    dg_cpu_backend.project_qkv(backend, &layer, x, n, position, q, &kv);
    dg_cpu_backend.free(backend);
    return DG_OK;
}

static dg_status open_head(const test_head_params *p, int32_t n, dg_model *model, dg_layer *layer,
                           dg_backend **backend) {
    *model = small_model(layer);
    model->n_embd = p->n_embd;
    model->n_vocab = p->n_vocab;
    model->canvas_length = p->canvas_length;
    model->logit_softcap = p->softcap;
    model->output_norm = p->norm;
    model->token_embd = weight_of(p->type, p->table, p->scale, 1, p->n_vocab, p->n_embd);
    return open_backend(model, p->n_threads, n, DG_TYPE_F32, DG_TYPE_F32, p->bound, backend);
}

int test_logits(const test_head_params *p, const float *x, int32_t n, float *logits) {
    dg_layer layer;
    dg_model model;
    dg_backend *backend;
    DG_TRY(open_head(p, n, &model, &layer, &backend));
    dg_cpu_backend.logits(backend, x, n, logits);
    dg_cpu_backend.free(backend);
    return DG_OK;
}

int test_soft_embedding(const test_head_params *p, const float *z, int32_t n, float *soft) {
    dg_layer layer;
    dg_model model;
    dg_backend *backend;
    DG_TRY(open_head(p, n, &model, &layer, &backend));
    dg_cpu_backend.soft_embedding(backend, z, n, soft);
    dg_cpu_backend.free(backend);
    return DG_OK;
}

int test_sample(const test_head_params *p, const float *x, int32_t n, float temperature, const float *uniforms,
                int32_t *argmax, int32_t *candidates, float *entropies, float *soft) {
    dg_layer layer;
    dg_model model;
    dg_backend *backend;
    dg_head_result result = {argmax, candidates, entropies};
    DG_TRY(open_head(p, n, &model, &layer, &backend));
    dg_cpu_sample(backend, x, n, temperature, uniforms, &result, soft);
    dg_cpu_backend.free(backend);
    return DG_OK;
}

/* dg_canvas_settle; `order` (n) is scratch. */
void test_settle(test_settle_case *t, int32_t *order) {
    const dg_noise noise = {.candidates = t->replayed[0], .renoise = t->replayed[1]};
    dg_canvas canvas = {t->rules, t->progress, &noise, t->pinned, t->ids, t->draft, t->entropies};
    dg_canvas_settle(&canvas, t->argmax, t->candidates, order);
    t->progress = canvas.progress;
}

int test_embed(const test_head_params *p, const int32_t *ids, int32_t n, float *x) {
    dg_layer layer;
    dg_model model;
    dg_backend *backend;
    DG_TRY(open_head(p, n, &model, &layer, &backend));
    dg_cpu_backend.embed(backend, ids, n, x);
    dg_cpu_backend.free(backend);
    return DG_OK;
}

/* dst (n_rows, n_cols) = src decoded */
int test_dequantize(int32_t type, const void *src, float *dst, int64_t n_rows, int64_t n_cols) {
    return dg_dequantize(type, src, dst, n_rows, n_cols, 1, NULL);
}

int64_t test_row_bytes(int32_t type, int64_t n_cols) { return (int64_t)dg_row_bytes(type, n_cols); }
int32_t test_block_size(int32_t type) { return dg_type_traits_of(type)->block_size; }
