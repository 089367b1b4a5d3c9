/* Instructions that only the GPUs of compute capability 9.0 have: barriers with phases, copies by the tensor memory
 * unit, and matrix products of a warpgroup. Like cuda/intrinsics.cuh it has a counterpart in tests/cuda/emulation.
 *
 * Everything here is asynchronous. A product reads its operands, registers and shared memory, at any time until it has
 * been waited for, and its sums may not be read before; a copy may arrive at once, or as late as when its barrier is
 * waited for. */
#ifndef DG_CUDA_HOPPER_INTRINSICS_CUH
#define DG_CUDA_HOPPER_INTRINSICS_CUH

#include "cuda/intrinsics.cuh"

constexpr int kWarpgroup = 128;           /* threads that multiply together */
constexpr int kSwizzledRowBytes = 128;    /* of a row of an operand in shared memory */
constexpr int kSwizzledGroupBytes = 1024; /* eight such rows, among which 16-byte pieces are exchanged */

/* How many more arrivals and bytes a phase waits for, in shared memory. Phases are numbered 0, 1, 0, 1, …. */
using Barrier = uint64_t;

#if defined(DGEMMA_CUDA_EMULATION)
#include "emulated_hopper.h"
#else

#include <cuda.h>

/* A matrix in global memory, as the tensor memory unit is told of it. A kernel's parameter, __grid_constant__. */
using TensorMap = CUtensorMap;

/* ---- Barriers ------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ uint32_t shared_address(const void *shared) {
    return (uint32_t)__cvta_generic_to_shared(shared);
}

/* A phase ends with `arrivals` arrivals, and when all expected bytes have come. */
static __device__ __forceinline__ void barrier_init(Barrier *b, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
/* Barriers that this thread has initialised are seen by the copies; other threads need a __syncthreads besides. */
static __device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}
static __device__ __forceinline__ void barrier_arrive(Barrier *b) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(b)) : "memory");
}
/* An arrival, and so many more bytes that the phase waits for. */
static __device__ __forceinline__ void barrier_expect(Barrier *b, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(b)), "r"(bytes)
                 : "memory");
}
/* Waits for the end of the phase of that parity. Of a new barrier phase 1, so to say the one before the first, has
 * ended. */
static __device__ __forceinline__ void barrier_wait(Barrier *b, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
            : "=r"(done)
            : "r"(shared_address(b)), "r"(parity)
            : "memory");
    } while (done == 0);
}
/* Waits for so many threads, whole warps, that come to barrier `id` (1 … 15). */
template <int kThreads> static __device__ __forceinline__ void meet(int id) {
    asm volatile("bar.sync %0, %1;\n" ::"r"(id), "n"(kThreads) : "memory");
}

/* ---- Copies --------------------------------------------------------------------------------------------------- */

/* Copies the map's box that begins at (column, row). One thread. What lies outside of the matrix arrives as zeros, and
 * counts among the bytes. */
static __device__ __forceinline__ void copy_box(void *shared, const TensorMap &map, int column, int row, Barrier *b) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
                 "[%1, {%2, %3}], [%4];\n" ::"r"(shared_address(shared)),
                 "l"(&map), "r"(column), "r"(row), "r"(shared_address(b))
                 : "memory");
}
/* Brings bytes (16-byte aligned, a multiple of 16) into the L2 cache. */
static __device__ __forceinline__ void prefetch(const void *global, uint32_t bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;\n" ::"l"(global), "r"(bytes) : "memory");
}

/* ---- Products of a warpgroup ---------------------------------------------------------------------------------- */

/* Registers of each thread of the calling warpgroup from here on: multiples of 8. */
template <int kRegisters> static __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters> static __device__ __forceinline__ void leave_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

/* Before the first product of a group: registers that were written are seen by the products. */
static __device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
static __device__ __forceinline__ void products_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
/* Waits until no more than so many groups, the last ones, are under way. */
template <int kGroupsLeft> static __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kGroupsLeft) : "memory");
}
/* Nothing that reads the sums is moved up across this. */
template <int kN> static __device__ __forceinline__ void hold(float (&d)[kN]) {
#pragma unroll
    for (int i = 0; i < kN; i++) asm volatile("" : "+f"(d[i])::"memory");
}

/* Operand (rows, 64) of float16 at a multiple of 1024, its rows 128 bytes apart and swizzled by 128 bytes, as copy_box
 * leaves it. 16 columns on are 2 more. */
static __device__ __forceinline__ uint64_t operand(const void *shared) {
    return (uint64_t)((shared_address(shared) & 0x3ffff) >> 4) | (uint64_t)1 << 16 |
           (uint64_t)(kSwizzledGroupBytes >> 4) << 32 | (uint64_t)1 << 62;
}

#define DG_TEN(i) "%" #i "0,%" #i "1,%" #i "2,%" #i "3,%" #i "4,%" #i "5,%" #i "6,%" #i "7,%" #i "8,%" #i "9"
#define DG_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define DG_F16(i) DG_F4(i), DG_F4(i + 4), DG_F4(i + 8), DG_F4(i + 12)
#define DG_F32(i) DG_F16(i), DG_F16(i + 16)
#define DG_ONES "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9"
#define DG_WGMMA(n, sums, a0, a1, a2, a3, b, one)                                                                      \
    "{\n.reg .pred p;\nsetp.ne.b32 p, " one ", 0;\nwgmma.mma_async.sync.aligned.m64n" n "k16.f32.f16.f16 {" sums       \
    "}, {" a0 "," a1 "," a2 "," a3 "}, " b ", p, 1, 1, 0;\n}\n"

/* d (64 rows, 2·kN tokens) += a (64, 16) · b (16, 2·kN). Of each warp's 16 rows a lane holds, with g and t as in
 * formats.cuh: a[half], a[2 + half] at positions 2·t, 2·t + 1 and 2·t + 8, 2·t + 9 of row g + 8·half;
 * d[4·j + 2·half + i] of row g + 8·half and token 8·j + 2·t + i. All of it is read later: see above. */
static __device__ __forceinline__ void warpgroup_multiply(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        DG_WGMMA("64", DG_ONES "," DG_TEN(1) "," DG_TEN(2) ",%30,%31", "%32", "%33", "%34", "%35", "%36", "%37")
        : DG_F32(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
}
static __device__ __forceinline__ void warpgroup_multiply(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(DG_WGMMA("128",
                          DG_ONES
                          "," DG_TEN(1) "," DG_TEN(2) "," DG_TEN(3) "," DG_TEN(4) "," DG_TEN(5) ",%60,%61,%62,%63",
                          "%64", "%65", "%66", "%67", "%68", "%69")
                 : DG_F32(0), DG_F32(32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
}
static __device__ __forceinline__ void warpgroup_multiply(float (&d)[128], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        DG_WGMMA("256",
                 DG_ONES "," DG_TEN(1) "," DG_TEN(2) "," DG_TEN(3) "," DG_TEN(4) "," DG_TEN(5) "," DG_TEN(6) "," DG_TEN(
                     7) "," DG_TEN(8) "," DG_TEN(9) "," DG_TEN(10) "," DG_TEN(11) ",%120,%121,%122,%123,%124,%125,"
                                                                                  "%126,%127",
                 "%128", "%129", "%130", "%131", "%132", "%133")
        : DG_F32(0), DG_F32(32), DG_F32(64), DG_F32(96)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
}

/* ---- Pairs of float16 ----------------------------------------------------------------------------------------- */

static __device__ __forceinline__ __half2 as_pair(uint32_t x) { return *reinterpret_cast<__half2 *>(&x); }
static __device__ __forceinline__ uint32_t as_word(__half2 x) { return *reinterpret_cast<uint32_t *>(&x); }
static __device__ __forceinline__ uint32_t pair_subtract(uint32_t a, uint32_t b) {
    return as_word(__hsub2(as_pair(a), as_pair(b)));
}
static __device__ __forceinline__ uint32_t pair_multiply(uint32_t a, uint32_t b) {
    return as_word(__hmul2(as_pair(a), as_pair(b)));
}
/* a · b + c, rounded once */
static __device__ __forceinline__ uint32_t pair_fma(uint32_t a, uint32_t b, uint32_t c) {
    return as_word(__hfma2(as_pair(a), as_pair(b), as_pair(c)));
}
static __device__ __forceinline__ uint32_t make_pair(float low, float high) {
    return as_word(__floats2half2_rn(low, high));
}

/* ---- On the host ---------------------------------------------------------------------------------------------- */

/* The driver's function that makes maps, asked for at run time so that the library needs no driver to be loaded. NULL
 * where the driver lacks it. */
static inline decltype(&cuTensorMapEncodeTiled) map_encoder() {
    static const auto encoder = [] {
        void *found = nullptr;
        cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
        if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result) !=
            cudaSuccess)
            found = nullptr;
        cudaGetLastError();
        return (decltype(&cuTensorMapEncodeTiled))(result == cudaDriverEntryPointSuccess ? found : nullptr);
    }();
    return encoder;
}
static inline bool can_map_tensors() { return map_encoder() != nullptr; }

/* A map of float16 (n_rows, n_columns) at `device`, in boxes of 64 columns and `box_rows` ≤ 256 rows. False where the
 * driver refuses. */
static inline bool map_tensor(TensorMap *map, const uint16_t *device, int64_t n_rows, int64_t n_columns, int box_rows) {
    const cuuint64_t sizes[2] = {(cuuint64_t)n_columns, (cuuint64_t)n_rows}, pitches[1] = {(cuuint64_t)n_columns * 2};
    const cuuint32_t box[2] = {kSwizzledRowBytes / 2, (cuuint32_t)box_rows}, steps[2] = {1, 1};
    return map_encoder()(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, (void *)device, sizes, pitches, box, steps,
                         CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                         CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

#endif
#endif
