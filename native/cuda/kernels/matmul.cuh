/* The main loop of every product: weights (rows of tiles) times activations (rows of tokens), accumulated in registers.
 *
 * A block of warps, kRowWarps × kTokenWarps of them, multiplies kRowTiles · 16 rows by kTokenTiles · 8 tokens a warp.
 * The dense product, for example, <F, 2, 8, 2, 2, 4>:
 *
 *                  128 tokens (kTokenWarps · kTokenTiles · 8)
 *                ┌────────────────────┬────────────────────┐
 *                │ warp 0             │ warp 1             │ 32 rows: kRowTiles weight tiles of 16,
 *     64 rows    │ 2 × 8 instructions │ row 0, tokens 1    │ each decoded once for the warp's 8 token tiles
 *     (kRowWarps ├────────────────────┼────────────────────┤
 *      · 32)     │ warp 2             │ warp 3             │
 *                └────────────────────┴────────────────────┘
 *
 * The columns come in stages of one weight tile (64 columns; floats 16). The next kStages − 1 of them are always on
 * their way from global to shared memory:
 *
 *     stage    weight tiles of the block's rows │ their headers │ block 0 of all tokens │ block 1 │ scales │ sums
 *
 * A round of the loop waits for a stage, starts the copies of the one that is kStages − 1 ahead, and multiplies. It has
 * no branches: how many token tiles there are is decided outside of it (`run`), addresses step from stage to stage in
 * registers, and rows or tokens that do not exist are computed from others, for nobody to read. */
#ifndef DG_CUDA_MATMUL_CUH
#define DG_CUDA_MATMUL_CUH

#include "cuda/formats/formats.cuh"

/* The arrays of a kind of activations that a product copies: each has 64 bytes a token and weight tile, its scales and
 * sums 8. */
struct ActivationBytes {
    const char *chunks, *scales, *sums;
};

template <class F> static __device__ __forceinline__ ActivationBytes activation_bytes(const Activations &x) {
    if constexpr (F::kActivations == kInt8)
        return {(const char *)x.codes, (const char *)x.scales, (const char *)x.sums};
    else if constexpr (F::kActivations == kFp4Terms)
        return {(const char *)x.terms, (const char *)x.term_scales, nullptr};
    else
        return {(const char *)x.values, nullptr, nullptr};
}

/* A number that a template is to know. */
template <int kValue> struct Constant {
    static constexpr int value = kValue;
};

/* Rows of activations that follow each other. */
struct ConsecutiveRows {
    int first;
    __device__ __forceinline__ int operator()(int token) const { return first + token; }
};

template <class RowOf> struct IsConsecutive : Constant<0> {};
template <> struct IsConsecutive<ConsecutiveRows> : Constant<1> {};

template <class F, int kRowTiles, int kTokenTiles, int kRowWarps, int kTokenWarps, int kStages> struct Product {
    static constexpr int kThreads = 32 * kRowWarps * kTokenWarps;
    static constexpr int kBlockRowTiles = kRowTiles * kRowWarps;
    static constexpr int kBlockTokens = 8 * kTokenTiles * kTokenWarps;

    /* One stage of shared memory. */
    static constexpr bool kHasScales = F::kActivations != kFloats;
    static constexpr int kHeaderOffset = kBlockRowTiles * F::kTileBytes;
    static constexpr int kChunkOffset = kHeaderOffset + kBlockRowTiles * F::kHeaderBytes;
    static constexpr int kScaleOffset = kChunkOffset + kBlockTokens * 64;
    static constexpr int kSumOffset = kScaleOffset + (kHasScales ? kBlockTokens * 8 : 0);
    static constexpr int kStageBytes = kSumOffset + (F::kNeedsSums ? kBlockTokens * 8 : 0);
    static constexpr int kSharedBytes = kStages * kStageBytes;

    using Accumulators = float[kRowTiles][kTokenTiles][4];

    static __device__ __forceinline__ int row_warp() { return (int)threadIdx.x / 32 / kTokenWarps; }
    static __device__ __forceinline__ int token_warp() { return (int)threadIdx.x / 32 % kTokenWarps; }

    /* ---- A thread's share of the copies ----------------------------------------------------------------------- */

    /* Pieces of 16 bytes (scales and sums: 8), dealt out to the threads in turn: thread i has pieces i, i + kThreads, …
     * of each part of a stage. kTokens are copied of those that the block may have. */
    template <int kTokens, bool kConsecutive> struct Copies {
        static constexpr int kTilePieces = F::kTileBytes / 16, kHeaderPieces = F::kHeaderBytes / 16;
        static constexpr int kTiles = (kBlockRowTiles * kTilePieces + kThreads - 1) / kThreads;
        static constexpr int kHeaders = (kBlockRowTiles * kHeaderPieces + kThreads - 1) / kThreads;
        static constexpr int kChunks = (kTokens * 4 + kThreads - 1) / kThreads;
        static constexpr int kScales = kHasScales ? (kTokens + kThreads - 1) / kThreads : 0;

        /* Of each piece: how far it lies behind its array, in units of its own size, so that 32 bits do. */
        int tiles[kTiles], headers[kHeaders > 0 ? kHeaders : 1];
        int chunks[kConsecutive ? 1 : kChunks];
        int scales[kScales > 0 ? kScales : 1]; /* and sums */
        int chunk_stride;                      /* of kConsecutive rows: from piece to piece */
        /* The arrays at the stage that comes next, which is number k. */
        const char *tile_base, *header_base;
        ActivationBytes from;
        int k;
        int n_tokens;

        template <class TileOf, class RowOf>
        __device__ __forceinline__ void begin(const Activations &x, int64_t k_tiles, int first, int n, TileOf tile_of,
                                              RowOf row_of) {
            const int thread = (int)threadIdx.x;
            from = activation_bytes<F>(x);
            from.chunks += (int64_t)first * 64;
            from.scales += (int64_t)first * 8;
            from.sums += (int64_t)first * 8;
            const char *const base = tile_of(0);
            tile_base = base + tile_offset<F>(first);
            header_base = base + header_offset<F>(first);
            k = first;
            n_tokens = n;
#pragma unroll
            for (int i = 0; i < kTiles; i++) {
                const int piece = min(thread + i * kThreads, kBlockRowTiles * kTilePieces - 1);
                tiles[i] = (int)((tile_of(piece / kTilePieces) - base) / 16) + piece % kTilePieces;
            }
            if constexpr (kHeaders > 0) {
#pragma unroll
                for (int i = 0; i < kHeaders; i++) {
                    const int piece = min(thread + i * kThreads, kBlockRowTiles * kHeaderPieces - 1);
                    headers[i] = (int)((tile_of(piece / kHeaderPieces) - base) / 16) + piece % kHeaderPieces;
                }
            }
            chunk_stride = kThreads / 4 * (int)k_tiles * 4;
#pragma unroll
            for (int i = 0; i < (kConsecutive ? 1 : kChunks); i++) {
                const int piece = thread + i * kThreads;
                chunks[i] = row_of(min(piece / 4, n - 1)) * (int)k_tiles * 4 + piece % 4;
            }
#pragma unroll
            for (int i = 0; i < kScales; i++) scales[i] = row_of(min(thread + i * kThreads, n - 1)) * (int)k_tiles;
        }

        /* Whether piece i of this thread, of kAll in all, exists: known to the compiler but for the last ones. */
        template <int kAll> static __device__ __forceinline__ bool exists(int i) {
            return (i + 1) * kThreads <= kAll || (int)threadIdx.x + i * kThreads < kAll;
        }
        /* Of a piece of token j: the block may have fewer tokens than are provided for. */
        template <bool kAllTokens> __device__ __forceinline__ bool wanted(int j) const {
            return kAllTokens || j < n_tokens;
        }

        __device__ __forceinline__ const char *chunk(int i) const {
            return from.chunks + (int64_t)(kConsecutive ? i * chunk_stride + chunks[0] : chunks[i]) * 16;
        }

        /* Starts the copies of the next stage. */
        template <bool kAllTokens> __device__ __forceinline__ void start(int stage) {
            const int thread = (int)threadIdx.x;
            char *const at = shared_memory<char>() + stage * kStageBytes;
#pragma unroll
            for (int i = 0; i < kTiles; i++)
                if (exists<kBlockRowTiles * kTilePieces>(i))
                    cp_async_16(at + (thread + i * kThreads) * 16, tile_base + (int64_t)tiles[i] * 16);
#pragma unroll
            for (int i = 0; i < kHeaders; i++)
                if (exists<kBlockRowTiles * kHeaderPieces>(i))
                    cp_async_16(at + kHeaderOffset + (thread + i * kThreads) * 16,
                                header_base + (int64_t)headers[i] * 16);
            char *const chunk_at =
                at + kChunkOffset + (thread % 4 / 2 * kBlockTokens + thread / 4) * 32 + thread % 2 * 16;
#pragma unroll
            for (int i = 0; i < kChunks; i++)
                if (exists<kTokens * 4>(i) && wanted<kAllTokens>((thread + i * kThreads) / 4))
                    cp_async_16(chunk_at + i * (kThreads / 4) * 32, chunk(i));
#pragma unroll
            for (int i = 0; i < kScales; i++) {
                if (!exists<kTokens>(i) || !wanted<kAllTokens>(thread + i * kThreads)) continue;
                cp_async_8(at + kScaleOffset + (thread + i * kThreads) * 8, from.scales + (int64_t)scales[i] * 8);
                if constexpr (F::kNeedsSums)
                    cp_async_8(at + kSumOffset + (thread + i * kThreads) * 8, from.sums + (int64_t)scales[i] * 8);
            }
            step();
        }

        /* Moves on by a tile of columns. */
        __device__ __forceinline__ void step() {
            const bool header_ends = F::kHeaderBytes > 0 && k % 4 == 3; /* a header belongs to four tiles */
            tile_base += F::kTileBytes + (header_ends ? F::kHeaderBytes : 0);
            header_base += header_ends ? 4 * F::kTileBytes + F::kHeaderBytes : 0;
            from.chunks += 64;
            from.scales += 8;
            from.sums += 8;
            k++;
        }
    };

    /* ---- The loop --------------------------------------------------------------------------------------------- */

    /* acc += weights · activations of one stage, for kTiles token tiles of each warp. */
    template <int kTiles, bool kAllTokens>
    static __device__ __forceinline__ void multiply_stage(Accumulators &acc, const char *stage, int n_tokens) {
        const int lane = (int)threadIdx.x % 32, first_token = token_warp() * kTokenTiles * 8;
        typename F::Raw raw[kRowTiles];
#pragma unroll
        for (int m = 0; m < kRowTiles; m++) {
            const int tile = row_warp() * kRowTiles + m;
            F::load(raw[m], stage + tile * F::kTileBytes, stage + kHeaderOffset + tile * F::kHeaderBytes, lane);
        }
#pragma unroll
        for (int block = 0; block < 2; block++) {
            typename F::Weights weights[kRowTiles];
            __syncwarp(); /* keeps loads of the next block behind this one's: without it registers run out */
#pragma unroll
            for (int m = 0; m < kRowTiles; m++) F::decode(weights[m], raw[m], block);
#pragma unroll
            for (int n = 0; n < kTiles; n++) {
                const int token = first_token + n * 8;
                if (!kAllTokens && token >= n_tokens) continue;
                typename F::Tokens tokens;
                F::load(tokens, stage + kChunkOffset + (block * kBlockTokens + token) * 32,
                        stage + kScaleOffset + token * 8, stage + kSumOffset + token * 8, block, lane);
#pragma unroll
                for (int m = 0; m < kRowTiles; m++) F::multiply(acc[m][n], weights[m], tokens);
            }
        }
    }

    template <int kTiles, bool kAllTokens, class TileOf, class RowOf>
    static __device__ __forceinline__ void loop(Accumulators &acc, const Activations &x, int64_t k_tiles, int first,
                                                int last, int n_tokens, TileOf tile_of, RowOf row_of) {
        /* All of them: none has to stand for others. */
        Copies<8 * kTiles * kTokenWarps, kAllTokens && IsConsecutive<RowOf>::value && (kTokenWarps > 1)> copies;
        copies.begin(x, k_tiles, first, n_tokens, tile_of, row_of);
#pragma unroll
        for (int s = 0; s < kStages - 1; s++) {
            if (first + s < last) copies.template start<kAllTokens>(s);
            cp_async_commit();
        }
        const char *const shared = shared_memory<char>();
        int stage = 0;
#pragma unroll 1
        for (int k = first; k < last; k++) {
            cp_async_wait<kStages - 2>();
            __syncthreads(); /* the stage has arrived for all, and all have finished with the one that is filled next */
            if (copies.k < last) copies.template start<kAllTokens>((stage + kStages - 1) % kStages);
            cp_async_commit();
            multiply_stage<kTiles, kAllTokens>(acc, shared + stage * kStageBytes, n_tokens);
            stage = (stage + 1) % kStages;
        }
        cp_async_wait<0>();
        __syncthreads();
    }

    /* acc = weights · activations over columns of tiles [first, last).
     *
     * tile_of(i)   address of row tile i (0 … kBlockRowTiles − 1) of the block; any other's where it has none
     * row_of(j)    row of `x` of the block's token j < n_tokens
     * The accumulators of rows and tokens that do not exist hold anything. Ends with all threads past their last read
     * of shared memory. */
    template <class TileOf, class RowOf>
    static __device__ __forceinline__ void run(Accumulators &acc, const Activations &x, int64_t k_tiles, int first,
                                               int last, int n_tokens, TileOf tile_of, RowOf row_of) {
#pragma unroll
        for (int m = 0; m < kRowTiles; m++)
#pragma unroll
            for (int n = 0; n < kTokenTiles; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) acc[m][n][i] = 0;
        auto loop_of = [&](auto tiles, auto all_tokens) {
            constexpr int kTiles = decltype(tiles)::value;
            loop<kTiles, decltype(all_tokens)::value>(acc, x, k_tiles, first, last, n_tokens, tile_of, row_of);
            if constexpr (F::kSumFactor != 1.0f)
#pragma unroll
                for (int m = 0; m < kRowTiles; m++)
#pragma unroll
                    for (int n = 0; n < kTiles; n++)
#pragma unroll
                        for (int i = 0; i < 4; i++) acc[m][n][i] *= F::kSumFactor;
        };
        if constexpr (kTokenTiles == 1) {
            loop_of(Constant<1>(), Constant<1>());
        } else if constexpr (kTokenWarps > 1) {
            if (n_tokens == kBlockTokens)
                loop_of(Constant<kTokenTiles>(), Constant<1>());
            else
                loop_of(Constant<kTokenTiles>(), Constant<0>());
        } else { /* experts, most of which have few tokens */
            static_assert(kTokenTiles == 4, "one case for each number of token tiles");
            switch ((n_tokens + 7) / 8) {
            case 1:
                return loop_of(Constant<1>(), Constant<1>());
            case 2:
                return loop_of(Constant<2>(), Constant<1>());
            case 3:
                return loop_of(Constant<3>(), Constant<1>());
            default:
                return loop_of(Constant<4>(), Constant<1>());
            }
        }
    }

    /* What the sums of a row of activations are to be multiplied by. */
    static __device__ __forceinline__ float multiplier(const Activations &x, int64_t row) {
        return F::kActivations == kFp4Terms ? x.term_multipliers[row] : 1.0f;
    }

    /* Calls fn(row of the block, token of the block, accumulator) for all that this thread holds. */
    template <class Fn> static __device__ __forceinline__ void for_each(Accumulators &acc, Fn fn) {
        const int lane = (int)threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < kRowTiles; m++)
#pragma unroll
            for (int n = 0; n < kTokenTiles; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    fn((row_warp() * kRowTiles + m) * kTileRows + lane / 4 + i / 2 * 8,
                       (token_warp() * kTokenTiles + n) * 8 + lane % 4 * 2 + i % 2, acc[m][n][i]);
    }
};

/* The shapes in use. Dense products: 64 rows × 128 tokens in four warps; each pair of warps shares its weights or its
 * tokens. Three blocks to a multiprocessor leave a thread 168 registers, two as many as there are. */
template <class F> using DenseProduct = Product<F, 2, 8, 2, 2, 4>;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 /* where the compiler spills with 168 */
template <class F> constexpr int kDenseBlocks = 2;
#else
template <class F> constexpr int kDenseBlocks = F::kNeedsRegisters ? 2 : 3;
#endif
/* The router's: 32 rows × 32 tokens, as its few rows would leave most multiprocessors idle. */
using RouterProduct = Product<FormatF32, 1, 2, 2, 2, 4>;
/* Experts: 128 rows × 32 tokens in two warps, each with 32 gate and 32 up rows, or 64 rows of down. */
template <class F> using ExpertProduct = Product<F, 4, 4, 2, 1, 4>;
/* A second look at one vocabulary tile for one token: 64 rows × 8 tokens, of which one counts. */
template <class F> using LookProduct = Product<F, 2, 1, 2, 1, 4>;

#endif
