/* Weights times tokens on the matrix units of a warpgroup: the loop of the dense product and of the head.
 *
 * A block of 384 threads multiplies 128 rows of weights by kTokens tokens (64, 128 or 256):
 *
 *                        kTokens
 *                 ┌───────────────────┐
 *      64 rows    │ warps 0 … 3       │  a warpgroup: 16 rows a warp, its weights decoded in registers, global memory
 *                 ├───────────────────┤  to registers directly; tokens from shared memory; sums in registers
 *      64 rows    │ warps 4 … 7       │  the same
 *                 └───────────────────┘
 *      warp 8 loads the tokens; warps 9 … 11 only make up its warpgroup, which gives its registers to the other two.
 *
 * Columns come in stages of 64, which is 128 bytes of float16 a token: what one box of the tensor memory unit brings
 * into shared memory, swizzled, and four instructions read.
 *
 *     stage s     full[s]    its tokens have arrived (one arrival of warp 8, and the bytes)
 *                 empty[s]   the eight warps have multiplied by it (an arrival each)
 *
 * A warp has two sets of fragments, so that it decodes stage k + 1 while the products of stage k are under way, and
 * reads the weights of k + 2 meanwhile. It gives stage k back when the products of k + 1 have been started and those of
 * k waited for. */
#ifndef DG_CUDA_HOPPER_PRODUCT_CUH
#define DG_CUDA_HOPPER_PRODUCT_CUH

#include "cuda/hopper/fragments.cuh"

constexpr int kHopperRows = 128; /* of a block */
constexpr int kHopperRowTiles = kHopperRows / kTileRows;
constexpr int kHopperThreads = 3 * kWarpgroup;
constexpr int kHopperWarps = 8; /* that multiply */
/* A multiprocessor has 64 K registers: 2 · 128 · 232 + 128 · 40. */
constexpr int kMultiplyRegisters = 232, kLoadRegisters = 40;

/* Tokens that a block can take at most: float32 weights need the registers of some sums. */
template <class F> constexpr int kMostTokens = F::kActivations == kFloats && F::kTileBytes > 512 ? 128 : 256;

template <class F, int kTokens_, int kStages_ = 6> struct HopperProduct {
    static constexpr int kTokens = kTokens_;
    static constexpr int kStageBytes = kTokens * kSwizzledRowBytes;
    static constexpr int kStages = kStages_;
    static constexpr int kBarrierOffset = kStages * kStageBytes;
    /* What a kernel keeps besides stands from kEnd on. */
    static constexpr int kEnd = kBarrierOffset + 2 * kStages * (int)sizeof(Barrier);
    /* Stages begin at a multiple of kSwizzledGroupBytes, wherever a block's shared memory does. */
    static constexpr int kSharedBytes = kEnd + kSwizzledGroupBytes;

    using Sums = float[kTokens / 2]; /* of a thread */

    static __device__ __forceinline__ char *shared() {
        char *memory = shared_memory<char>();
        return memory + (kSwizzledGroupBytes - shared_address(memory) % kSwizzledGroupBytes) % kSwizzledGroupBytes;
    }
    static __device__ __forceinline__ Barrier *full(int stage) {
        return (Barrier *)(shared() + kBarrierOffset) + stage;
    }
    static __device__ __forceinline__ Barrier *empty(int stage) { return full(stage) + kStages; }
    /* Of the use of a stage that is number `use` since the kernel began: stages are used in turn. */
    static __device__ __forceinline__ int stage_of(int use) { return use % kStages; }
    static __device__ __forceinline__ uint32_t phase_of(int use) { return (uint32_t)(use / kStages & 1); }

    static __device__ __forceinline__ int warp() { return (int)threadIdx.x / 32; }
    static __device__ __forceinline__ int lane() { return (int)threadIdx.x % 32; }
    static __device__ __forceinline__ bool loads() { return warp() >= kHopperWarps; }

    /* All threads, first of all. */
    static __device__ __forceinline__ void begin() {
        if (threadIdx.x == 0) {
            for (int s = 0; s < kStages; s++) {
                barrier_init(full(s), 1);
                barrier_init(empty(s), kHopperWarps);
            }
            publish_barriers();
        }
        __syncthreads();
    }

    /* ---- The loading warp ------------------------------------------------------------------------------------- */

    /* Brings the weights of four stages from k on into the L2 cache: a lane for each row tile. */
    static __device__ __forceinline__ void prefetch_weights(const char *row, int k, int last, int k_tiles) {
        constexpr int tiles = StageWeights<F>::kTiles;
        const int64_t from = tile_offset<F>((int64_t)k * tiles);
        const int64_t to = tile_offset<F>(min((int64_t)min(k + 4, last) * tiles, (int64_t)k_tiles));
        if (lane() < kHopperRowTiles && to > from) prefetch(row + from, (uint32_t)(to - from));
    }

    /* Loads the tokens from token0 on for stages [first, last) of columns, and the weights of lane i's row tile into
     * the L2 cache. `use`: of the first of these stages. */
    static __device__ __forceinline__ void load(const TensorMap &tokens, int token0, const char *row, int k_tiles,
                                                int first, int last, int use) {
        for (int k = first; k < last; k++, use++) {
            const int s = stage_of(use);
            barrier_wait(empty(s), phase_of(use) ^ 1);
            if (lane() == 0) {
                barrier_expect(full(s), kStageBytes);
                copy_box(shared() + s * kStageBytes, tokens, k * kStageColumns, token0, full(s));
            }
            if ((k - first) % 4 == 0) prefetch_weights(row, k + 4, last, k_tiles);
            __syncwarp();
        }
    }

    /* ---- The warps that multiply ------------------------------------------------------------------------------ */

    static __device__ __forceinline__ void give_back(int use) {
        if (use >= 0 && lane() == 0) barrier_arrive(empty(stage_of(use)));
    }

    /* Starts the products of a stage: `a` and `sums` may not be touched until they have been waited for. */
    static __device__ __forceinline__ void start(Sums &sums, const uint32_t (&a)[4][4], int use) {
        const int s = stage_of(use);
        barrier_wait(full(s), phase_of(use));
        __syncwarp();
        products_begin();
        const uint64_t b = operand(shared() + s * kStageBytes);
#pragma unroll
        for (int step = 0; step < 4; step++) warpgroup_multiply(sums, a[step], b + 2 * step);
        products_commit();
    }

    static __device__ __forceinline__ void decode(uint32_t (&a)[4][4], const StageWeights<F> &weights) {
#pragma unroll
        for (int step = 0; step < 4; step++) fragment<F>(a[step], weights, step, lane());
    }

    /* sums = weights · tokens over stages [first, last) of columns, at least one; `row`: this warp's row of tiles. A
     * loop that might end before it begins would let ptxas find other writers of the sums, and wait after each product.
     */
    static __device__ __forceinline__ void multiply(Sums &sums, const char *row, int k_tiles, int first, int last,
                                                    int use) {
        uint32_t even[4][4], odd[4][4];
        StageWeights<F> now = {}, next = {};
#pragma unroll
        for (int i = 0; i < kTokens / 2; i++) sums[i] = 0;
        int k = first, previous = -1;
        load_stage<F>(now, row, k, k_tiles, lane());
        auto stage = [&](uint32_t(&a)[4][4]) {
            if (k + 1 < last) load_stage<F>(next, row, k + 1, k_tiles, lane());
            decode(a, now);
            start(sums, a, use);
            products_wait<1>(); /* those of the stage before */
            give_back(previous);
            previous = use++;
            now = next;
            k++;
        };
        for (;;) {
            stage(even);
            if (k >= last) break;
            stage(odd);
            if (k >= last) break;
        }
        products_wait<0>();
        hold(sums);
        give_back(previous);
    }

    /* Row of the block and token of this thread's sum i. */
    static __device__ __forceinline__ int row_of(int i) { return warp() * kTileRows + lane() / 4 + i % 4 / 2 * 8; }
    static __device__ __forceinline__ int token_of(int i) { return i / 4 * 8 + lane() % 4 * 2 + i % 2; }
};

#endif
