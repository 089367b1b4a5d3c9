/* Every instruction that C++ has no name for, and the launch of a kernel.
 *
 * The kernels contain no PTX besides this header, so that they also compile against an emulation of the execution model
 * on the CPU (tests/cuda/emulation), which has its own version of these few functions. */
#ifndef DG_CUDA_INTRINSICS_CUH
#define DG_CUDA_INTRINSICS_CUH

#include <cuda_runtime.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* A library that measures its launches (timing.cuh) makes them one by one, and sums them up after each step. */
#ifdef DGEMMA_CUDA_TIMING
constexpr bool kMeasuresLaunches = true;
#else
constexpr bool kMeasuresLaunches = false;
#endif
static inline void collect_launch_times();

#if defined(DGEMMA_CUDA_EMULATION)
#include "emulated_intrinsics.h"
static inline void collect_launch_times() {}
#else

#include <cuda_fp16.h>

#ifdef DGEMMA_CUDA_TIMING
#include "cuda/timing.cuh"
#endif

static __device__ __forceinline__ float half_to_float(uint16_t h) { return __half2float(__ushort_as_half(h)); }
static __device__ __forceinline__ uint16_t float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }

/* Two floats as float16, the first in the lower bits. */
static __device__ __forceinline__ uint32_t pack_halves(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t *>(&both);
}
/* Four int8 times a float16: two words of float16, in their order. A code joins the bits of 1024, which makes 1152 of
 * a zero. */
static __device__ __forceinline__ void scale_codes(uint32_t (&halves)[2], uint32_t codes, uint16_t scale) {
    const __half2 by = __half2half2(__ushort_as_half(scale)), zero = __half2half2(__ushort_as_half(0x6480));
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t bits = __byte_perm(codes ^ 0x80808080u, 0x64646464u, i == 0 ? 0x4140 : 0x4342);
        const __half2 scaled = __hmul2(__hsub2(*reinterpret_cast<const __half2 *>(&bits), zero), by);
        halves[i] = *reinterpret_cast<const uint32_t *>(&scaled);
    }
}
/* x, of which the compiler is not to know: what follows from it is computed where it is needed, not kept in registers
 * throughout a loop. */
static __device__ __forceinline__ int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}
/* 2^x, to about 2^-22. */
static __device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}

/* Part of a tile, in shared or global memory. The emulation counts bank conflicts here. */
template <class T> static __device__ __forceinline__ T tile_load(const void *from) {
    return *reinterpret_cast<const T *>(from);
}

/* ---- Asynchronous copies from global to shared memory; zeros where not `valid` ------------------------------- */

static __device__ __forceinline__ void cp_async_16(void *shared, const void *global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"((unsigned)__cvta_generic_to_shared(shared)),
                 "l"(global)
                 : "memory");
}
static __device__ __forceinline__ void cp_async_8(void *shared, const void *global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;\n" ::"r"((unsigned)__cvta_generic_to_shared(shared)),
                 "l"(global)
                 : "memory");
}
static __device__ __forceinline__ void cp_async_16(void *shared, const void *global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"((unsigned)__cvta_generic_to_shared(shared)),
                 "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}
/* Of 16 bytes the first `n_bytes`, and zeros: what lies behind them is not read. */
static __device__ __forceinline__ void cp_async_part(void *shared, const void *global, int n_bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"((unsigned)__cvta_generic_to_shared(shared)),
                 "l"(global), "r"(n_bytes)
                 : "memory");
}
static __device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int kGroupsLeft> static __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kGroupsLeft) : "memory");
}

/* ---- Matrix units: c (16, 8) += a (16, k) b (k, 8) ------------------------------------------------------------ */

static __device__ __forceinline__ void mma_s8_k32(int (&c)[4], const uint32_t *a, const uint32_t *b) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
static __device__ __forceinline__ void mma_s8_k16(int (&c)[4], const uint32_t *a, const uint32_t *b) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};\n"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}
static __device__ __forceinline__ void mma_f16_k16(float (&c)[4], const uint32_t *a, const uint32_t *b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
/* Takes float32 bits, of which the lowest 13 are ignored. */
static __device__ __forceinline__ void mma_tf32_k8(float (&c)[4], const uint32_t *a, const uint32_t *b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* c (16, 8) += a (16, 64) b (64, 8) of E2M1, each 16 columns of a row of either times an E4M3 scale. `scale_a`: the
 * four scales of row g from even lanes and of row g + 8 from odd ones; `scale_b`: those of column g. Only the
 * instruction sets of sm_120a and sm_121a have it; elsewhere nothing may call it. */
#if defined(__CUDA_ARCH_FEAT_SM120_ALL) || defined(__CUDA_ARCH_FEAT_SM121_ALL)
constexpr bool kHasFp4Mma = true;
#else
constexpr bool kHasFp4Mma = false;
#endif
static __device__ __forceinline__ void mma_fp4_k64(float (&c)[4], const uint32_t *a, uint32_t scale_a,
                                                   const uint32_t *b, uint32_t scale_b) {
#if defined(__CUDA_ARCH_FEAT_SM120_ALL) || defined(__CUDA_ARCH_FEAT_SM121_ALL)
    /* The zeros choose byte 0 onward of the scales of the first pair of lanes (a) and the first lane (b) of each four.
     */
    asm("mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X.m16n8k64.row.col.f32.e2m1.e2m1.f32.ue4m3 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3}, {%10}, {%12,%12}, {%11}, {%12,%12};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(scale_a), "r"(scale_b),
          "h"((uint16_t)0));
#else
    __trap();
#endif
}

/* ---- Four 8×8 matrices of 16-bit elements from shared memory: lane 8·i + j gives row j of matrix i ------------- */

static __device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row))
                 : "memory");
}
static __device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row))
                 : "memory");
}

#ifdef DGEMMA_CUDA_TIMING
static inline void collect_launch_times() { LaunchTimes::get().collect(); }
#else
static inline void collect_launch_times() {}
#endif

/* ---- Launching ------------------------------------------------------------------------------------------------ */

/* All shared memory is dynamic and comes from here, so that the emulation can poison and guard it. */
template <class T> static __device__ __forceinline__ T *shared_memory() {
    extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
    return reinterpret_cast<T *>(dynamic_shared_memory);
}

/* The first object of every kernel. From sm_90 on a kernel may be launched while the one before it in the stream still
 * runs (launch, below): it waits here until that one has ended and its results can be seen. At its own end it lets the
 * next one be launched, whose blocks come as this one's go. Earlier they would take places that its own still need,
 * which cost a tenth of a step on an H200; each kernel waits for its predecessor as a whole, so none can overtake. */
struct KernelOrder {
    __device__ __forceinline__ KernelOrder() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
    }
    __device__ __forceinline__ ~KernelOrder() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
    }
};

/* Whether kernels are launched before their predecessors have ended: where the thread's device has compute capability
 * 9.0 or later, unless the environment variable DGEMMA_CUDA_OVERLAP is 0 (for measurements). */
static inline bool overlaps_launches() {
    static const bool wanted = [] {
        const char *given = getenv("DGEMMA_CUDA_OVERLAP");
        return given == nullptr || strcmp(given, "0") != 0;
    }();
    thread_local int known_device = -1, major = 0;
    int device = 0;
    if (!wanted || cudaGetDevice(&device) != cudaSuccess) return false;
    if (device != known_device) {
        if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
        known_device = device;
    }
    return major >= 9;
}

/* A failure is found by the caller's cudaGetLastError. */
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Arguments... arguments) {
    if (shared_bytes > 48 * 1024)
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = !kMeasuresLaunches && overlaps_launches() ? 1 : 0;
    auto start = [&] { cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...); };
#ifdef DGEMMA_CUDA_TIMING
    LaunchTimes::get().measure(kernel, stream, start);
#else
    start();
#endif
}

#endif
#endif
