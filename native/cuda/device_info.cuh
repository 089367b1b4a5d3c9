/* Which devices there are, and whether they and this library can be used. */
#ifndef DG_CUDA_DEVICE_INFO_CUH
#define DG_CUDA_DEVICE_INFO_CUH

#include <stddef.h>

#include "cuda/layout.h"

/* dg_backend_ops.list_gpus and gpu_memory */
dg_status list_gpus(dg_gpu_info *gpus, int32_t capacity, int32_t *n, dg_error *error);
dg_status gpu_memory(int32_t number, uint64_t *free_bytes, dg_error *error);

/* Why no device can be used, into `note`; false where one can. */
bool find_obstacle(char *note, size_t note_size);

/* What the backend offers: backend.cu. */
extern const dg_backend_ops dg_cuda_operations;

#endif
