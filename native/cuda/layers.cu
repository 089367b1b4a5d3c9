/* The operations of layers of backend.h, each a few launches: what each one leaves for the next is in held.cuh. */
#include "cuda/backend.cuh"

#include <math.h>
#include <string.h>

namespace {

/* Activations of rms(x) · norm in the kind that the kernels of experts and router take with the weight. */
PrepareTarget target_for(const Activations &x, const float *norm, const DeviceWeight &weight) {
    PrepareTarget t = {norm, 1.0f, {}, x};
    t.wanted[packed_shape(weight.type, weight.n_rows, weight.n_cols).activations] = true;
    return t;
}

/* The same in the kinds that dense products by the weights, or the head, take. */
PrepareTarget dense_target_for(const dg_backend *b, const float *norm, const DeviceWeight *weights, int n_weights) {
    PrepareTarget t = {norm, 1.0f, {}, b->scratch.x};
    for (int i = 0; i < n_weights; i++) t.wanted[dense_activations(b->queue, weights[i])] = true;
    return t;
}

/* The three weights side by side of a layer's queries, keys and values; without queries where `queries` is false. */
int qkv_weights(const dg_backend *b, const dg_layer *layer, bool queries, DeviceWeight (&weights)[3]) {
    int n = 0;
    if (queries) weights[n++] = b->device->weight(layer->attn_q);
    weights[n++] = b->device->weight(layer->attn_k);
    if (layer->attn_v.data != nullptr) weights[n++] = b->device->weight(layer->attn_v);
    return n;
}

/* For rows x that go into a dense product, or into the head. */
Preparation prepare_next(dg_backend *b, const float *x, const PrepareTarget &target) {
    b->held.dense = {x, target.weight};
    return {{target}, 1};
}

/* For rows x that go into layer `index`, or behind the last one into the head. */
Preparation prepare_layer(dg_backend *b, const float *x, int32_t index) {
    const dg_model *model = b->model;
    if (index == model->n_layers && b->device->weight(model->token_embd).tiles == nullptr) return {};
    if (index == model->n_layers) {
        const DeviceWeight embedding = b->device->weight(model->token_embd);
        return prepare_next(b, x, dense_target_for(b, b->device->vector(model->output_norm), &embedding, 1));
    }
    const dg_layer *layer = &model->layers[index];
    if (b->device->weight(layer->attn_k).tiles == nullptr) return {}; /* it is not on this device */
    DeviceWeight weights[3];
    const int n_weights = qkv_weights(b, layer, true, weights);
    return prepare_next(b, x, dense_target_for(b, b->device->vector(layer->attn_norm), weights, n_weights));
}

Preparation prepare_mlp(dg_backend *b, const float *x, const dg_mlp *m) {
    const DeviceWeight gate_up[] = {b->device->weight(m->gate), b->device->weight(m->up)};
    return prepare_next(b, x, dense_target_for(b, b->device->vector(m->norm), gate_up, 2));
}

/* Adds what experts and router take of rows x. */
void prepare_moe(dg_backend *b, const float *x, const dg_moe *m, Preparation *next) {
    const DeviceModel &device = *b->device;
    const DeviceWeight gate = device.weight(m->gate_up.data != nullptr ? m->gate_up : m->gate);
    b->held.experts = {x, device.vector(m->norm)};
    next->targets[next->n++] = target_for(b->scratch.experts.x, device.vector(m->norm), gate);
    PrepareTarget router =
        target_for(b->scratch.experts.router, device.vector(m->router_scale), device.router(*b->model, *m));
    router.gain = 1.0f / sqrtf((float)b->model->n_embd);
    next->targets[next->n++] = router;
}

void prepare_now(dg_backend *b, const float *x, int n, const Preparation &targets) {
    prepare_rows(b->queue, stored_rows(x), n, b->model->n_embd, true, b->model->rms_eps, targets);
}

/* `kept`: the result stays while the experts are at work. */
Partials product(dg_backend *b, const DeviceWeight *weights, int n_weights, int n, bool kept) {
    const int64_t floats = kept ? b->scratch.products.kept_floats : b->scratch.products.partials_floats;
    Partials out = {b->scratch.products.partials, floats, 0, 0, 0};
    matmul(b->queue, weights, n_weights, b->scratch.x, n, &out);
    return out;
}

} // namespace

void prepare_head(dg_backend *b, const float *x, int n) {
    if (!b->held.dense.is(x, b->device->vector(b->model->output_norm)))
        prepare_now(b, x, n, prepare_layer(b, x, b->model->n_layers));
}

void embed(dg_backend *b, const int32_t *host_ids, int32_t n, float *x) {
    if (!usable(b)) return;
    const size_t bytes = (size_t)n * sizeof *host_ids;
    b->held.complete(b->queue);
    b->held.forget_prepared();
    if (host_ids != nullptr) {
        memcpy(b->host.ids, host_ids, bytes); /* the last use of it has ended: every pass ends with `finish` */
        cudaMemcpyAsync(b->scratch.ids, b->host.ids, bytes, cudaMemcpyHostToDevice, b->queue.stream);
    }
    embed_rows(b->queue, b->device->weight(b->model->token_embd),
               host_ids != nullptr ? b->scratch.ids : b->scratch.canvas.ids, n, x);
    note_failure(b, "embed");
}

void mlp(dg_backend *b, const dg_mlp *m, const float *x, int32_t n, float *out) {
    if (!usable(b)) return;
    const DeviceModel &device = *b->device;
    const DeviceWeight gate_up[] = {device.weight(m->gate), device.weight(m->up)}, down = device.weight(m->down);
    b->held.complete(b->queue);
    if (!b->held.dense.is(x, device.vector(m->norm))) prepare_now(b, x, n, prepare_mlp(b, x, m));
    b->held.dense = {nullptr, nullptr};
    prepare_gated(b->queue, product(b, gate_up, 2, n, true), (int)m->gate.n_rows, dense_activations(b->queue, down),
                  b->scratch.x);
    b->held.hold(Held::kDense, out, split_rows(product(b, &down, 1, n, true)), n, b->model->n_embd);
    note_failure(b, "mlp");
}

void add_norm(dg_backend *b, float *x, const float *d, int32_t n) {
    if (!usable(b)) return;
    const Rows added = b->held.read(d);
    b->held.complete(b->queue);
    b->held.forget_prepared();
    add_then_norm(b->queue, x, d != nullptr ? &added : nullptr, n, b->model->n_embd, b->model->rms_eps,
                  prepare_layer(b, x, 0));
    note_failure(b, "add_norm");
}

void project_qkv(dg_backend *b, const dg_layer *layer, const float *x, int32_t n, int32_t position, float *q,
                 const dg_kv *kv) {
    if (!usable(b)) return;
    const dg_model *model = b->model;
    const DeviceModel &device = *b->device;
    DeviceWeight weights[3];
    const int n_weights = qkv_weights(b, layer, q != nullptr, weights);
    b->held.complete(b->queue);
    if (!b->held.dense.is(x, device.vector(layer->attn_norm))) prepare_now(b, x, n, prepare_layer(b, x, layer->index));
    Partials projections = product(b, weights, n_weights, n, false);
    QkvTarget out = {layer,
                     device.vector(layer->attn_q_norm),
                     device.vector(layer->attn_k_norm),
                     device.frequencies + layer->index * device.frequency_stride,
                     model->n_heads,
                     position,
                     model->rms_eps,
                     q,
                     *kv,
                     b->params.type_k,
                     b->params.type_v};
    finish_qkv(b->queue, projections, out);
    note_failure(b, "project_qkv");
}

void attend_spans(dg_backend *b, const dg_layer *layer, const float *q, int32_t n, int32_t position, bool causal,
                  const dg_kv_span *spans, int32_t n_spans, float *a) {
    if (!usable(b)) return;
    b->held.complete(b->queue);
    AttentionTask task = {};
    task.layer = layer;
    task.n_heads = b->model->n_heads;
    task.n = n;
    task.position = position;
    task.causal = causal;
    task.window = layer->sliding ? b->model->sliding_window : 0;
    task.spans = spans;
    task.n_spans = n_spans;
    task.type_k = b->params.type_k;
    task.type_v = b->params.type_v;
    task.q = q;
    task.out = a;
    task.scratch = b->scratch.attention.partials;
    task.scratch_floats = b->scratch.attention.partials_floats;
    b->held.hold(Held::kAttention, a, attend(b->queue, task), n, b->model->n_heads * layer->head_dim);
    note_failure(b, "attend");
}

void project_output(dg_backend *b, const dg_layer *layer, const float *a, int32_t n, float *x) {
    if (!usable(b)) return;
    const DeviceWeight output = b->device->weight(layer->attn_output);
    const Rows attended = b->held.read(a);
    b->held.complete(b->queue);
    b->held.forget_prepared();
    prepare_rows(b->queue, attended, n, (int)output.n_cols, false, 0, {{dense_target_for(b, nullptr, &output, 1)}, 1});
    const Partials added = product(b, &output, 1, n, true);
    Preparation next = prepare_mlp(b, x, &layer->mlp);
    if (b->device->weight(layer->moe.down).tiles != nullptr) prepare_moe(b, x, &layer->moe, &next);
    add_normed(b->queue, added, b->device->vector(layer->post_attention_norm), b->model->rms_eps, x, next);
    note_failure(b, "project_output");
}

void moe(dg_backend *b, const dg_moe *m, const float *x, int32_t n, float *out) {
    if (!usable(b)) return;
    const dg_model *model = b->model;
    const DeviceModel &device = *b->device;
    const bool merged = m->gate_up.data != nullptr;
    const DeviceWeight gate = device.weight(merged ? m->gate_up : m->gate);
    const DeviceWeight up = device.weight(merged ? m->gate_up : m->up), router = device.router(*model, *m);
    b->held.complete(b->queue, Held::kExperts); /* the dense path's result is not in the way */
    b->held.complete(b->queue, Held::kAttention);
    if (!b->held.experts.is(x, device.vector(m->norm))) {
        Preparation targets = {};
        prepare_moe(b, x, m, &targets);
        prepare_now(b, x, n, targets);
    }
    b->held.experts = {nullptr, nullptr}; /* results take the router's place */
    Partials logits = {b->scratch.experts.partials, b->scratch.experts.partials_floats, 0, 0, 0};
    matmul_router(b->queue, router, b->scratch.experts.router, n, &logits);
    MoeTask task = {model,
                    gate,
                    up,
                    device.weight(m->down),
                    device.vector(m->expert_scale),
                    b->scratch.experts.x,
                    logits,
                    n,
                    b->scratch.experts.moe};
    b->held.hold(Held::kExperts, out, mix_experts(b->queue, task), n, model->n_embd);
    note_failure(b, "moe");
}

void combine_paths(dg_backend *b, const dg_layer *layer, float *x, const float *d, const float *e, int32_t n,
                   float scalar) {
    if (!usable(b)) return;
    const DeviceModel &device = *b->device;
    const Rows from_d = b->held.read(d), from_e = b->held.read(e);
    b->held.complete(b->queue);
    b->held.forget_prepared();
    combine(b->queue,
            {x, from_d, from_e, device.vector(layer->post_mlp_norm), device.vector(layer->post_moe_norm),
             device.vector(layer->post_ffn_norm), b->model->n_embd, b->model->rms_eps, scalar},
            n, prepare_layer(b, x, layer->index + 1));
    note_failure(b, "combine");
}
