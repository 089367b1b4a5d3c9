/* A session on the GPU: its memory, the head, the canvas under way, and steps as graphs. The operations of layers are
 * in layers.cu. */
#include "cuda/backend.cuh"

#include "cuda/device_info.cuh"

#include <math.h>
#include <new>
#include <stdio.h>
#include <string.h>

/* ---- Failures ------------------------------------------------------------------------------------------------- */

void keep_failure(dg_backend *b, cudaError_t e, const char *operation) {
    if (e == cudaSuccess || b->status != DG_OK) return;
    b->status = e == cudaErrorMemoryAllocation ? DG_ERROR_OUT_OF_MEMORY : DG_ERROR_BACKEND;
    snprintf(b->message, sizeof b->message, "CUDA, in %s: %s", operation, cudaGetErrorString(e));
}

/* Whether an operation may go ahead, which then goes to the session's device. */
bool usable(dg_backend *b) {
    if (b->status == DG_OK) keep_failure(b, cudaSetDevice(b->device->number), "choosing the device");
    return b->status == DG_OK;
}

/* Keeps the first failure of the launches since the last call. */
void note_failure(dg_backend *b, const char *operation) {
    cudaError_t e = cudaGetLastError();
    if (b->captured.capturing()) {
        if (e != cudaSuccess) b->captured.give_up(); /* the step will be launched plainly */
        return;
    }
    keep_failure(b, e, operation);
}

namespace {

uint64_t scratch_bytes(const dg_backend_params *params) {
    const DeviceModel *device = device_model(params->model, params->place);
    dg_cuda_scratch counted;
    return dg_cuda_lay_out_scratch(params, device->n_multiprocessors, nullptr, &counted);
}

dg_status allocation_failure(cudaError_t e, uint64_t bytes, dg_error *error) {
    size_t free_bytes = 0, total_bytes = 0;
    cudaGetLastError(); /* forgets it: the next call shall not report it again */
    if (e != cudaErrorMemoryAllocation) return dg_fail(error, DG_ERROR_BACKEND, "CUDA: %s", cudaGetErrorString(e));
    cudaMemGetInfo(&free_bytes, &total_bytes);
    cudaGetLastError();
    return dg_fail(error, DG_ERROR_OUT_OF_MEMORY,
                   "%.2f GiB more are needed on the GPU, of which %.2f GiB are free: use a shorter context, a smaller "
                   "batch, cache type q8_0, fewer layers or experts on the GPU, or the CPU",
                   (double)bytes / (1 << 30), (double)free_bytes / (1 << 30));
}

/* ---- Memory --------------------------------------------------------------------------------------------------- */

void free_backend(dg_backend *b) {
    cudaSetDevice(b->device->number);
    b->captured.forget();
    if (b->queue.stream != nullptr) {
        cudaStreamSynchronize(b->queue.stream);
        cudaStreamDestroy(b->queue.stream);
    }
    if (b->reached != nullptr) cudaEventDestroy(b->reached);
    cudaFree(b->memory);
    cudaFreeHost(b->pinned);
    cudaGetLastError();
    delete b;
}

dg_status create(const dg_backend_params *params, dg_backend **out, dg_error *error) {
    dg_backend *b = new (std::nothrow) dg_backend();
    *out = nullptr;
    if (b == nullptr) return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory for a session on the GPU");
    b->params = *params;
    b->model = params->model;
    b->device = device_model(params->model, params->place);
    b->queue.n_multiprocessors = b->device->n_multiprocessors;
    const uint64_t bytes = scratch_bytes(params);
    const int32_t n_canvas = params->model->canvas_length;
    const uint64_t canvas_bytes = dg_cuda_lay_out_canvas(n_canvas, nullptr, nullptr);
    cudaError_t e = cudaSetDevice(b->device->number);
    if (e == cudaSuccess) e = cudaStreamCreateWithFlags(&b->queue.stream, cudaStreamNonBlocking);
    if (e == cudaSuccess) e = cudaEventCreateWithFlags(&b->reached, cudaEventDisableTiming);
    if (e == cudaSuccess)
        e = cudaHostAlloc((void **)&b->pinned, canvas_bytes + (size_t)params->max_rows * sizeof(int32_t),
                          cudaHostAllocDefault);
    if (e == cudaSuccess) e = cudaMalloc((void **)&b->memory, bytes);
    if (e != cudaSuccess) {
        free_backend(b);
        return allocation_failure(e, bytes, error);
    }
    dg_cuda_lay_out_scratch(params, b->queue.n_multiprocessors, b->memory, &b->scratch);
    b->queue.hopper = b->device->hopper && b->scratch.x.halves != nullptr;
    dg_cuda_lay_out_canvas(n_canvas, b->pinned, &b->host.canvas);
    b->host.ids = (int32_t *)(b->pinned + canvas_bytes);
    *out = b;
    return DG_OK;
}

dg_status allocate(dg_backend *b, int32_t, uint64_t n_bytes, void **memory, dg_error *error) {
    *memory = nullptr;
    cudaError_t e = cudaSetDevice(b->device->number);
    if (e == cudaSuccess) e = cudaMalloc(memory, n_bytes);
    if (e == cudaSuccess) e = cudaMemsetAsync(*memory, 0, n_bytes, b->queue.stream);
    if (e == cudaSuccess) return DG_OK;
    cudaFree(*memory);
    *memory = nullptr;
    return allocation_failure(e, n_bytes, error);
}

void release(dg_backend *b, void *memory) {
    cudaSetDevice(b->device->number);
    cudaStreamSynchronize(b->queue.stream);
    cudaFree(memory);
    cudaGetLastError();
}

void upload(dg_backend *b, void *memory, const void *host_data, uint64_t n_bytes) {
    if (!usable(b)) return;
    b->held.complete(b->queue);
    b->held.forget_prepared();
    cudaMemcpyAsync(memory, host_data, n_bytes, cudaMemcpyHostToDevice, b->queue.stream);
    note_failure(b, "upload");
}

void download(dg_backend *b, void *host_data, const void *memory, uint64_t n_bytes) {
    if (!usable(b)) return;
    b->held.complete(b->queue);
    cudaMemcpyAsync(host_data, memory, n_bytes, cudaMemcpyDeviceToHost, b->queue.stream);
    note_failure(b, "download");
}

/* `to` begins when `from` has come here, and `from` goes on when the copy is done: neither may write over what the
 * other has yet to read. */
void send(dg_backend *from, const void *memory, dg_backend *to, void *to_memory, uint64_t n_bytes) {
    if (!usable(from)) return;
    from->held.complete(from->queue);
    cudaEventRecord(from->reached, from->queue.stream);
    note_failure(from, "sending to another GPU");
    if (!usable(to)) return;
    to->held.complete(to->queue);
    to->held.forget_prepared();
    cudaStreamWaitEvent(to->queue.stream, from->reached, 0);
    cudaMemcpyPeerAsync(to_memory, to->device->number, memory, from->device->number, n_bytes, to->queue.stream);
    cudaEventRecord(to->reached, to->queue.stream);
    note_failure(to, "receiving from another GPU");
    cudaStreamWaitEvent(from->queue.stream, to->reached, 0);
    note_failure(from, "sending to another GPU");
}

/* ---- Head ----------------------------------------------------------------------------------------------------- */

/* The head's task for n rows of x; prepares their activations unless x is NULL. */
HeadTask head_task(dg_backend *b, const float *x, int n, float *soft) {
    const dg_model *model = b->model;
    const DeviceWeight embedding = b->device->weight(model->token_embd);
    b->held.complete(b->queue);
    if (x != nullptr) prepare_head(b, x, n);
    return {model,           embedding,         b->scratch.x, n, b->params.soft_embedding_bound,
            b->scratch.head, b->scratch.canvas, soft};
}

void logits(dg_backend *b, const float *x, int32_t n, float *host_logits) {
    if (!usable(b)) return;
    const int64_t n_vocab = b->model->n_vocab;
    HeadTask task = head_task(b, x, n, nullptr);
    for (int64_t first = 0; first < n_vocab; first += kLogitsChunk) {
        int count = (int)(n_vocab - first < kLogitsChunk ? n_vocab - first : kLogitsChunk);
        chunk_logits(b->queue, task, first, count);
        cudaMemcpy2DAsync(host_logits + first, (size_t)n_vocab * sizeof(float), b->scratch.head.chunk,
                          kLogitsChunk * sizeof(float), (size_t)count * sizeof(float), (size_t)n,
                          cudaMemcpyDeviceToHost, b->queue.stream);
    }
    note_failure(b, "logits");
}

void soft_embedding(dg_backend *b, const float *host_z, int32_t n, float *soft) {
    if (!usable(b)) return;
    const int64_t n_vocab = b->model->n_vocab;
    HeadTask task = head_task(b, nullptr, n, soft);
    soften_begin(b->queue, task);
    for (int pass = 0; pass < 2; pass++) /* statistics, then sums */
        for (int64_t first = 0; first < n_vocab; first += kGivenChunk) {
            int count = (int)(n_vocab - first < kGivenChunk ? n_vocab - first : kGivenChunk);
            cudaMemcpy2DAsync(given_chunk(task), kGivenChunk * sizeof(float), host_z + first,
                              (size_t)n_vocab * sizeof(float), (size_t)count * sizeof(float), (size_t)n,
                              cudaMemcpyHostToDevice, b->queue.stream);
            if (pass == 0)
                soften_statistics(b->queue, task, count);
            else
                soften_add(b->queue, task, first, count);
        }
    soften_end(b->queue, task);
    note_failure(b, "soft_embedding");
}

/* ---- Canvas --------------------------------------------------------------------------------------------------- */

void begin_canvas(dg_backend *b, dg_canvas *host_canvas) {
    if (!usable(b)) return;
    const dg_canvas &from = *host_canvas;
    const dg_cuda_canvas &to = b->host.canvas; /* the last use of it has ended, as with token ids */
    const size_t row = (size_t)from.rules.n * sizeof(int32_t);
    b->canvas = host_canvas;
    *to.rules = from.rules;
    *to.progress = from.progress;
    memcpy(to.pinned, from.pinned, row);
    memcpy(to.ids, from.ids, row);
    memcpy(to.draft, from.draft, row);
    memcpy(to.entropies, from.entropies, row);
    cudaMemcpyAsync(b->scratch.canvas.rules, to.rules, (size_t)((char *)to.argmax - (char *)to.rules),
                    cudaMemcpyHostToDevice, b->queue.stream);
    note_failure(b, "begin_canvas");
}

/* Replayed draws come step by step, beside the graph: only tests have them. */
void bring_replayed_draws(dg_backend *b) {
    const dg_canvas &canvas = *b->canvas;
    if (!canvas.rules.replayed) return;
    const int64_t n = canvas.rules.n, first = canvas.progress.step * n;
    const size_t row = (size_t)n * sizeof(int32_t);
    int32_t *to = b->scratch.canvas.replayed;
    cudaMemcpyAsync(to, canvas.noise->candidates + first, row, cudaMemcpyHostToDevice, b->queue.stream);
    cudaMemcpyAsync(to + n, canvas.noise->renoise + first, row, cudaMemcpyHostToDevice, b->queue.stream);
    note_failure(b, "denoise");
}

void denoise(dg_backend *b, const float *x, float *soft) {
    if (!usable(b)) return;
    const int n = b->model->canvas_length;
    const dg_cuda_canvas &from = b->scratch.canvas;
    if (!b->captured.capturing()) bring_replayed_draws(b);
    sample_head(b->queue, head_task(b, x, n, soft));
    settle(b->queue, from, n);
    cudaMemcpyAsync(b->host.canvas.progress, from.progress, (size_t)((char *)from.argmax - (char *)from.progress),
                    cudaMemcpyDeviceToHost, b->queue.stream);
    b->settled = true;
    note_failure(b, "denoise");
}

/* What a step has made of the canvas, from pinned memory. */
void fetch_canvas(dg_backend *b) {
    const dg_cuda_canvas &from = b->host.canvas;
    dg_canvas *to = b->canvas;
    const size_t row = (size_t)to->rules.n * sizeof(int32_t);
    to->progress = *from.progress;
    memcpy(to->ids, from.ids, row);
    memcpy(to->draft, from.draft, row);
    memcpy(to->entropies, from.entropies, row);
}

/* ---- A step as one graph -------------------------------------------------------------------------------------- */

/* All but the first and the last step of a canvas are the same work: the first is not conditioned, and nothing follows
 * the last. They are plain launches, so that every kernel has been loaded before capturing begins. */
dg_step_kind begin_step(dg_backend *b, const dg_step *step) {
    if (!usable(b) || !step->conditioned || !step->soft) return DG_STEP_PLAIN;
    bring_replayed_draws(b);
    if (!b->captured.holds(step->position))
        return b->captured.begin(b->queue.stream, step->position) ? DG_STEP_CAPTURED : DG_STEP_PLAIN;
    b->settled = true;
    keep_failure(b, b->captured.launch(b->queue.stream), "a denoising step");
    return DG_STEP_LAUNCHED;
}

bool end_step(dg_backend *b) {
    if (!b->captured.end(b->queue.stream)) return false;
    keep_failure(b, b->captured.launch(b->queue.stream), "a denoising step");
    return true;
}

dg_status finish(dg_backend *b, dg_error *error) {
    usable(b);
    if (b->captured.capturing()) { /* cancelled in the middle of a step */
        b->captured.abandon(b->queue.stream);
        b->held.forget();
    }
    if (usable(b)) b->held.complete(b->queue);
    b->held.forget();
    keep_failure(b, cudaStreamSynchronize(b->queue.stream), "a kernel");
    note_failure(b, "a kernel");
    collect_launch_times();
    dg_status status = b->status;
    b->status = DG_OK;
    const bool settled = b->settled;
    b->settled = false;
    if (status != DG_OK) return dg_fail(error, status, "%s", b->message);
    if (settled) fetch_canvas(b);
    return DG_OK;
}

} // namespace

/* In the order of the struct: C++17 has no designated initialisers. */
const dg_backend_ops dg_cuda_operations = {
    list_gpus,      gpu_memory,   load_model,   unload_model,   scratch_bytes, create,        free_backend,
    allocate,       release,      upload,       download,       send,          embed,         mlp,
    add_norm,       project_qkv,  attend_spans, project_output, moe,           combine_paths, logits,
    soft_embedding, begin_canvas, denoise,      begin_step,     end_step,      finish,        nullptr,
};
