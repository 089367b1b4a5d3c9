/* Finds the CUDA backend, a shared object of its own, when it is wanted. */
#ifndef DG_CUDA_LOADER_H
#define DG_CUDA_LOADER_H

#include "device/backend.h"

/* The operations of libdgemma_cuda.so, which is looked for beside the engine's own shared object, or where the
 * environment variable DGEMMA_CUDA_LIBRARY says. NULL where it cannot serve, with the reason in `note`: no library, no
 * driver, a driver that is too old, no GPU. The library stays loaded until the process ends. */
const dg_backend_ops *dg_cuda_load(char *note, size_t note_size);

#endif
