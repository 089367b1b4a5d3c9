/* The main loop of every product: weights (rows of tiles) times activations (rows of tokens), accumulated in registers.
 *
 * A block of kRowWarps × kTokenWarps warps computes kRowTiles · 16 rows × kTokenTiles · 8 tokens per warp. Weights and
 * activations of the next kStages − 1 tiles of columns are always under way from global to shared memory. */
#ifndef DG_CUDA_MATMUL_CUH
#define DG_CUDA_MATMUL_CUH

#include "cuda/formats/formats.cuh"

template <class F, int kRowTiles, int kTokenTiles, int kRowWarps, int kTokenWarps, int kStages> struct Product {
    static constexpr int kThreads = 32 * kRowWarps * kTokenWarps;
    static constexpr int kBlockRowTiles = kRowTiles * kRowWarps;
    static constexpr int kBlockTokens = 8 * kTokenTiles * kTokenWarps;

    /* One stage of shared memory: weights (kBlockRowTiles, tile and header), chunks (2 blocks, kBlockTokens, 32 bytes),
     * scales and sums (kBlockTokens, 2). Behind all stages: the addresses of the rows of tiles, and the tokens' rows of
     * activations. */
    static constexpr bool kHasScales = F::kActivations != kFloats;
    static constexpr int kWeightBytes = F::kTileBytes + F::kHeaderBytes;
    static constexpr int kChunkOffset = kBlockRowTiles * kWeightBytes;
    static constexpr int kScaleOffset = kChunkOffset + kBlockTokens * 64;
    static constexpr int kSumOffset = kScaleOffset + (kHasScales ? kBlockTokens * 8 : 0);
    static constexpr int kStageBytes = kSumOffset + (F::kNeedsSums ? kBlockTokens * 8 : 0);
    static constexpr int kTilesOffset = kStages * kStageBytes;
    static constexpr int kRowsOffset = kTilesOffset + kBlockRowTiles * 8;
    static constexpr int kSharedBytes = kRowsOffset + kBlockTokens * 4;

    using Accumulators = float[kRowTiles][kTokenTiles][4];

    static __device__ __forceinline__ int row_warp() { return (int)threadIdx.x / 32 / kTokenWarps; }
    static __device__ __forceinline__ int token_warp() { return (int)threadIdx.x / 32 % kTokenWarps; }

    static __device__ __forceinline__ void copy_stage(char *shared, int stage, int k_tile, int64_t k_tiles,
                                                      int n_tokens, const Activations &x) {
        const char *const *tiles = reinterpret_cast<const char *const *>(shared + kTilesOffset);
        const int *rows = reinterpret_cast<const int *>(shared + kRowsOffset);
        char *to = shared + stage * kStageBytes;
        const char *chunks = reinterpret_cast<const char *>(F::kActivations == kInt8       ? (const void *)x.codes
                                                            : F::kActivations == kFp4Terms ? (const void *)x.terms
                                                                                           : (const void *)x.values);
        constexpr int kTilePieces = F::kTileBytes / 16, kPieces = kWeightBytes / 16;
        for (int i = (int)threadIdx.x; i < kBlockRowTiles * kPieces; i += kThreads) {
            const char *tile = tiles[i / kPieces];
            const int piece = i % kPieces;
            const int64_t offset = piece < kTilePieces ? tile_offset<F>(k_tile) + piece * 16
                                                       : header_offset<F>(k_tile) + (piece - kTilePieces) * 16;
            cp_async_16(to + i * 16, tile != nullptr ? tile + offset : chunks, tile != nullptr);
        }
        for (int i = (int)threadIdx.x; i < n_tokens * 4; i += kThreads) {
            const int token = i / 4, piece = i % 4;
            const int64_t row = rows[token];
            const char *from = chunks + ((row < 0 ? 0 : row) * k_tiles + k_tile) * 64 + piece * 16;
            cp_async_16(to + kChunkOffset + (piece / 2 * kBlockTokens + token) * 32 + piece % 2 * 16, from, row >= 0);
        }
        if constexpr (kHasScales) {
            const char *scales = reinterpret_cast<const char *>(F::kActivations == kInt8 ? (const void *)x.scales
                                                                                         : (const void *)x.term_scales);
            for (int i = (int)threadIdx.x; i < n_tokens; i += kThreads) {
                const int64_t row = rows[i], from = ((row < 0 ? 0 : row) * k_tiles + k_tile) * 8;
                cp_async_8(to + kScaleOffset + i * 8, scales + from, row >= 0);
                if constexpr (F::kNeedsSums)
                    cp_async_8(to + kSumOffset + i * 8, reinterpret_cast<const char *>(x.sums) + from, row >= 0);
            }
        }
    }

    /* acc = weights · activations over columns of tiles [first, last).
     *
     * tile_of(i)   address of row tile i (0 … kBlockRowTiles − 1) of the block, or NULL: zeros
     * row_of(j)    row of `x` of the block's token j < n_tokens
     * Tokens from n_tokens on are not computed; their accumulators are zero or the product of a zero row. Ends with all
     * threads past their last read of shared memory. */
    template <class TileOf, class RowOf>
    static __device__ __forceinline__ void run(Accumulators &acc, const Activations &x, int64_t k_tiles, int first,
                                               int last, int n_tokens, TileOf tile_of, RowOf row_of) {
        char *shared = shared_memory<char>();
        const int lane = (int)threadIdx.x % 32;
        const int padded_tokens = (n_tokens + 7) / 8 * 8;
        const char **tiles = reinterpret_cast<const char **>(shared + kTilesOffset);
        int *rows = reinterpret_cast<int *>(shared + kRowsOffset);
        for (int i = (int)threadIdx.x; i < kBlockRowTiles; i += kThreads) tiles[i] = tile_of(i);
        for (int i = (int)threadIdx.x; i < padded_tokens; i += kThreads) rows[i] = i < n_tokens ? row_of(i) : -1;
#pragma unroll
        for (int m = 0; m < kRowTiles; m++)
#pragma unroll
            for (int n = 0; n < kTokenTiles; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) acc[m][n][i] = 0;
        __syncthreads();

#pragma unroll
        for (int s = 0; s < kStages - 1; s++) {
            if (first + s < last) copy_stage(shared, s, first + s, k_tiles, padded_tokens, x);
            cp_async_commit();
        }
        const int first_token = token_warp() * kTokenTiles * 8;
        for (int k = first; k < last; k++) {
            cp_async_wait<kStages - 2>();
            __syncthreads(); /* stage k has arrived for all, and all have finished with the one that is filled next */
            int next = k + kStages - 1;
            if (next < last) copy_stage(shared, (next - first) % kStages, next, k_tiles, padded_tokens, x);
            cp_async_commit();

            const char *stage = shared + (k - first) % kStages * kStageBytes;
            typename F::Raw raw[kRowTiles];
#pragma unroll
            for (int m = 0; m < kRowTiles; m++) {
                const char *tile = stage + (row_warp() * kRowTiles + m) * kWeightBytes;
                F::load(raw[m], tile, tile + F::kTileBytes, lane);
            }
#pragma unroll
            for (int block = 0; block < 2; block++) {
                typename F::Weights weights[kRowTiles];
#pragma unroll
                for (int m = 0; m < kRowTiles; m++) F::decode(weights[m], raw[m], block);
#pragma unroll
                for (int n = 0; n < kTokenTiles; n++) {
                    const int token = first_token + n * 8;
                    if (token >= n_tokens) continue;
                    typename F::Tokens tokens;
                    F::load(tokens, stage + kChunkOffset + (block * kBlockTokens + token) * 32,
                            stage + kScaleOffset + token * 8, stage + kSumOffset + token * 8, block, lane);
#pragma unroll
                    for (int m = 0; m < kRowTiles; m++) F::multiply(acc[m][n], weights[m], tokens);
                }
            }
        }
        cp_async_wait<0>();
        __syncthreads();
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

/* The shapes in use. Dense products: 64 rows × 128 tokens in four warps, four blocks to a multiprocessor; each pair of
 * warps shares its weights or its tokens. */
template <class F> using DenseProduct = Product<F, 2, 8, 2, 2, 4>;
/* Experts: 128 rows × 32 tokens in two warps, each with 32 gate and 32 up rows, or 64 rows of down. */
template <class F> using ExpertProduct = Product<F, 4, 4, 2, 1, 4>;
/* A second look at one vocabulary tile for one token: 64 rows × 8 tokens, of which one counts. */
template <class F> using LookProduct = Product<F, 2, 1, 2, 1, 4>;

#endif
