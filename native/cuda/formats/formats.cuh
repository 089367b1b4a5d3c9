/* How weights lie in device memory, and how a tile of them is multiplied.
 *
 * A file's blocks are repacked once, when a model is loaded (pack.cu), into tiles of 16 rows × 64 columns (floats: 16 ×
 * 16) in the order in which the 32 lanes of a warp need them for a matrix instruction. A lane then reads its share of a
 * tile with one or two 16-byte loads, whole tiles are copied with 16-byte asynchronous copies, and nothing is shuffled.
 * Types with super-blocks keep their factors for 256 columns in a header behind each four tiles.
 *
 * In what follows lane = 4·g + t: g (0 … 7) is a row of the fragment, t (0 … 3) a step along its columns.
 *
 * A format F is used in three steps, so that only a block of its tile is decoded at a time:
 *
 *     F::Raw raw;      F::load(raw, tile, header, lane)            a tile's words as they are stored
 *     F::Weights w;    F::decode(w, raw, block)                    16 rows of block 0 or 1
 *     F::Tokens x;     F::load(x, chunks, scales, sums, block, lane)    of eight tokens, in shared memory
 *     F::multiply(acc, w, x)     acc (16 rows, 8 tokens) += w · x / F::kSumFactor; acc[2·half + i]: row g + 8·half,
 * token 2·t + i */
#ifndef DG_CUDA_FORMATS_CUH
#define DG_CUDA_FORMATS_CUH

#include "cuda/intrinsics.cuh"

#include "cuda/layout.h"

/* What layout.h, which C reads as well, names with a prefix. */
constexpr int kTileRows = DG_CUDA_TILE_ROWS;
constexpr int kProductRows = DG_CUDA_PRODUCT_ROWS;
constexpr int kProductTokens = DG_CUDA_PRODUCT_TOKENS;
constexpr int kProductSplits = DG_CUDA_PRODUCT_SPLITS;
constexpr int kAttentionPartials = DG_CUDA_ATTENTION_PARTIALS;
constexpr int kWorkTokens = DG_CUDA_WORK_TOKENS;
constexpr int kMaxLooks = DG_CUDA_MAX_LOOKS;
constexpr int kVocabularyBlock = DG_CUDA_VOCABULARY_BLOCK;
constexpr int kVocabularyChunk = DG_CUDA_VOCABULARY_CHUNK;
constexpr int kMaxRowColumns = DG_CUDA_MAX_ROW_COLUMNS;
constexpr int kMaxCanvas = DG_CUDA_MAX_CANVAS;
constexpr int kSoftSplits = DG_CUDA_SOFT_SPLITS;
constexpr int kSoftTokens = DG_CUDA_SOFT_TOKENS;
using Activations = dg_cuda_activations;
using MoeScratch = dg_cuda_moe_scratch;
using HeadRow = dg_cuda_head_row;
using HeadScratch = dg_cuda_head_scratch;

/* Rows of activations as the products read them. Columns are padded with zeros to whole tiles. Every kind has 64 bytes
 * for each tile of columns, in two blocks of 32 bytes; lane t reads bytes 8·t … 8·t + 7 of a block. */
enum ActivationKind {
    kInt8, /* int8 with a scale for each 32 columns: byte 8·t + 4·h + i of block b is column 32·b + 16·h + 4·t + i */
    kFp4Terms, /* see format_fp4.cuh */
    kFloats,   /* float32, tiles of 16 columns: float 2·t + h of block b is column 8·b + 4·h + t */
    kHalves    /* float16 times a power of two for the row, 64 columns a stage: half_position (hopper/) */
};
constexpr int kActivationKinds = 4;

static __device__ __forceinline__ int code_position(int column) {
    return column / 32 * 32 + column % 16 / 4 * 8 + column % 32 / 16 * 4 + column % 4;
}
static __device__ __forceinline__ int value_position(int column) {
    return column / 8 * 8 + column % 4 * 2 + column % 8 / 4;
}
static __device__ __forceinline__ int half_position(int column) {
    return column / 16 * 16 + column % 2 * 8 + column % 16 / 4 * 2 + column % 4 / 2;
}

/* Where tile k of a row of tiles stands, and the header that belongs to it. */
template <class F> static __host__ __device__ __forceinline__ int64_t tile_offset(int64_t k) {
    if constexpr (F::kHeaderBytes == 0) return k * F::kTileBytes;
    return k * F::kTileBytes + k / 4 * F::kHeaderBytes;
}
template <class F> static __host__ __device__ __forceinline__ int64_t header_offset(int64_t k) {
    return (k / 4 + 1) * 4 * F::kTileBytes + k / 4 * F::kHeaderBytes;
}
/* Bytes of a row of tiles. */
template <class F> static __host__ __device__ __forceinline__ int64_t row_tile_bytes(int64_t k_tiles) {
    return k_tiles * F::kTileBytes + (k_tiles + 3) / 4 * F::kHeaderBytes;
}

#include "cuda/formats/floats.cuh"
#include "cuda/formats/fp4.cuh"
#include "cuda/formats/integers.cuh"

/* Calls fn(half, slot, value) for the values that `lane` holds of a tile, slot < F::kLaneColumns: row g + 8·half,
 * column F::lane_column(slot, t). */
template <class F, class Fn>
static __device__ __forceinline__ void for_each_value(const char *row_tile, int64_t k, int lane, Fn fn) {
    typename F::Raw raw;
    F::load(raw, row_tile + tile_offset<F>(k), row_tile + header_offset<F>(k), lane);
    F::for_each_value(raw, lane, fn);
}

using FormatQ4_0 = IntegerFormat<kSignedNibble, 32, false, false>;
using FormatQ4_1 = IntegerFormat<kNibble, 32, true, false>;
using FormatQ5_0 = IntegerFormat<kSignedFiveBits, 32, false, false>;
using FormatQ5_1 = IntegerFormat<kFiveBits, 32, true, false>;
using FormatQ8_0 = IntegerFormat<kByte, 32, false, false>;
using FormatQ2K = IntegerFormat<kTwoBits, 16, true, true>;
using FormatQ3K = IntegerFormat<kThreeBits, 16, false, true>;
using FormatQ4K = IntegerFormat<kNibble, 32, true, true>;
using FormatQ5K = IntegerFormat<kFiveBits, 32, true, true>;
using FormatQ6K = IntegerFormat<kSixBits, 16, false, true>;
using FormatIq4Nl = IntegerFormat<kTableIq4, 32, false, false>;
using FormatIq4Xs = IntegerFormat<kTableIq4, 32, false, true>;
using FormatNvfp4 = IntegerFormat<kTableE2m1, 16, false, false>;
using FormatFp4 = NativeFp4Format;
using FormatF16 = FloatFormat<kFloat16>;
using FormatBf16 = FloatFormat<kBfloat16>;
using FormatF32 = FloatFormat<kFloat32>;

#define CHECK(number, Format, columns, tile, header)                                                                   \
    static_assert((Format::kActivations == kFloats) == DG_CUDA_IS_FLOAT(number), "layout.c plans activations by it");
DG_CUDA_FORMATS(CHECK)
#undef CHECK

#endif
