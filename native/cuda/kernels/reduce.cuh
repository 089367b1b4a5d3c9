/* Sums and maxima over a warp and over a block, and other small pieces that kernels share. */
#ifndef DG_CUDA_REDUCE_CUH
#define DG_CUDA_REDUCE_CUH

#include "cuda/intrinsics.cuh"

/* Over kLanes neighbouring lanes (a power of two), in every one of them. All lanes of the warp must call it. */
template <int kLanes, class T> static __device__ __forceinline__ T group_sum(T x) {
#pragma unroll
    for (int bits = kLanes / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(0xffffffff, x, bits);
    return x;
}
template <int kLanes> static __device__ __forceinline__ float group_max(float x) {
#pragma unroll
    for (int bits = kLanes / 2; bits > 0; bits /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, bits));
    return x;
}
static __device__ __forceinline__ float warp_sum(float x) { return group_sum<32>(x); }
static __device__ __forceinline__ float warp_max(float x) { return group_max<32>(x); }

/* The sum (or maximum) over the block, in every thread, always in the same order. `shared`: 32 floats. All threads must
 * call it. */
static __device__ __forceinline__ float block_sum(float x, float *shared) {
    const int warp = (int)threadIdx.x / 32, n_warps = (int)blockDim.x / 32;
    x = warp_sum(x);
    __syncthreads(); /* `shared` may still be read from the last call */
    if (threadIdx.x % 32 == 0) shared[warp] = x;
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < n_warps; i++) sum += shared[i];
    return sum;
}

/* Two sums at once; `shared`: 64 floats. */
static __device__ __forceinline__ float2 block_sum_pair(float2 x, float *shared) {
    const int warp = (int)threadIdx.x / 32, n_warps = (int)blockDim.x / 32;
    x = make_float2(warp_sum(x.x), warp_sum(x.y));
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        shared[warp] = x.x;
        shared[32 + warp] = x.y;
    }
    __syncthreads();
    float2 sum = make_float2(0, 0);
    for (int i = 0; i < n_warps; i++) sum = make_float2(sum.x + shared[i], sum.y + shared[32 + i]);
    return sum;
}

static __device__ __forceinline__ float block_max(float x, float *shared) {
    const int warp = (int)threadIdx.x / 32, n_warps = (int)blockDim.x / 32;
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[warp] = x;
    __syncthreads();
    for (int i = 0; i < n_warps; i++) x = fmaxf(x, shared[i]);
    return x;
}

/* Stores a float16 at an even address. One 16-bit store: where a fresh float16 is stored byte by byte, as a packed
 * struct or memcpy has it, ptxas 13.0 makes the lower byte by converting the *number* to an integer (F2I.U8.F16). */
static __device__ __forceinline__ void store_half(void *to, float x) {
    *reinterpret_cast<uint16_t *>(to) = float_to_half(x);
}

static __device__ __forceinline__ float gelu_tanh(float x) {
    return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}

/* Int8 code and scale of a value among 32 whose largest magnitude is known. */
static __device__ __forceinline__ int quantize(float x, float largest) {
    return largest > 0 ? __float2int_rn(x * (127.0f / largest)) : 0;
}

#endif
