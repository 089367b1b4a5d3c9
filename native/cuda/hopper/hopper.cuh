/* The path of compute capability 9.0 (H100, H200): what the rest of the backend calls.
 *
 * Off unless the environment variable DGEMMA_CUDA_HOPPER is 1 (dg_cuda_hopper_wanted, layout.h). Where it is on, dense
 * products and the head take their activations as float16 (kHalves) and run here; everything else runs as on every GPU.
 */
#ifndef DG_CUDA_HOPPER_CUH
#define DG_CUDA_HOPPER_CUH

#include "cuda/device.cuh"

#if defined(DGEMMA_CUDA_HAS_SM90A)

/* Whether it is wanted, the device is one of those, and its driver and this library can. */
bool hopper_available(const cudaDeviceProp &device);

/* matmul (device.cuh) with activations of kHalves, for weights of any type. */
void hopper_matmul(const Queue &queue, const DeviceWeight *weights, int n_weights, const Activations &x, int n,
                   Partials *out);

/* What head.cu and soften.cu do with products by the embedding, from activations of kHalves: the statistics of all
 * vocabulary blocks; the draw from one of them, and the weights of those that a narrow soft embedding looks at again;
 * the logits of chunk_logits; the weights of a chunk of the dense soft embedding. */
void hopper_statistics(const Queue &queue, const HeadTask &task);
void hopper_candidates(const Queue &queue, const HeadTask &task);
void hopper_looks(const Queue &queue, const HeadTask &task);
void hopper_logits(const Queue &queue, const HeadTask &task, int64_t first, int count);
void hopper_weights(const Queue &queue, const HeadTask &task, int64_t first, int64_t count);

#else /* a library without code for sm_90a */

static inline bool hopper_available(const cudaDeviceProp &) { return false; }
static inline void hopper_matmul(const Queue &, const DeviceWeight *, int, const Activations &, int, Partials *) {}
static inline void hopper_statistics(const Queue &, const HeadTask &) {}
static inline void hopper_candidates(const Queue &, const HeadTask &) {}
static inline void hopper_looks(const Queue &, const HeadTask &) {}
static inline void hopper_logits(const Queue &, const HeadTask &, int64_t, int) {}
static inline void hopper_weights(const Queue &, const HeadTask &, int64_t, int64_t) {}

#endif
#endif
