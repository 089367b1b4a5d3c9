#include "cuda/device_info.cuh"

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <stdio.h>

extern "C" {
#include "base/error.h"
}

namespace {

/* NVIDIA's management library, which comes with the driver and knows what is free without a context on the device. */
class Management {
  public:
    static const Management &get() {
        static const Management management;
        return management;
    }
    /* False where it is not there, or does not know the device. */
    bool memory(const char *uuid, uint64_t *free_bytes, uint64_t *total_bytes) const {
        struct {
            unsigned long long total, free, used;
        } found = {};
        void *handle = nullptr;
        if (memory_of == nullptr || find == nullptr || find(uuid, &handle) != 0) return false;
        if (memory_of(handle, &found) != 0) return false;
        *free_bytes = found.free;
        *total_bytes = found.total;
        return true;
    }

  private:
    int (*find)(const char *uuid, void **handle) = nullptr;
    int (*memory_of)(void *handle, void *found) = nullptr;

    Management() {
        void *library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) return;
        auto initialise = (int (*)())dlsym(library, "nvmlInit_v2");
        if (initialise == nullptr || initialise() != 0) return;
        find = (int (*)(const char *, void **))dlsym(library, "nvmlDeviceGetHandleByUUID");
        memory_of = (int (*)(void *, void *))dlsym(library, "nvmlDeviceGetMemoryInfo");
    }
};

/* As the driver's tools write it: "GPU-" and 32 digits in groups of 8, 4, 4, 4 and 12. */
void write_uuid(const cudaUUID_t &uuid, char *text, size_t size) {
    size_t length = (size_t)snprintf(text, size, "GPU");
    for (int i = 0; i < 16 && length < size; i++) {
        const bool begins = i == 0 || i == 4 || i == 6 || i == 8 || i == 10;
        length += (size_t)snprintf(text + length, size - length, begins ? "-%02x" : "%02x",
                                   (unsigned)(unsigned char)uuid.bytes[i]);
    }
}

cudaError_t describe(int number, bool alone, dg_gpu_info *gpu) {
    cudaDeviceProp properties;
    cudaError_t e = cudaGetDeviceProperties(&properties, number);
    if (e != cudaSuccess) return e;
    *gpu = {};
    gpu->number = number;
    gpu->capability = 10 * properties.major + properties.minor;
    gpu->n_multiprocessors = properties.multiProcessorCount;
    snprintf(gpu->name, sizeof gpu->name, "%.63s", properties.name);
    write_uuid(properties.uuid, gpu->uuid, sizeof gpu->uuid);
    if (properties.major < 8)
        snprintf(gpu->obstacle, sizeof gpu->obstacle,
                 "%.48s has compute capability %d.%d; 8.0 (Ampere) or later is needed", properties.name,
                 properties.major, properties.minor);
    /* One device is going to be used anyway: its own word is better. */
    if (!alone && Management::get().memory(gpu->uuid, &gpu->free_bytes, &gpu->total_bytes)) return cudaSuccess;
    size_t free_bytes = 0, total_bytes = 0;
    e = cudaSetDevice(number);
    if (e == cudaSuccess) e = cudaMemGetInfo(&free_bytes, &total_bytes);
    gpu->free_bytes = free_bytes;
    gpu->total_bytes = total_bytes;
    return e;
}

} // namespace

/* A device that fails is listed with what it says; the others are as good as before. */
dg_status list_gpus(dg_gpu_info *gpus, int32_t capacity, int32_t *n, dg_error *error) {
    int count = 0;
    *n = 0;
    cudaError_t e = cudaGetDeviceCount(&count);
    cudaGetLastError();
    if (e != cudaSuccess) return dg_fail(error, DG_ERROR_BACKEND, "no GPU: %s", cudaGetErrorString(e));
    for (int i = 0; i < count && i < capacity; i++) {
        e = describe(i, count == 1, &gpus[i]);
        cudaGetLastError();
        if (e == cudaSuccess) continue;
        gpus[i].number = i;
        snprintf(gpus[i].obstacle, sizeof gpus[i].obstacle, "no GPU: %s", cudaGetErrorString(e));
    }
    *n = count < capacity ? count : capacity;
    return DG_OK;
}

dg_status gpu_memory(int32_t number, uint64_t *free_bytes, dg_error *error) {
    size_t found = 0, total = 0;
    cudaError_t e = cudaSetDevice(number);
    if (e == cudaSuccess) e = cudaMemGetInfo(&found, &total);
    cudaGetLastError();
    if (e != cudaSuccess) return dg_fail(error, DG_ERROR_BACKEND, "CUDA: %s", cudaGetErrorString(e));
    *free_bytes = found;
    return DG_OK;
}

bool find_obstacle(char *note, size_t note_size) {
    int driver = 0, runtime = 0, n_devices = 0;
    cudaError_t e = cudaDriverGetVersion(&driver);
    const bool no_driver = e == cudaSuccess && driver == 0;
    if (e == cudaSuccess) e = cudaRuntimeGetVersion(&runtime);
    if (e == cudaSuccess) e = cudaGetDeviceCount(&n_devices);
    cudaGetLastError();
    if (no_driver)
        snprintf(note, note_size, "no NVIDIA driver is installed");
    else if (e == cudaErrorInsufficientDriver)
        snprintf(note, note_size, "the NVIDIA driver supports CUDA %d.%d; %d.%d or later is needed: update the driver",
                 driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    else if (e != cudaSuccess || n_devices == 0)
        snprintf(note, note_size, "no GPU: %s", e != cudaSuccess ? cudaGetErrorString(e) : "none found");
    else
        return false;
    return true;
}
