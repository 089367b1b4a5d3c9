#include "cuda/device_info.cuh"

#include <stdio.h>
#include <string.h>

/* What the engine looks up in the shared object (cuda_loader.c): `version` is the engine's, `model_bytes` and
 * `ops_bytes` are the sizes of its structs, which a development build may change without a release. NULL, and a reason
 * in `note`, where the two do not belong together, or no device can be used. */
extern "C" __attribute__((visibility("default"))) const dg_backend_ops *
dg_cuda_library(const char *version, size_t model_bytes, size_t ops_bytes, char *note, size_t note_size) {
    if (strcmp(version, DGEMMA_VERSION) != 0) {
        snprintf(note, note_size,
                 "the CUDA library is dgemma %s, and the engine dgemma %.32s: install both from one release",
                 DGEMMA_VERSION, version);
        return nullptr;
    }
    if (model_bytes != sizeof(dg_model) || ops_bytes != sizeof(dg_backend_ops)) {
        snprintf(note, note_size,
                 "the CUDA library and the engine are different builds of dgemma %s: install both anew from one source",
                 DGEMMA_VERSION);
        return nullptr;
    }
    return find_obstacle(note, note_size) ? nullptr : &dg_cuda_operations;
}
