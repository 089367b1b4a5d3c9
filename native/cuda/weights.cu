/* A model's weights in device memory: planned, allocated as one piece, uploaded through pinned memory, and repacked
 * there into the tiles of formats.cuh. */
#include "cuda/weights.cuh"

#include "cuda/hopper/hopper.cuh"

#include <algorithm>
#include <new>
#include <vector>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace {

/* The arena's plan, which frees itself. */
struct Plan : dg_cuda_weights {
    Plan() : dg_cuda_weights() {}
    ~Plan() { free(items); }
    Plan(const Plan &) = delete;
    Plan &operator=(const Plan &) = delete;
    const dg_cuda_item *begin() const { return items; }
    const dg_cuda_item *end() const { return items + n; }
};

/* Types that the CPU runs and this backend does not. */
const char *name_of(int32_t type) {
    switch (type) {
    case DG_TYPE_IQ2_XXS:
        return "iq2_xxs";
    case DG_TYPE_IQ2_XS:
        return "iq2_xs";
    case DG_TYPE_IQ2_S:
        return "iq2_s";
    case DG_TYPE_IQ3_XXS:
        return "iq3_xxs";
    case DG_TYPE_IQ3_S:
        return "iq3_s";
    default:
        return "unknown";
    }
}

/* What the kernels cannot do is refused before anything is allocated. */
dg_status check(const dg_model *model, const Plan &plan, dg_error *error) {
    for (const dg_cuda_item &item : plan)
        if (item.row_bytes > 0 && !packed_shape(item.stored_type, item.n_rows, item.n_cols).known)
            return dg_fail(
                error, DG_ERROR_BACKEND,
                "the CUDA backend does not run tensor type %s (%d, of %s): use the CPU, or a file in q4_0, q4_1, "
                "q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k, iq4_nl, iq4_xs, nvfp4, f16, bf16 or f32",
                name_of(item.type), item.type, item.what);
    if (model->n_embd % 32 != 0 || model->n_ff % 32 != 0 || model->n_ff_expert % 32 != 0)
        return dg_fail(error, DG_ERROR_BACKEND,
                       "the widths %d, %d and %d must be multiples of 32 on the CUDA backend: use the CPU",
                       model->n_embd, model->n_ff, model->n_ff_expert);
    const int widest = std::max(model->n_embd, model->n_ff);
    if (widest > kMaxRowColumns)
        return dg_fail(error, DG_ERROR_BACKEND, "a width of %d; the CUDA backend takes at most %d: use the CPU", widest,
                       kMaxRowColumns);
    if (model->canvas_length > kMaxCanvas)
        return dg_fail(error, DG_ERROR_BACKEND, "a canvas of %d tokens; the CUDA backend takes at most %d: use the CPU",
                       model->canvas_length, kMaxCanvas);
    for (int32_t i = 0; i < model->n_layers; i++) {
        const dg_layer *layer = &model->layers[i];
        if (layer->place == DG_PLACE_CPU) continue;
        if (model->n_heads * layer->head_dim > kMaxRowColumns)
            return dg_fail(error, DG_ERROR_BACKEND,
                           "layer %d: %d heads of %d; the CUDA backend takes at most %d columns: use the CPU", i,
                           model->n_heads, layer->head_dim, kMaxRowColumns);
        if (layer->head_dim % 16 != 0 || layer->head_dim > 512 || (model->n_heads * layer->head_dim) % 32 != 0)
            return dg_fail(error, DG_ERROR_BACKEND,
                           "layer %d: head size %d; the CUDA backend runs multiples of 16 up to 512: use the CPU", i,
                           layer->head_dim);
        if (layer->moe.place != DG_PLACE_CPU && layer->moe.gate_up.data == nullptr &&
            layer->moe.gate.type != layer->moe.up.type)
            return dg_fail(error, DG_ERROR_BACKEND,
                           "layer %d: the experts' gates and up projections have different types: use the CPU", i);
    }
    return DG_OK;
}

/* ---- Upload --------------------------------------------------------------------------------------------------- */

/* Two pinned buffers and their counterparts on the device: one is filled while the other is on its way. */
class Staging {
  public:
    cudaStream_t stream = nullptr;

    cudaError_t create() {
        cudaError_t e = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
        for (int i = 0; i < 2 && e == cudaSuccess; i++) {
            e = cudaHostAlloc(&host[i], DG_CUDA_STAGING_BYTES, cudaHostAllocDefault);
            if (e == cudaSuccess) e = cudaMalloc(&device[i], DG_CUDA_STAGING_BYTES);
            if (e == cudaSuccess) e = cudaEventCreateWithFlags(&done[i], cudaEventDisableTiming);
        }
        return e;
    }
    ~Staging() {
        if (stream != nullptr) cudaStreamSynchronize(stream);
        for (int i = 0; i < 2; i++) {
            if (done[i] != nullptr) cudaEventDestroy(done[i]);
            cudaFree(device[i]);
            cudaFreeHost(host[i]);
        }
        if (stream != nullptr) cudaStreamDestroy(stream);
    }
    /* Brings `bytes` ≤ DG_CUDA_STAGING_BYTES to the device, calls use(where they are), which enqueues work on the
     * stream, and returns before that is done. */
    template <class Use> cudaError_t send(const void *data, uint64_t bytes, Use use) {
        cudaError_t e = cudaEventSynchronize(done[next]);
        if (e != cudaSuccess) return e;
        memcpy(host[next], data, bytes);
        e = cudaMemcpyAsync(device[next], host[next], bytes, cudaMemcpyHostToDevice, stream);
        if (e == cudaSuccess) {
            use((const uint8_t *)device[next]);
            e = cudaGetLastError();
        }
        if (e == cudaSuccess) e = cudaEventRecord(done[next], stream);
        next ^= 1;
        return e;
    }

  private:
    void *host[2] = {nullptr, nullptr};
    void *device[2] = {nullptr, nullptr};
    cudaEvent_t done[2] = {nullptr, nullptr};
    int next = 0;
};

struct Progress {
    const dg_model_params *params;
    uint64_t done, all;
    dg_status report(uint64_t bytes, dg_error *error) {
        done += bytes;
        if (params->progress == nullptr || params->progress((float)done / (float)all, params->user)) return DG_OK;
        return dg_fail(error, DG_ERROR_CANCELLED, "loading was cancelled by the progress callback");
    }
};

dg_status upload_failure(cudaError_t e, dg_error *error) {
    return dg_fail(error, e == cudaErrorMemoryAllocation ? DG_ERROR_OUT_OF_MEMORY : DG_ERROR_BACKEND,
                   "CUDA, while the weights were loaded: %s", cudaGetErrorString(e));
}

dg_status upload(const dg_cuda_item &item, char *arena, Staging *staging, Progress *progress, dg_error *error) {
    const char *source = (const char *)item.source;
    char *target = arena + item.offset;
    if (item.row_bytes == 0) {
        for (uint64_t done = 0; done < item.bytes; done += DG_CUDA_STAGING_BYTES) {
            uint64_t bytes = std::min(DG_CUDA_STAGING_BYTES, item.bytes - done);
            cudaError_t e = staging->send(source + done, bytes, [&](const uint8_t *raw) {
                cudaMemcpyAsync(target + done, raw, bytes, cudaMemcpyDeviceToDevice, staging->stream);
            });
            if (e != cudaSuccess) return upload_failure(e, error);
        }
        return progress->report(item.bytes, error);
    }
    PackedShape shape = packed_shape(item.stored_type, item.n_rows, item.n_cols);
    int64_t rows_at_once =
        std::max((int64_t)(DG_CUDA_STAGING_BYTES / item.row_bytes) / kTileRows, (int64_t)1) * kTileRows;
    for (int64_t matrix = 0; matrix < item.n_matrices; matrix++)
        for (int64_t row = 0; row < item.n_rows; row += rows_at_once) {
            int64_t n_rows = std::min(rows_at_once, item.n_rows - row);
            uint64_t bytes = (uint64_t)n_rows * item.row_bytes;
            cudaError_t e =
                staging->send(source + (uint64_t)matrix * item.matrix_bytes + (uint64_t)row * item.row_bytes, bytes,
                              [&](const uint8_t *raw) {
                                  pack_rows(item.stored_type, raw, item.row_bytes, n_rows, item.n_cols,
                                            target + (uint64_t)matrix * shape.bytes +
                                                (uint64_t)(row / kTileRows) * shape.row_tile_bytes,
                                            staging->stream);
                              });
            if (e != cudaSuccess) return upload_failure(e, error);
            DG_TRY(progress->report(bytes, error));
        }
    return DG_OK;
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

/* Frees the arenas unless they have been handed over to the model. */
struct Arenas {
    DeviceModel *devices;
    int32_t n;
    ~Arenas() {
        for (int32_t i = 0; devices != nullptr && i < n; i++) cudaFree(devices[i].arena);
        delete[] devices;
    }
};

dg_status fill(const Plan &plan, const std::vector<float> &frequencies, DeviceModel *device, Staging *staging,
               Progress *progress, dg_error *error) {
    for (const dg_cuda_item &item : plan) {
        DG_TRY(upload(item, device->arena, staging, progress, error));
        device->places[item.source] = {device->arena + item.offset, item.stored_type};
    }
    float *target = (float *)(device->arena + plan.frequencies);
    device->frequencies = target;
    cudaError_t e = cudaMemcpyAsync(target, frequencies.data(), frequencies.size() * sizeof(float),
                                    cudaMemcpyHostToDevice, staging->stream);
    if (e == cudaSuccess) e = cudaStreamSynchronize(staging->stream);
    if (e == cudaSuccess) e = cudaGetLastError();
    return e == cudaSuccess ? DG_OK : upload_failure(e, error);
}

/* Behind what is there already, the device's name: "cuda (A, sm_89 + 1: B, sm_86". */
void add_name(dg_model *model, const DeviceModel *device, const cudaDeviceProp &properties) {
    const size_t length = strlen(model->backend_name);
    char number[16] = "";
    if (model->n_gpus > 1 || device->number > 0) snprintf(number, sizeof number, "%d: ", device->number);
    snprintf(model->backend_name + length, sizeof model->backend_name - length, "%s%s%.60s, sm_%d%d",
             length == 0 ? "cuda (" : " + ", number, properties.name, properties.major, properties.minor);
}

dg_status load_one(dg_model *model, const Plan &plan, DeviceModel *device, Progress *progress, dg_error *error) {
    std::vector<float> frequencies = rotation_frequencies(model, plan.frequency_stride);
    device->frequency_stride = plan.frequency_stride;
    cudaDeviceProp properties;
    Staging staging;
    size_t free_bytes = 0, total_bytes = 0;
    cudaError_t e = cudaSetDevice(device->number);
    if (e == cudaSuccess) e = cudaGetDeviceProperties(&properties, device->number);
    if (e == cudaSuccess) e = cudaMemGetInfo(&free_bytes, &total_bytes);
    if (e == cudaSuccess) {
        device->n_multiprocessors = properties.multiProcessorCount;
        device->hopper = hopper_available(properties);
        e = cudaMalloc((void **)&device->arena, plan.bytes);
    }
    if (e == cudaSuccess) e = staging.create();
    if (e == cudaErrorMemoryAllocation)
        return dg_fail(error, DG_ERROR_OUT_OF_MEMORY,
                       "the weights need %.2f GiB on the GPU, of which %.2f GiB are free: close other programs, keep "
                       "fewer layers (n_gpu_layers) or experts (n_cpu_moe) on the GPU, use a smaller file, or the CPU",
                       (double)(plan.bytes + 2 * DG_CUDA_STAGING_BYTES) / (1 << 30), (double)free_bytes / (1 << 30));
    if (e != cudaSuccess) return dg_fail(error, DG_ERROR_BACKEND, "CUDA: %s", cudaGetErrorString(e));
    DG_TRY(fill(plan, frequencies, device, &staging, progress, error));
    add_name(model, device, properties);
    return DG_OK;
}

dg_status load(dg_model *model, const dg_model_params *params, dg_error *error) {
    std::vector<Plan> plans((size_t)model->n_gpus);
    Arenas arenas = {new DeviceModel[model->n_gpus], model->n_gpus};
    Progress progress = {params, 0, 0};
    for (int32_t place = 0; place < model->n_gpus; place++) {
        Plan &plan = plans[(size_t)place];
        arenas.devices[place].number = model->gpus[place];
        const cudaError_t e = cudaSetDevice(model->gpus[place]);
        if (e != cudaSuccess) return dg_fail(error, DG_ERROR_BACKEND, "CUDA: %s", cudaGetErrorString(e));
        DG_TRY(dg_cuda_plan_weights(model, place, has_fp4_mma(), &plan, error));
        DG_TRY(check(model, plan, error));
        for (const dg_cuda_item &item : plan)
            progress.all += item.row_bytes == 0 ? item.bytes : item.matrix_bytes * (uint64_t)item.n_matrices;
    }
    model->backend_name[0] = '\0';
    for (int32_t place = 0; place < model->n_gpus; place++)
        DG_TRY(load_one(model, plans[(size_t)place], &arenas.devices[place], &progress, error));
    strncat(model->backend_name, ")", sizeof model->backend_name - strlen(model->backend_name) - 1);
    model->backend_data = arenas.devices;
    arenas.devices = nullptr;
    return DG_OK;
}

} // namespace

dg_status load_model(dg_model *model, const dg_model_params *params, dg_error *error) {
    dg_status status;
    try {
        status = load(model, params, error);
    } catch (const std::bad_alloc &) {
        status = dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory to plan the weights on the GPU");
    }
    cudaGetLastError(); /* forgets a failure: it has been reported */
    return status;
}

void unload_model(dg_model *model) {
    DeviceModel *devices = device_model(model, 0);
    if (devices == nullptr) return;
    for (int32_t i = 0; i < model->n_gpus; i++) cudaFree(devices[i].arena);
    cudaGetLastError();
    delete[] devices;
    model->backend_data = nullptr;
}
