#include "pack.cuh"

namespace {

/* ---- One element of a file's blocks --------------------------------------------------------------------------- */

__device__ uint32_t load_16(const uint8_t *p) { return p[0] | (uint32_t)p[1] << 8; }
__device__ uint32_t load_32(const uint8_t *p) { return load_16(p) | load_16(p + 2) << 16; }
__device__ float load_half(const uint8_t *p) { return half_to_float((uint16_t)load_16(p)); }

__device__ int nibble_of_32(const uint8_t *qs, int e) { return e < 16 ? qs[e] & 15 : qs[e - 16] >> 4; }
__device__ int nibble_of_256(const uint8_t *qs, int e) { return qs[e / 64 * 32 + e % 32] >> e % 64 / 32 * 4 & 15; }

/* The code of element `column` of a row, as formats.cuh wants it (drawings: quant/quant.h). */
__device__ int raw_code(int type, const uint8_t *row, int64_t column) {
    int e = (int)(column % 32), k = (int)(column % 256);
    const uint8_t *b;
    switch (type) {
    case DG_TYPE_Q4_0: return nibble_of_32(row + column / 32 * sizeof(dg_block_q4_0) + 2, e) ^ 8;
    case DG_TYPE_IQ4_NL: return nibble_of_32(row + column / 32 * sizeof(dg_block_iq4_nl) + 2, e);
    case DG_TYPE_Q4_1: return nibble_of_32(row + column / 32 * sizeof(dg_block_q4_1) + 4, e);
    case DG_TYPE_Q5_0:
        b = row + column / 32 * sizeof(dg_block_q5_0);
        return nibble_of_32(b + 6, e) | (int)(load_32(b + 2) >> e & 1) << 4;
    case DG_TYPE_Q5_1:
        b = row + column / 32 * sizeof(dg_block_q5_1);
        return nibble_of_32(b + 8, e) | (int)(load_32(b + 4) >> e & 1) << 4;
    case DG_TYPE_Q8_0: return (int8_t)row[column / 32 * sizeof(dg_block_q8_0) + 2 + e];
    case DG_TYPE_NVFP4:
        b = row + column / 64 * sizeof(dg_block_nvfp4) + 4 + column % 64 / 16 * 8;
        return e % 16 < 8 ? b[e % 16] & 15 : b[e % 16 - 8] >> 4;
    case DG_TYPE_Q4_K: return nibble_of_256(row + column / 256 * sizeof(dg_block_q4_k) + 16, k);
    case DG_TYPE_Q5_K:
        b = row + column / 256 * sizeof(dg_block_q5_k);
        return nibble_of_256(b + 48, k) | (b[16 + k % 32] >> k / 32 & 1) << 4;
    case DG_TYPE_Q6_K: {
        b = row + column / 256 * sizeof(dg_block_q6_k);
        int low = b[k / 128 * 64 + k % 64] >> k % 128 / 64 * 4 & 15;
        int high = b[128 + k / 128 * 32 + k % 32] >> k % 128 / 32 * 2 & 3;
        return (low | high << 4) ^ 32;
    }
    default: return 0;
    }
}

/* The 6-bit scale and minimum of group i (0 … 7) of Q4_K and Q5_K. */
__device__ void k_scale(const uint8_t *scales, int i, int *scale, int *minimum) {
    if (i < 4) {
        *scale = scales[i] & 63;
        *minimum = scales[i + 4] & 63;
    } else {
        *scale = (scales[i + 4] & 15) | scales[i - 4] >> 6 << 4;
        *minimum = scales[i + 4] >> 4 | scales[i] >> 6 << 4;
    }
}

/* Scale and minimum of the group that element `column` is in. */
__device__ void raw_scale(int type, const uint8_t *row, int64_t column, float *scale, float *minimum) {
    const uint8_t *b;
    *minimum = 0;
    switch (type) {
    case DG_TYPE_Q4_0: *scale = load_half(row + column / 32 * sizeof(dg_block_q4_0)); return;
    case DG_TYPE_IQ4_NL: *scale = load_half(row + column / 32 * sizeof(dg_block_iq4_nl)); return;
    case DG_TYPE_Q8_0: *scale = load_half(row + column / 32 * sizeof(dg_block_q8_0)); return;
    case DG_TYPE_Q4_1:
    case DG_TYPE_Q5_1:
        b = row + column / 32 * (type == DG_TYPE_Q4_1 ? sizeof(dg_block_q4_1) : sizeof(dg_block_q5_1));
        *scale = load_half(b);
        *minimum = load_half(b + 2);
        return;
    case DG_TYPE_Q5_0:
        *scale = load_half(row + column / 32 * sizeof(dg_block_q5_0));
        *minimum = -16 * *scale;
        return;
    case DG_TYPE_Q4_K:
    case DG_TYPE_Q5_K: {
        b = row + column / 256 * (type == DG_TYPE_Q4_K ? sizeof(dg_block_q4_k) : sizeof(dg_block_q5_k));
        int s, m;
        k_scale(b + 4, (int)(column % 256) / 32, &s, &m);
        *scale = load_half(b) * (float)s;
        *minimum = -load_half(b + 2) * (float)m;
        return;
    }
    case DG_TYPE_Q6_K:
        b = row + column / 256 * sizeof(dg_block_q6_k);
        *scale = load_half(b + 208) * (float)(int8_t)b[192 + column % 256 / 16];
        return;
    default: *scale = 0; return;
    }
}

/* ---- Tiles ---------------------------------------------------------------------------------------------------- */

struct Source {
    int type;
    const uint8_t *raw;
    int64_t n_rows, n_cols;
    uint64_t row_bytes;
};

template <class F> __device__ void pack_integer_lane(const Source &s, int64_t row0, int64_t column0, int lane, char *tile) {
    int g = lane / 4, t = lane % 4;
    uint32_t words[4] = {0, 0, 0, 0}, high[2] = {0, 0}, bytes[8] = {0};
    for (int w = 0; w < 8; w++) /* fragment words of both blocks */
        for (int i = 0; i < 4; i++) {
            int64_t row = row0 + g + w % 2 * 8, column = column0 + w / 4 * 32 + w % 4 / 2 * 16 + t * 4 + i;
            if (row >= s.n_rows || column >= s.n_cols) continue;
            uint32_t code = (uint32_t)raw_code(s.type, s.raw + (uint64_t)row * s.row_bytes, column);
            constexpr bool table = F::kKind == kTableIq4 || F::kKind == kTableE2m1;
            words[w / 2] |= (code & 15) << (table ? 4 * i + w % 2 * 16 : 8 * i + w % 2 * 4);
            if (F::kKind == kFiveBits) high[0] |= (code >> 4 & 1) << (8 * i + w);
            if (F::kKind == kSixBits) high[w / 4] |= (code >> 4 & 3) << (8 * i + w % 4 * 2);
            bytes[w] |= (code & 0xff) << 8 * i;
        }
    if (F::kKind == kByte) {
        for (int w = 0; w < 8; w++) reinterpret_cast<uint32_t *>(tile)[(w / 4 * 32 + lane) * 4 + w % 4] = bytes[w];
    } else {
        for (int w = 0; w < 4; w++) reinterpret_cast<uint32_t *>(tile)[lane * 4 + w] = words[w];
    }
    uint32_t *high_words = reinterpret_cast<uint32_t *>(tile + F::kHighOffset);
    if (F::kKind == kFiveBits) high_words[lane] = high[0];
    if (F::kKind == kSixBits) {
        high_words[2 * lane] = high[0];
        high_words[2 * lane + 1] = high[1];
    }
    if (t >= F::kGroups) return;
    for (int half = 0; half < 2; half++) { /* lane t of a row writes its group t */
        int64_t row = row0 + g + 8 * half, column = column0 + t * (64 / F::kGroups);
        bool inside = row < s.n_rows && column < s.n_cols;
        const uint8_t *row_bytes = s.raw + (inside ? (uint64_t)row * s.row_bytes : 0);
        int index = (g * 2 + half) * F::kGroups + t;
        if (F::kKind == kTableE2m1) {
            uint8_t code = inside ? row_bytes[column / 64 * sizeof(dg_block_nvfp4) + t] & 0x7f : 0;
            tile[F::kScaleOffset + index] = (char)(code == 0x7f ? 0 : code); /* NaN reads as zero */
            continue;
        }
        float scale = 0, minimum = 0;
        if (inside) raw_scale(s.type, row_bytes, column, &scale, &minimum);
        reinterpret_cast<uint16_t *>(tile + F::kScaleOffset)[index] = float_to_half(scale);
        if (F::kHasMinimum) reinterpret_cast<uint16_t *>(tile + F::kMinimumOffset)[index] = float_to_half(minimum);
    }
}

template <class F> __device__ void pack_float_lane(const Source &s, int64_t row0, int64_t column0, int lane, char *tile) {
    for (int w = 0; w < 8; w++) {
        int64_t row = row0 + lane / 4 + w % 2 * 8, column = column0 + w / 4 * 8 + w % 4 / 2 * 4 + lane % 4;
        bool inside = row < s.n_rows && column < s.n_cols;
        const uint8_t *source = s.raw + (inside ? (uint64_t)row * s.row_bytes : 0);
        if (F::kKind == kFloat32)
            reinterpret_cast<uint32_t *>(tile)[(w / 4 * 32 + lane) * 4 + w % 4] =
                inside ? load_32(source + column * 4) : 0;
        else
            reinterpret_cast<uint16_t *>(tile)[lane * 8 + w] = (uint16_t)(inside ? load_16(source + column * 2) : 0);
    }
}

template <class F> __global__ void pack_kernel(Source s, int64_t k_tiles, int64_t n_tiles, char *tiles) {
    int64_t tile = (int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (tile >= n_tiles) return;
    int64_t row0 = tile / k_tiles * kTileRows, column0 = tile % k_tiles * F::kTileCols;
    char *target = tiles + tile * F::kTileBytes;
    if constexpr (F::kInteger)
        pack_integer_lane<F>(s, row0, column0, (int)threadIdx.x % 32, target);
    else
        pack_float_lane<F>(s, row0, column0, (int)threadIdx.x % 32, target);
}

} // namespace

/* The engine plans memory by the sizes in layout.h. */
template <class F, int kBytes> constexpr bool has_planned_size =
    F::kTileBytes == kBytes && F::kTileCols == (F::kInteger ? kIntegerTileCols : kFloatTileCols);
static_assert(has_planned_size<FormatQ4_0, kNibbleTileBytes>, "layout.h");
static_assert(has_planned_size<FormatIq4Nl, kNibbleTileBytes>, "layout.h");
static_assert(has_planned_size<FormatNvfp4, kNibbleTileBytes>, "layout.h");
static_assert(has_planned_size<FormatNibbleMin, kNibbleMinTileBytes>, "layout.h");
static_assert(has_planned_size<FormatFiveMin, kFiveMinTileBytes>, "layout.h");
static_assert(has_planned_size<FormatQ6K, kSixTileBytes>, "layout.h");
static_assert(has_planned_size<FormatQ8_0, kByteTileBytes>, "layout.h");
static_assert(has_planned_size<FormatF16, kHalfTileBytes>, "layout.h");
static_assert(has_planned_size<FormatBf16, kHalfTileBytes>, "layout.h");
static_assert(has_planned_size<FormatF32, kFloatTileBytes>, "layout.h");

PackedShape packed_shape(int32_t type, int64_t n_rows, int64_t n_cols) {
    PackedShape shape = {};
    shape.known = with_format(type, [&](auto format) {
        using F = decltype(format);
        shape.integer = F::kInteger;
        shape.tile_cols = F::kTileCols;
        shape.k_tiles = (n_cols + F::kTileCols - 1) / F::kTileCols;
        shape.row_tiles = (n_rows + kTileRows - 1) / kTileRows;
        shape.row_tile_bytes = (uint64_t)shape.k_tiles * F::kTileBytes;
        shape.bytes = (uint64_t)shape.row_tiles * shape.row_tile_bytes;
    });
    return shape;
}

void pack_rows(int32_t type, const uint8_t *raw, uint64_t row_bytes, int64_t n_rows, int64_t n_cols, char *tiles,
               cudaStream_t stream) {
    PackedShape shape = packed_shape(type, n_rows, n_cols);
    Source source = {type, raw, n_rows, n_cols, row_bytes};
    int64_t n_tiles = shape.row_tiles * shape.k_tiles;
    with_format(type, [&](auto format) {
        launch(pack_kernel<decltype(format)>, dim3((unsigned)((n_tiles + 3) / 4)), dim3(128), 0, stream, source,
               shape.k_tiles, n_tiles, tiles);
    });
}
