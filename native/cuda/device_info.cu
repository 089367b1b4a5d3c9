#include "cuda/device_info.cuh"

#include <cuda_runtime.h>
#include <stdio.h>

extern "C" {
#include "base/error.h"
}

dg_status describe_device(dg_device *device, dg_error *error) {
    size_t free_bytes = 0, total_bytes = 0;
    cudaDeviceProp properties;
    cudaError_t e = cudaGetDeviceProperties(&properties, 0);
    if (e == cudaSuccess) e = cudaMemGetInfo(&free_bytes, &total_bytes);
    cudaGetLastError();
    if (e != cudaSuccess) return dg_fail(error, DG_ERROR_BACKEND, "CUDA: %s", cudaGetErrorString(e));
    *device = {free_bytes, total_bytes, properties.multiProcessorCount};
    return DG_OK;
}

bool find_obstacle(char *note, size_t note_size) {
    int driver = 0, runtime = 0, n_devices = 0;
    cudaDeviceProp properties;
    cudaError_t e = cudaDriverGetVersion(&driver);
    const bool no_driver = e == cudaSuccess && driver == 0;
    if (e == cudaSuccess) e = cudaRuntimeGetVersion(&runtime);
    if (e == cudaSuccess) e = cudaGetDeviceCount(&n_devices);
    if (e == cudaSuccess && n_devices > 0) e = cudaGetDeviceProperties(&properties, 0);
    cudaGetLastError();
    if (no_driver)
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
