/* A model's weights in device memory: planned, allocated as one piece, uploaded through pinned memory, and repacked there
 * into the tiles of formats.cuh. */
#include "weights.cuh"

#include <algorithm>
#include <new>
#include <vector>

#include <math.h>
#include <stdio.h>
#include <string.h>

namespace {

constexpr uint64_t kAlignment = 256;
constexpr uint64_t kStagingBytes = 32 << 20; /* of each of the two buffers */

uint64_t align_up(uint64_t n) { return (n + kAlignment - 1) / kAlignment * kAlignment; }

/* One thing to be uploaded, and the pointer that will name it. */
struct Item {
    const void **pointer;
    int32_t type;
    int64_t n_matrices, n_rows, n_cols;
    uint64_t row_bytes; /* in the file; 0: a float vector of n_cols, copied as it is */
    uint64_t matrix_bytes;
    uint64_t offset, bytes; /* in the arena */
    const char *what;
};

class Plan {
  public:
    std::vector<Item> items;
    uint64_t bytes = 0;

    void matrix(const char *what, const void **pointer, int32_t type, int64_t n_matrices, int64_t n_rows,
                int64_t n_cols, uint64_t matrix_bytes) {
        PackedShape shape = packed_shape(type, n_rows, n_cols);
        add({pointer, type, n_matrices, n_rows, n_cols, matrix_bytes / (uint64_t)n_rows, matrix_bytes, 0,
             shape.bytes * (uint64_t)n_matrices, what});
    }

    void vector(const float **pointer, int64_t n) {
        if (*pointer == nullptr) return;
        add({(const void **)pointer, DG_TYPE_F32, 1, 1, n, 0, (uint64_t)n * sizeof(float), 0,
             (uint64_t)n * sizeof(float), "vector"});
    }

    void weight(const char *what, dg_weight *w) {
        if (w->data == nullptr) return;
        matrix(what, &w->data, w->type, w->n_matrices, w->n_rows, w->n_cols, w->matrix_bytes);
        vector(&w->scale, w->n_matrices);
    }

    void mlp(dg_mlp *m, int64_t n_embd) {
        vector(&m->norm, n_embd);
        weight("the gate of an MLP", &m->gate);
        weight("the up projection of an MLP", &m->up);
        weight("the down projection of an MLP", &m->down);
    }

  private:
    void add(Item item) {
        item.offset = bytes;
        items.push_back(item);
        bytes += align_up(item.bytes);
    }
};

void plan_layer(Plan *plan, const dg_model *model, dg_layer *layer) {
    const int64_t n_embd = model->n_embd;
    plan->vector(&layer->attn_norm, n_embd);
    plan->weight("attn_q", &layer->attn_q);
    plan->weight("attn_k", &layer->attn_k);
    plan->weight("attn_v", &layer->attn_v);
    plan->vector(&layer->attn_q_norm, layer->head_dim);
    plan->vector(&layer->attn_k_norm, layer->head_dim);
    plan->weight("attn_output", &layer->attn_output);
    plan->vector(&layer->post_attention_norm, n_embd);
    plan->mlp(&layer->mlp, n_embd);
    dg_moe *moe = &layer->moe;
    plan->matrix("the router", (const void **)&moe->router, DG_TYPE_F32, 1, model->n_experts, n_embd,
                 (uint64_t)model->n_experts * (uint64_t)n_embd * sizeof(float));
    plan->vector(&moe->router_scale, n_embd);
    plan->vector(&moe->norm, n_embd);
    plan->weight("the experts' gates and up projections", &moe->gate_up);
    plan->weight("the experts' gates", &moe->gate);
    plan->weight("the experts' up projections", &moe->up);
    plan->weight("the experts' down projections", &moe->down);
    plan->vector(&moe->expert_scale, model->n_experts);
    plan->vector(&layer->post_mlp_norm, n_embd);
    plan->vector(&layer->post_moe_norm, n_embd);
    plan->vector(&layer->post_ffn_norm, n_embd);
}

/* The pointers named by the plan are those of `model` and `layers`, which may be copies of the model's own. */
Plan plan_model(dg_model *model, dg_layer *layers) {
    Plan plan;
    plan.weight("token_embd", &model->token_embd);
    plan.vector(&model->output_norm, model->n_embd);
    plan.mlp(&model->self_conditioning, model->n_embd);
    for (int32_t i = 0; i < model->n_layers; i++) plan_layer(&plan, model, &layers[i]);
    return plan;
}

int largest_rotation(const dg_model *model) {
    int largest = 0;
    for (int32_t i = 0; i < model->n_layers; i++) largest = std::max(largest, (int)model->layers[i].n_rot / 2);
    return largest;
}

/* What the kernels cannot do is refused before anything is allocated. */
dg_status check(const dg_model *model, const Plan &plan, dg_error *error) {
    for (const Item &item : plan.items)
        if (item.row_bytes > 0 && !packed_shape(item.type, item.n_rows, item.n_cols).known)
            return dg_fail(error, DG_ERROR_BACKEND,
                           "the CUDA backend does not run tensor type %d (%s): use the CPU, or a file in q4_0, q4_1, "
                           "q5_0, q5_1, q8_0, q4_k, q5_k, q6_k, iq4_nl, nvfp4, f16, bf16 or f32",
                           item.type, item.what);
    if (model->n_embd % 32 != 0 || model->n_ff % 32 != 0 || model->n_ff_expert % 32 != 0)
        return dg_fail(error, DG_ERROR_BACKEND,
                       "the widths %d, %d and %d must be multiples of 32 on the CUDA backend: use the CPU",
                       model->n_embd, model->n_ff, model->n_ff_expert);
    for (int32_t i = 0; i < model->n_layers; i++) {
        const dg_layer *layer = &model->layers[i];
        if (layer->head_dim % 16 != 0 || layer->head_dim > 512 || (model->n_heads * layer->head_dim) % 32 != 0)
            return dg_fail(error, DG_ERROR_BACKEND,
                           "layer %d: head size %d; the CUDA backend runs multiples of 16 up to 512: use the CPU", i,
                           layer->head_dim);
        if (layer->moe.gate_up.data == nullptr && layer->moe.gate.type != layer->moe.up.type)
            return dg_fail(error, DG_ERROR_BACKEND,
                           "layer %d: the experts' gates and up projections have different types: use the CPU", i);
    }
    return DG_OK;
}

/* ---- Upload --------------------------------------------------------------------------------------------------- */

/* Two pinned buffers and their counterparts on the device: one is filled while the other is on its way. */
struct Staging {
    void *host[2] = {nullptr, nullptr};
    void *device[2] = {nullptr, nullptr};
    cudaEvent_t done[2] = {nullptr, nullptr};
    cudaStream_t stream = nullptr;
    int next = 0;

    cudaError_t create() {
        cudaError_t e = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
        for (int i = 0; i < 2 && e == cudaSuccess; i++) {
            e = cudaHostAlloc(&host[i], kStagingBytes, cudaHostAllocDefault);
            if (e == cudaSuccess) e = cudaMalloc(&device[i], kStagingBytes);
            if (e == cudaSuccess) e = cudaEventCreateWithFlags(&done[i], cudaEventDisableTiming);
        }
        return e;
    }
    void destroy() {
        if (stream != nullptr) cudaStreamSynchronize(stream);
        for (int i = 0; i < 2; i++) {
            if (done[i] != nullptr) cudaEventDestroy(done[i]);
            cudaFree(device[i]);
            cudaFreeHost(host[i]);
        }
        if (stream != nullptr) cudaStreamDestroy(stream);
    }
    /* Brings `bytes` ≤ kStagingBytes to the device and returns where they are; the caller then uses them on the stream
     * and calls release. */
    uint8_t *send(const void *data, uint64_t bytes) {
        cudaEventSynchronize(done[next]);
        memcpy(host[next], data, bytes);
        cudaMemcpyAsync(device[next], host[next], bytes, cudaMemcpyHostToDevice, stream);
        return (uint8_t *)device[next];
    }
    void release() {
        cudaEventRecord(done[next], stream);
        next ^= 1;
    }
};

struct Progress {
    const dg_model_params *params;
    uint64_t done, all;
    bool report(uint64_t bytes) {
        done += bytes;
        return params->progress == nullptr || params->progress((float)done / (float)all, params->user);
    }
};

bool upload(const Item &item, char *arena, Staging *staging, Progress *progress) {
    const char *source = (const char *)*item.pointer;
    char *target = arena + item.offset;
    if (item.row_bytes == 0) {
        for (uint64_t done = 0; done < item.bytes; done += kStagingBytes) {
            uint64_t bytes = std::min(kStagingBytes, item.bytes - done);
            uint8_t *raw = staging->send(source + done, bytes);
            cudaMemcpyAsync(target + done, raw, bytes, cudaMemcpyDeviceToDevice, staging->stream);
            staging->release();
        }
        return progress->report(item.bytes);
    }
    PackedShape shape = packed_shape(item.type, item.n_rows, item.n_cols);
    int64_t rows_at_once = std::max((int64_t)(kStagingBytes / item.row_bytes) / kTileRows, (int64_t)1) * kTileRows;
    for (int64_t matrix = 0; matrix < item.n_matrices; matrix++)
        for (int64_t row = 0; row < item.n_rows; row += rows_at_once) {
            int64_t n_rows = std::min(rows_at_once, item.n_rows - row);
            uint64_t bytes = (uint64_t)n_rows * item.row_bytes;
            uint8_t *raw = staging->send(
                source + (uint64_t)matrix * item.matrix_bytes + (uint64_t)row * item.row_bytes, bytes);
            pack_rows(item.type, raw, item.row_bytes, n_rows, item.n_cols,
                      target + (uint64_t)matrix * shape.bytes + (uint64_t)(row / kTileRows) * shape.row_tile_bytes,
                      staging->stream);
            staging->release();
            if (!progress->report(bytes)) return false;
        }
    return true;
}

/* Rotation frequencies of all layers, (n_layers, stride): rope_base^(−2i/head_dim). */
std::vector<float> rotation_frequencies(const dg_model *model, int stride) {
    std::vector<float> frequencies((size_t)model->n_layers * (size_t)stride, 0.0f);
    for (int32_t l = 0; l < model->n_layers; l++)
        for (int i = 0; i < model->layers[l].n_rot / 2; i++)
            frequencies[(size_t)l * (size_t)stride + (size_t)i] =
                (float)pow((double)model->layers[l].rope_base, -2.0 * i / model->layers[l].head_dim);
    return frequencies;
}

dg_status load(dg_model *model, const dg_model_params *params, dg_error *error) {
    /* The new pointers are made in copies, so that the model stays whole if anything fails. */
    dg_model moved_model = {};
    moved_model.n_layers = model->n_layers;
    moved_model.n_embd = model->n_embd;
    moved_model.n_experts = model->n_experts;
    moved_model.token_embd = model->token_embd;
    moved_model.output_norm = model->output_norm;
    moved_model.self_conditioning = model->self_conditioning;
    std::vector<dg_layer> moved_layers(model->layers, model->layers + model->n_layers);
    Plan plan = plan_model(&moved_model, moved_layers.data());
    DG_TRY(check(model, plan, error));

    DeviceModel *device = new DeviceModel();
    device->frequency_stride = largest_rotation(model);
    std::vector<float> frequencies = rotation_frequencies(model, device->frequency_stride);
    const uint64_t frequency_offset = plan.bytes;
    device->bytes = plan.bytes + align_up(frequencies.size() * sizeof(float));
    cudaDeviceProp properties;
    Staging staging;
    dg_status status = DG_OK;
    size_t free_bytes = 0, total_bytes = 0;
    cudaError_t e = cudaGetDeviceProperties(&properties, 0);
    if (e == cudaSuccess) e = cudaMemGetInfo(&free_bytes, &total_bytes);
    if (e == cudaSuccess) {
        device->n_multiprocessors = properties.multiProcessorCount;
        e = cudaMalloc((void **)&device->arena, device->bytes);
    }
    if (e == cudaSuccess) e = staging.create();
    if (e == cudaErrorMemoryAllocation) {
        status = dg_fail(error, DG_ERROR_OUT_OF_MEMORY,
                         "the weights need %.2f GiB on the GPU, of which %.2f GiB are free: close other programs, use a "
                         "smaller file, or the CPU",
                         (double)(device->bytes + 2 * kStagingBytes) / (1 << 30), (double)free_bytes / (1 << 30));
    } else if (e != cudaSuccess) {
        status = dg_fail(error, DG_ERROR_BACKEND, "CUDA: %s", cudaGetErrorString(e));
    } else {
        Progress progress = {params, 0, 0};
        for (const Item &item : plan.items)
            progress.all += item.row_bytes == 0 ? item.bytes : item.matrix_bytes * (uint64_t)item.n_matrices;
        for (const Item &item : plan.items) {
            if (!upload(item, device->arena, &staging, &progress)) {
                status = dg_fail(error, DG_ERROR_CANCELLED, "loading was cancelled by the progress callback");
                break;
            }
            *item.pointer = device->arena + item.offset;
        }
        device->frequencies = (float *)(device->arena + frequency_offset);
        cudaMemcpyAsync(device->frequencies, frequencies.data(), frequencies.size() * sizeof(float),
                        cudaMemcpyHostToDevice, staging.stream);
        e = cudaStreamSynchronize(staging.stream);
        if (e == cudaSuccess) e = cudaGetLastError();
        if (e != cudaSuccess && status == DG_OK)
            status = dg_fail(error, DG_ERROR_BACKEND, "CUDA, while the weights were loaded: %s", cudaGetErrorString(e));
    }
    staging.destroy();
    if (status != DG_OK) {
        cudaFree(device->arena);
        delete device;
        cudaGetLastError(); /* forgets the failure: it has been reported */
        return status;
    }
    model->token_embd = moved_model.token_embd;
    model->output_norm = moved_model.output_norm;
    model->self_conditioning = moved_model.self_conditioning;
    std::copy(moved_layers.begin(), moved_layers.end(), model->layers);
    model->backend_data = device;
    snprintf(model->backend_name, sizeof model->backend_name, "cuda (%.40s, sm_%d%d)", properties.name,
             properties.major, properties.minor);
    return DG_OK;
}

} // namespace

dg_status load_model(dg_model *model, const dg_model_params *params, dg_error *error) {
    try {
        return load(model, params, error);
    } catch (const std::bad_alloc &) {
        return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory to plan the weights on the GPU");
    }
}

void unload_model(dg_model *model) {
    DeviceModel *device = (DeviceModel *)model->backend_data;
    if (device == nullptr) return;
    cudaFree(device->arena);
    delete device;
    model->backend_data = nullptr;
}

uint64_t predicted_weight_bytes(const dg_model *model) {
    dg_model copy = {};
    copy.n_layers = model->n_layers;
    copy.n_embd = model->n_embd;
    copy.n_experts = model->n_experts;
    copy.token_embd = model->token_embd;
    copy.output_norm = model->output_norm;
    copy.self_conditioning = model->self_conditioning;
    std::vector<dg_layer> layers(model->layers, model->layers + model->n_layers);
    uint64_t frequencies = (uint64_t)model->n_layers * (uint64_t)largest_rotation(model) * sizeof(float);
    return plan_model(&copy, layers.data()).bytes + align_up(frequencies);
}
