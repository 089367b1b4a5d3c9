/* The operations of backend.h, each a few launches. */
#include "weights.cuh"

#include <math.h>
#include <new>
#include <stdio.h>
#include <string.h>

struct dg_backend {
    dg_backend_params params;
    const dg_model *model;
    const DeviceModel *device;
    Queue queue;
    char *scratch;      /* the one allocation behind the fields below */
    int32_t *ids;       /* (max_rows) */
    Activations x;      /* (max_rows, widest input of a product) */
    Activations router; /* (max_rows, n_embd) */
    float *partials;
    int64_t partials_floats;
    float *attention;
    int64_t attention_floats;
    MoeScratch moe;
    HeadScratch head;
    int32_t head_rows; /* positions that the head takes at a time */
    dg_status status;  /* of the first failure since the last `finish` */
    char message[256];
};

namespace {

/* ---- Scratch -------------------------------------------------------------------------------------------------- */

/* Hands out consecutive, aligned pieces of `base`; with base NULL it only counts. */
struct Carver {
    char *base;
    uint64_t offset;
    template <class T> void take(T **piece, int64_t n) {
        *piece = base != nullptr ? (T *)(base + offset) : nullptr;
        offset += ((uint64_t)n * sizeof(T) + 255) / 256 * 256;
    }
    void take_activations(Activations *x, int64_t n_rows, int64_t n_cols) {
        int64_t k_tiles = ceil_div(n_cols, 64);
        take(&x->codes, n_rows * k_tiles * 64);
        take(&x->scales, n_rows * k_tiles * 2);
        take(&x->sums, n_rows * k_tiles * 2);
        take(&x->values, n_rows * n_cols);
    }
};

int64_t max_i64(int64_t a, int64_t b) { return a > b ? a : b; }

uint64_t lay_out(const dg_backend_params *params, int n_multiprocessors, char *base, dg_backend *b) {
    const dg_model *model = params->model;
    const Queue queue = {nullptr, n_multiprocessors};
    const int64_t rows = params->max_rows, choices = rows * model->n_experts_used;
    int64_t heads = 0, qkv = 0, attention = 0;
    for (int32_t i = 0; i < model->n_layers; i++) {
        const dg_layer *layer = &model->layers[i];
        heads = max_i64(heads, (int64_t)model->n_heads * layer->head_dim);
        qkv = max_i64(qkv, layer->attn_q.n_rows + layer->attn_k.n_rows + layer->attn_v.n_rows);
        attention = max_i64(attention, attention_scratch_floats((int)rows, model->n_heads, layer->head_dim));
    }
    const int64_t widest = max_i64(model->n_embd, max_i64(heads, model->n_ff));
    const int64_t results = max_i64(max_i64(qkv, model->n_embd), max_i64(2 * model->n_ff, model->n_experts));

    Carver c = {base, 0};
    c.take(&b->ids, rows);
    c.take_activations(&b->x, rows, widest);
    c.take_activations(&b->router, rows, model->n_embd);
    b->partials_floats = partials_capacity(queue, rows, results);
    c.take(&b->partials, b->partials_floats);
    b->attention_floats = attention;
    c.take(&b->attention, attention);

    c.take(&b->moe.ids, choices);
    c.take(&b->moe.shares, choices);
    c.take(&b->moe.slots, choices);
    c.take(&b->moe.slot_tokens, choices);
    c.take(&b->moe.work, 3 * moe_work_entries(model, rows) + 1);
    c.take_activations(&b->moe.hidden, choices, model->n_ff_expert);
    c.take(&b->moe.out, choices * model->n_embd);

    b->head_rows = model->canvas_length < params->max_rows ? model->canvas_length : params->max_rows;
    const int64_t n = b->head_rows;
    c.take(&b->head.statistics, n * ceil_div(model->n_vocab, kVocabularyTile));
    c.take(&b->head.rows, n);
    c.take(&b->head.look_weights, n * kMaxLooks * kVocabularyTile);
    c.take(&b->head.any_dense, ceil_div(n, kSoftTokens));
    c.take(&b->head.uniforms, n);
    c.take(&b->head.argmax, n);
    c.take(&b->head.candidates, n);
    c.take(&b->head.entropies, n);
    c.take(&b->head.chunk, n * kVocabularyChunk);
    c.take(&b->head.soft_sums, kSoftSplits * n * model->n_embd);
    return c.offset;
}

uint64_t scratch_bytes(const dg_backend_params *params) {
    const DeviceModel *device = (const DeviceModel *)params->model->backend_data;
    dg_backend counted = {};
    return lay_out(params, device->n_multiprocessors, nullptr, &counted);
}

/* ---- Failures ------------------------------------------------------------------------------------------------- */

/* Whether an operation may go ahead. */
bool usable(const dg_backend *b) { return b->status == DG_OK; }

/* Keeps the first failure of the launches since the last call. */
void note_failure(dg_backend *b, const char *operation) {
    cudaError_t e = cudaGetLastError();
    if (e == cudaSuccess || b->status != DG_OK) return;
    b->status = e == cudaErrorMemoryAllocation ? DG_ERROR_OUT_OF_MEMORY : DG_ERROR_BACKEND;
    snprintf(b->message, sizeof b->message, "CUDA, in %s: %s", operation, cudaGetErrorString(e));
}

dg_status allocation_failure(cudaError_t e, uint64_t bytes, dg_error *error) {
    size_t free_bytes = 0, total_bytes = 0;
    cudaGetLastError(); /* forgets it: the next call shall not report it again */
    if (e != cudaErrorMemoryAllocation) return dg_fail(error, DG_ERROR_BACKEND, "CUDA: %s", cudaGetErrorString(e));
    cudaMemGetInfo(&free_bytes, &total_bytes);
    return dg_fail(error, DG_ERROR_OUT_OF_MEMORY,
                   "%.2f GiB more are needed on the GPU, of which %.2f GiB are free: use a shorter context, a smaller "
                   "batch, cache type q8_0, or the CPU",
                   (double)bytes / (1 << 30), (double)free_bytes / (1 << 30));
}

/* ---- Memory --------------------------------------------------------------------------------------------------- */

void free_backend(dg_backend *b) {
    if (b->queue.stream != nullptr) {
        cudaStreamSynchronize(b->queue.stream);
        cudaStreamDestroy(b->queue.stream);
    }
    cudaFree(b->scratch);
    cudaGetLastError();
    delete b;
}

dg_status create(const dg_backend_params *params, dg_backend **out, dg_error *error) {
    dg_backend *b = new (std::nothrow) dg_backend();
    *out = nullptr;
    if (b == nullptr) return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory for a session on the GPU");
    b->params = *params;
    b->model = params->model;
    b->device = (const DeviceModel *)params->model->backend_data;
    b->queue.n_multiprocessors = b->device->n_multiprocessors;
    const uint64_t bytes = scratch_bytes(params);
    cudaError_t e = cudaStreamCreateWithFlags(&b->queue.stream, cudaStreamNonBlocking);
    if (e == cudaSuccess) e = cudaMalloc((void **)&b->scratch, bytes);
    if (e != cudaSuccess) {
        free_backend(b);
        return allocation_failure(e, bytes, error);
    }
    lay_out(params, b->queue.n_multiprocessors, b->scratch, b);
    *out = b;
    return DG_OK;
}

dg_status allocate(dg_backend *b, uint64_t n_bytes, void **memory, dg_error *error) {
    cudaError_t e = cudaMalloc(memory, n_bytes);
    if (e == cudaSuccess) e = cudaMemsetAsync(*memory, 0, n_bytes, b->queue.stream);
    if (e == cudaSuccess) return DG_OK;
    *memory = nullptr;
    return allocation_failure(e, n_bytes, error);
}

void release(dg_backend *b, void *memory) {
    cudaStreamSynchronize(b->queue.stream);
    cudaFree(memory);
    cudaGetLastError();
}

void upload(dg_backend *b, void *memory, const void *host_data, uint64_t n_bytes) {
    if (!usable(b)) return;
    cudaMemcpyAsync(memory, host_data, n_bytes, cudaMemcpyHostToDevice, b->queue.stream);
    note_failure(b, "upload");
}

void download(dg_backend *b, void *host_data, const void *memory, uint64_t n_bytes) {
    if (!usable(b)) return;
    cudaMemcpyAsync(host_data, memory, n_bytes, cudaMemcpyDeviceToHost, b->queue.stream);
    note_failure(b, "download");
}

/* ---- Layers --------------------------------------------------------------------------------------------------- */

bool is_integer(const dg_weight &w) { return packed_shape(w.type, w.n_rows, w.n_cols).integer; }

/* Activations of rms(x) · norm in the kinds that the weights need. */
PrepareTarget target_for(const Activations &x, const float *norm, const dg_weight *const *weights, int n_weights) {
    PrepareTarget t = {norm, 1.0f, false, false, x};
    for (int i = 0; i < n_weights; i++) (is_integer(*weights[i]) ? t.integer : t.floats) = true;
    return t;
}

Partials product(dg_backend *b, const dg_weight *const *weights, int n_weights, const Activations &x, int n) {
    Partials out = {b->partials, b->partials_floats, 0, 0, 0};
    matmul(b->queue, weights, n_weights, x, n, &out);
    return out;
}

void embed(dg_backend *b, const int32_t *host_ids, int32_t n, float *x) {
    if (!usable(b)) return;
    cudaMemcpyAsync(b->ids, host_ids, (size_t)n * sizeof *host_ids, cudaMemcpyHostToDevice, b->queue.stream);
    embed_rows(b->queue, &b->model->token_embd, b->ids, n, x);
    note_failure(b, "embed");
}

void mlp(dg_backend *b, const dg_mlp *m, const float *x, int32_t n, float *out) {
    if (!usable(b)) return;
    const dg_weight *gate_up[] = {&m->gate, &m->up}, *down[] = {&m->down};
    PrepareTarget target = target_for(b->x, m->norm, gate_up, 2);
    prepare_rows(b->queue, x, n, b->model->n_embd, true, b->model->rms_eps, &target, 1);
    prepare_gated(b->queue, product(b, gate_up, 2, b->x, n), (int)m->gate.n_rows, is_integer(m->down), b->x);
    sum_partials(b->queue, product(b, down, 1, b->x, n), out);
    note_failure(b, "mlp");
}

void add_norm(dg_backend *b, float *x, const float *d, int32_t n) {
    if (!usable(b)) return;
    add_then_norm(b->queue, x, d, n, b->model->n_embd, b->model->rms_eps);
    note_failure(b, "add_norm");
}

void project_qkv(dg_backend *b, const dg_layer *layer, const float *x, int32_t n, int32_t position, float *q,
                 const dg_kv *kv) {
    if (!usable(b)) return;
    const dg_model *model = b->model;
    const dg_weight *weights[3];
    int n_weights = 0;
    if (q != nullptr) weights[n_weights++] = &layer->attn_q;
    weights[n_weights++] = &layer->attn_k;
    if (layer->attn_v.data != nullptr) weights[n_weights++] = &layer->attn_v;
    PrepareTarget target = target_for(b->x, layer->attn_norm, weights, n_weights);
    prepare_rows(b->queue, x, n, model->n_embd, true, model->rms_eps, &target, 1);
    Partials projections = product(b, weights, n_weights, b->x, n);
    QkvTarget out = {layer,
                     b->device->frequencies + (layer - model->layers) * b->device->frequency_stride,
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
    task.scratch = b->attention;
    task.scratch_floats = b->attention_floats;
    attend(b->queue, task);
    note_failure(b, "attend");
}

void project_output(dg_backend *b, const dg_layer *layer, const float *a, int32_t n, float *x) {
    if (!usable(b)) return;
    const dg_weight *weights[] = {&layer->attn_output};
    PrepareTarget target = target_for(b->x, nullptr, weights, 1);
    prepare_rows(b->queue, a, n, (int)layer->attn_output.n_cols, false, 0, &target, 1);
    add_normed(b->queue, product(b, weights, 1, b->x, n), layer->post_attention_norm, b->model->rms_eps, x);
    note_failure(b, "project_output");
}

void moe(dg_backend *b, const dg_moe *m, const float *x, int32_t n, float *out) {
    if (!usable(b)) return;
    const dg_model *model = b->model;
    const dg_weight *gate[] = {m->gate_up.data != nullptr ? &m->gate_up : &m->gate};
    dg_weight router = {};
    router.data = m->router;
    router.type = DG_TYPE_F32;
    router.n_matrices = 1;
    router.n_rows = model->n_experts;
    router.n_cols = model->n_embd;
    const dg_weight *routers[] = {&router};
    PrepareTarget targets[2] = {target_for(b->x, m->norm, gate, 1),
                                target_for(b->router, m->router_scale, routers, 1)};
    targets[1].gain = 1.0f / sqrtf((float)model->n_embd);
    prepare_rows(b->queue, x, n, model->n_embd, true, model->rms_eps, targets, 2);
    MoeTask task = {model, m, b->x, product(b, routers, 1, b->router, n), n, b->moe, out};
    mix_experts(b->queue, task);
    note_failure(b, "moe");
}

void combine_paths(dg_backend *b, const dg_layer *layer, float *x, const float *d, const float *e, int32_t n,
                   float scalar) {
    if (!usable(b)) return;
    combine(b->queue, layer, x, d, e, n, b->model->n_embd, b->model->rms_eps, scalar);
    note_failure(b, "combine");
}

/* ---- Head ----------------------------------------------------------------------------------------------------- */

/* The head's task for rows [first, first + n) of x; prepares their activations unless x is NULL. */
HeadTask head_task(dg_backend *b, const float *x, int first, int n, float *soft) {
    const dg_model *model = b->model;
    HeadTask task = {model, b->x, n, 1.0f, b->params.soft_embedding_bound, b->head, nullptr};
    if (soft != nullptr) task.soft = soft + (int64_t)first * model->n_embd;
    if (x != nullptr) {
        const dg_weight *weights[] = {&model->token_embd};
        PrepareTarget target = target_for(b->x, model->output_norm, weights, 1);
        prepare_rows(b->queue, x + (int64_t)first * model->n_embd, n, model->n_embd, true, model->rms_eps, &target, 1);
    }
    return task;
}

int min_int(int a, int b) { return a < b ? a : b; }

void logits(dg_backend *b, const float *x, int32_t n, float *host_logits) {
    const int64_t n_vocab = b->model->n_vocab;
    for (int row = 0; row < n && usable(b); row += b->head_rows) {
        HeadTask task = head_task(b, x, row, min_int(b->head_rows, n - row), nullptr);
        for (int64_t first = 0; first < n_vocab; first += kLogitsChunk) {
            int count = (int)(n_vocab - first < kLogitsChunk ? n_vocab - first : kLogitsChunk);
            chunk_logits(b->queue, task, first, count);
            cudaMemcpy2DAsync(host_logits + row * n_vocab + first, (size_t)n_vocab * sizeof(float), b->head.chunk,
                              kLogitsChunk * sizeof(float), (size_t)count * sizeof(float), (size_t)task.n,
                              cudaMemcpyDeviceToHost, b->queue.stream);
        }
        note_failure(b, "logits");
    }
}

void soft_embedding(dg_backend *b, const float *host_z, int32_t n, float *soft) {
    const int64_t n_vocab = b->model->n_vocab;
    for (int row = 0; row < n && usable(b); row += b->head_rows) {
        HeadTask task = head_task(b, nullptr, row, min_int(b->head_rows, n - row), soft);
        soften_begin(b->queue, task);
        for (int pass = 0; pass < 2; pass++) /* statistics, then sums */
            for (int64_t first = 0; first < n_vocab; first += kGivenChunk) {
                int count = (int)(n_vocab - first < kGivenChunk ? n_vocab - first : kGivenChunk);
                cudaMemcpy2DAsync(given_chunk(task), kGivenChunk * sizeof(float), host_z + row * n_vocab + first,
                                  (size_t)n_vocab * sizeof(float), (size_t)count * sizeof(float), (size_t)task.n,
                                  cudaMemcpyHostToDevice, b->queue.stream);
                if (pass == 0)
                    soften_statistics(b->queue, task, count);
                else
                    soften_add(b->queue, task, first, count);
            }
        soften_end(b->queue, task);
        note_failure(b, "soft_embedding");
    }
}

void sample(dg_backend *b, const float *x, int32_t n, float temperature, const float *host_uniforms,
            const dg_head_result *result, float *soft) {
    const cudaStream_t stream = b->queue.stream;
    for (int row = 0; row < n && usable(b); row += b->head_rows) {
        HeadTask task = head_task(b, x, row, min_int(b->head_rows, n - row), soft);
        const size_t bytes = (size_t)task.n * 4;
        task.temperature = temperature;
        cudaMemcpyAsync(b->head.uniforms, host_uniforms + row, bytes, cudaMemcpyHostToDevice, stream);
        sample_head(b->queue, task);
        cudaMemcpyAsync(result->host_argmax + row, b->head.argmax, bytes, cudaMemcpyDeviceToHost, stream);
        cudaMemcpyAsync(result->host_candidates + row, b->head.candidates, bytes, cudaMemcpyDeviceToHost, stream);
        cudaMemcpyAsync(result->host_entropies + row, b->head.entropies, bytes, cudaMemcpyDeviceToHost, stream);
        note_failure(b, "sample");
    }
}

dg_status finish(dg_backend *b, dg_error *error) {
    cudaStreamSynchronize(b->queue.stream);
    note_failure(b, "a kernel");
    dg_status status = b->status;
    b->status = DG_OK;
    if (status == DG_OK) return DG_OK;
    return dg_fail(error, status, "%s", b->message);
}

const dg_backend_ops kOperations = {
    load_model,     unload_model, scratch_bytes, create,  free_backend, allocate,       release, upload,
    download,       embed,        mlp,           add_norm, project_qkv, attend_spans,   project_output,
    moe,            combine_paths, logits,       soft_embedding,        sample,         finish,
};

/* Why no device can be used, into `note`; false where one can. */
bool find_obstacle(char *note, size_t note_size) {
    int driver = 0, runtime = 0, n_devices = 0;
    cudaDeviceProp properties;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    cudaError_t e = cudaGetDeviceCount(&n_devices);
    if (e == cudaSuccess && n_devices > 0) e = cudaGetDeviceProperties(&properties, 0);
    cudaGetLastError();
    if (driver == 0)
        snprintf(note, note_size, "no NVIDIA driver is installed");
    else if (e == cudaErrorInsufficientDriver)
        snprintf(note, note_size, "the NVIDIA driver supports CUDA %d.%d; %d.%d or later is needed: update the driver",
                 driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    else if (e != cudaSuccess || n_devices == 0)
        snprintf(note, note_size, "no GPU: %s", e != cudaSuccess ? cudaGetErrorString(e) : "none found");
    else if (properties.major < 8)
        snprintf(note, note_size, "%.60s has compute capability %d.%d; 8.0 (Ampere) or later is needed",
                 properties.name, properties.major, properties.minor);
    else
        return false;
    return true;
}

} // namespace

/* What the engine looks up in the shared object (cuda_loader.c). `model_bytes` and `ops_bytes` are the sizes of the
 * engine's structs: a library of another version is refused. NULL, and a reason in `note`, where it cannot be used. */
extern "C" __attribute__((visibility("default"))) const dg_backend_ops *
dg_cuda_backend(size_t model_bytes, size_t ops_bytes, char *note, size_t note_size) {
    if (model_bytes != sizeof(dg_model) || ops_bytes != sizeof(dg_backend_ops)) {
        snprintf(note, note_size, "the CUDA library is of another version of dgemma");
        return nullptr;
    }
    return find_obstacle(note, note_size) ? nullptr : &kOperations;
}

/* Bytes of device memory that the weights of a model, bound but not loaded, will take. */
extern "C" __attribute__((visibility("default"))) uint64_t dg_cuda_weight_bytes(const dg_model *model) {
    return predicted_weight_bytes(model);
}
