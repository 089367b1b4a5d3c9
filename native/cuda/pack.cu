/* Element by element: it happens once for each weight, while the file comes in at the speed of the bus. */
#include "cuda/pack.cuh"

namespace {

/* ---- One element of a file's blocks --------------------------------------------------------------------------- */

__device__ uint32_t load_16(const uint8_t *p) { return p[0] | (uint32_t)p[1] << 8; }
__device__ uint32_t load_32(const uint8_t *p) { return load_16(p) | load_16(p + 2) << 16; }
__device__ float load_half(const uint8_t *p) { return half_to_float((uint16_t)load_16(p)); }

__device__ int nibble_of_32(const uint8_t *qs, int e) { return e < 16 ? qs[e] & 15 : qs[e - 16] >> 4; }
__device__ int nibble_of_256(const uint8_t *qs, int e) { return qs[e / 64 * 32 + e % 32] >> e % 64 / 32 * 4 & 15; }

__device__ int pair_of_256(const uint8_t *qs, int e) { return qs[e / 128 * 32 + e % 32] >> e % 128 / 32 * 2 & 3; }

/* The code of element `column` of a row, as formats.cuh wants it (drawings: quant/blocks.h). */
__device__ int raw_code(int type, const uint8_t *row, int64_t column) {
    int e = (int)(column % 32), k = (int)(column % 256);
    const uint8_t *b;
    switch (type) {
    case DG_TYPE_Q4_0:
        return nibble_of_32(row + column / 32 * sizeof(dg_block_q4_0) + 2, e) ^ 8;
    case DG_TYPE_IQ4_NL:
        return nibble_of_32(row + column / 32 * sizeof(dg_block_iq4_nl) + 2, e);
    case DG_TYPE_Q4_1:
        return nibble_of_32(row + column / 32 * sizeof(dg_block_q4_1) + 4, e);
    case DG_TYPE_Q5_0:
        b = row + column / 32 * sizeof(dg_block_q5_0);
        return (nibble_of_32(b + 6, e) | (int)(load_32(b + 2) >> e & 1) << 4) ^ 16;
    case DG_TYPE_Q5_1:
        b = row + column / 32 * sizeof(dg_block_q5_1);
        return nibble_of_32(b + 8, e) | (int)(load_32(b + 4) >> e & 1) << 4;
    case DG_TYPE_Q8_0:
        return (int8_t)row[column / 32 * sizeof(dg_block_q8_0) + 2 + e];
    case DG_TYPE_NVFP4:
    case DG_CUDA_TYPE_FP4:
        b = row + column / 64 * sizeof(dg_block_nvfp4) + 4 + column % 64 / 16 * 8;
        return e % 16 < 8 ? b[e % 16] & 15 : b[e % 16 - 8] >> 4;
    case DG_TYPE_Q2_K:
        return pair_of_256(row + column / 256 * sizeof(dg_block_q2_k) + 16, k);
    case DG_TYPE_Q3_K:
        b = row + column / 256 * sizeof(dg_block_q3_k);
        return (pair_of_256(b + 32, k) | (b[k % 32] >> k / 32 & 1) << 2) ^ 4;
    case DG_TYPE_IQ4_XS:
        return nibble_of_32(row + column / 256 * sizeof(dg_block_iq4_xs) + 8 + k / 32 * 16, e);
    case DG_TYPE_Q4_K:
        return nibble_of_256(row + column / 256 * sizeof(dg_block_q4_k) + 16, k);
    case DG_TYPE_Q5_K:
        b = row + column / 256 * sizeof(dg_block_q5_k);
        return nibble_of_256(b + 48, k) | (b[16 + k % 32] >> k / 32 & 1) << 4;
    case DG_TYPE_Q6_K: {
        b = row + column / 256 * sizeof(dg_block_q6_k);
        int low = b[k / 128 * 64 + k % 64] >> k % 128 / 64 * 4 & 15;
        int high = b[128 + k / 128 * 32 + k % 32] >> k % 128 / 32 * 2 & 3;
        return (low | high << 4) ^ 32;
    }
    default:
        return 0;
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

/* Scale and minimum of the group that element `column` of a type without super-blocks is in. */
__device__ void raw_scale(int type, const uint8_t *row, int64_t column, float *scale, float *minimum) {
    const int64_t block = column / 32;
    *minimum = 0;
    switch (type) {
    case DG_TYPE_Q4_0:
        row += block * sizeof(dg_block_q4_0);
        break;
    case DG_TYPE_Q5_0:
        row += block * sizeof(dg_block_q5_0);
        break;
    case DG_TYPE_Q8_0:
        row += block * sizeof(dg_block_q8_0);
        break;
    case DG_TYPE_IQ4_NL:
        row += block * sizeof(dg_block_iq4_nl);
        break;
    default:
        row += block * (type == DG_TYPE_Q4_1 ? sizeof(dg_block_q4_1) : sizeof(dg_block_q5_1));
        *minimum = load_half(row + 2);
    }
    *scale = load_half(row);
}

/* The bytes that scale and minimum of the group that element `column` is in have in a super-block; q2_k: both in one.
 */
__device__ void raw_super_scale(int type, const uint8_t *row, int64_t column, uint8_t *scale, uint8_t *minimum) {
    const int k = (int)(column % 256), i = k / 32;
    const uint8_t *b;
    int s = 0, m = 0;
    switch (type) {
    case DG_TYPE_Q2_K:
        s = row[column / 256 * sizeof(dg_block_q2_k) + k / 16];
        break;
    case DG_TYPE_Q3_K: {
        const int group = k / 16;
        b = row + column / 256 * sizeof(dg_block_q3_k) + 96;
        s = (b[group % 8] >> group / 8 * 4 & 15) | (b[8 + group % 4] >> group / 4 * 2 & 3) << 4;
        s -= 32;
        break;
    }
    case DG_TYPE_Q4_K:
    case DG_TYPE_Q5_K:
        b = row + column / 256 * (type == DG_TYPE_Q4_K ? sizeof(dg_block_q4_k) : sizeof(dg_block_q5_k));
        k_scale(b + 4, i, &s, &m);
        break;
    case DG_TYPE_Q6_K:
        s = (int8_t)row[column / 256 * sizeof(dg_block_q6_k) + 192 + k / 16];
        break;
    case DG_TYPE_IQ4_XS:
        b = row + column / 256 * sizeof(dg_block_iq4_xs);
        s = ((b[4 + i / 2] >> i % 2 * 4 & 15) | (int)(load_16(b + 2) >> 2 * i & 3) << 4) - 32;
        break;
    }
    *scale = (uint8_t)s;
    *minimum = (uint8_t)m;
}

/* The float16 factor of scales or minima of the super-block that element `column` is in; minima are subtracted in
 * files, added in tiles. */
__device__ uint16_t raw_factor(int type, const uint8_t *row, int64_t column, bool of_minima) {
    const int64_t block = column / 256;
    int offset;
    switch (type) {
    case DG_TYPE_Q2_K:
        offset = (int)sizeof(dg_block_q2_k) - 4;
        row += block * sizeof(dg_block_q2_k);
        break;
    case DG_TYPE_Q3_K:
        offset = (int)sizeof(dg_block_q3_k) - 2;
        row += block * sizeof(dg_block_q3_k);
        break;
    case DG_TYPE_Q4_K:
        offset = 0;
        row += block * sizeof(dg_block_q4_k);
        break;
    case DG_TYPE_Q5_K:
        offset = 0;
        row += block * sizeof(dg_block_q5_k);
        break;
    case DG_TYPE_Q6_K:
        offset = (int)sizeof(dg_block_q6_k) - 2;
        row += block * sizeof(dg_block_q6_k);
        break;
    default:
        offset = 0;
        row += block * sizeof(dg_block_iq4_xs);
        break;
    }
    return (uint16_t)(load_16(row + offset + (of_minima ? 2 : 0)) ^ (of_minima ? 0x8000 : 0));
}

/* ---- Tiles ---------------------------------------------------------------------------------------------------- */

struct Source {
    int type;
    const uint8_t *raw;
    int64_t n_rows, n_cols;
    uint64_t row_bytes;
};

/* The scale of a group of NVFP4; NaN reads as zero. */
__device__ uint8_t fp4_scale(const uint8_t *row, int64_t column) {
    const uint8_t code = row[column / 64 * sizeof(dg_block_nvfp4) + column % 64 / 16] & 0x7f;
    return code == 0x7f ? 0 : code;
}

template <class F>
__device__ void pack_integer_lane(const Source &s, int64_t row0, int64_t column0, int lane, char *tile, char *header) {
    int g = lane / 4, t = lane % 4;
    uint32_t nibbles[4] = {0}, pairs[2] = {0}, bits = 0, bytes[8] = {0};
    constexpr bool table = F::kKind == kTableIq4 || F::kKind == kTableE2m1;
    constexpr int low = F::kHasNibbles ? 4 : 0; /* bits of a code that are not in pairs or bits */
    for (int w = 0; w < 8; w++)                 /* fragment words of both blocks */
        for (int i = 0; i < 4; i++) {
            int64_t row = row0 + g + w % 2 * 8, column = column0 + w / 4 * 32 + w % 4 / 2 * 16 + t * 4 + i;
            if (row >= s.n_rows || column >= s.n_cols) continue;
            uint32_t code = (uint32_t)raw_code(s.type, s.raw + (uint64_t)row * s.row_bytes, column);
            nibbles[w / 2] |= (code & 15) << (table ? 4 * i + w % 2 * 16 : 8 * i + w % 2 * 4);
            pairs[w / 4] |= (code >> low & 3) << (8 * i + w % 4 * 2);
            bits |= (code >> (F::kHasPairs ? low + 2 : low) & 1) << (8 * i + w);
            bytes[w] |= (code & 0xff) << 8 * i;
        }
    auto store = [&](int offset, uint32_t word) { *reinterpret_cast<uint32_t *>(tile + offset) = word; };
    if constexpr (F::kKind == kByte)
        for (int w = 0; w < 8; w++) store((w / 4 * 32 + lane) * 16 + w % 4 * 4, bytes[w]);
    if constexpr (F::kHasNibbles)
        for (int w = 0; w < 4; w++) store(lane * 16 + w * 4, nibbles[w]);
    if constexpr (F::kHasPairs)
        for (int w = 0; w < 2; w++) store(F::kPairOffset + lane * 8 + w * 4, pairs[w]);
    if constexpr (F::kHasBits) store(F::kBitOffset + lane * 4, bits);
    if (t >= F::kGroups) return;
    for (int half = 0; half < 2; half++) { /* lane t of a row writes its group t */
        int64_t row = row0 + g + 8 * half, column = column0 + t * (64 / F::kGroups);
        bool inside = row < s.n_rows && column < s.n_cols;
        const uint8_t *raw = s.raw + (inside ? (uint64_t)row * s.row_bytes : 0);
        int index = (g * 2 + half) * F::kGroups + t;
        if constexpr (F::kHasSuper) {
            uint8_t scale = 0, minimum = 0;
            if (inside) raw_super_scale(s.type, raw, column, &scale, &minimum);
            tile[F::kScaleOffset + index] = (char)scale;
            if (F::kNeedsSums) tile[F::kMinimumOffset + index] = (char)minimum;
            if (t > 0 || column0 % 256 != 0) continue;
            uint16_t *factors = reinterpret_cast<uint16_t *>(header);
            factors[g * 2 + half] = inside ? raw_factor(s.type, raw, column, false) : 0;
            if (F::kHasMinimum) factors[16 + g * 2 + half] = inside ? raw_factor(s.type, raw, column, true) : 0;
        } else if constexpr (F::kKind == kTableE2m1) {
            tile[F::kScaleOffset + index] = (char)(inside ? fp4_scale(raw, column) : 0);
        } else {
            float scale = 0, minimum = 0;
            if (inside) raw_scale(s.type, raw, column, &scale, &minimum);
            reinterpret_cast<uint16_t *>(tile + F::kScaleOffset)[index] = float_to_half(scale);
            if (F::kHasMinimum) reinterpret_cast<uint16_t *>(tile + F::kMinimumOffset)[index] = float_to_half(minimum);
        }
    }
}

__device__ void pack_fp4_lane(const Source &s, int64_t row0, int64_t column0, int lane, char *tile) {
    const int g = lane / 4, t = lane % 4;
    for (int w = 0; w < 4; w++) {
        const int64_t row = row0 + g + w % 2 * 8;
        uint32_t word = 0;
        for (int i = 0; i < 8; i++) {
            const int64_t column = column0 + w / 2 * 32 + t * 8 + i;
            if (row >= s.n_rows || column >= s.n_cols) continue;
            word |= (uint32_t)raw_code(s.type, s.raw + (uint64_t)row * s.row_bytes, column) << 4 * i;
        }
        reinterpret_cast<uint32_t *>(tile)[lane * 4 + w] = word;
    }
    for (int half = 0; half < 2; half++) { /* lane t of a row writes its group t */
        const int64_t row = row0 + g + 8 * half, column = column0 + t * 16;
        const bool inside = row < s.n_rows && column < s.n_cols;
        tile[FormatFp4::kScaleOffset + (g * 2 + half) * 4 + t] =
            (char)(inside ? fp4_scale(s.raw + (uint64_t)row * s.row_bytes, column) : 0);
    }
}

template <class F>
__device__ void pack_float_lane(const Source &s, int64_t row0, int64_t column0, int lane, char *tile) {
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
    KernelOrder launch_order;
    const int64_t tile = (int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (tile >= n_tiles) return;
    const int lane = (int)threadIdx.x % 32;
    const int64_t row_tile = tile / k_tiles, k = tile % k_tiles, row0 = row_tile * kTileRows,
                  column0 = k * F::kTileCols;
    char *target = tiles + row_tile * row_tile_bytes<F>(k_tiles);
    if constexpr (F::kActivations == kInt8)
        pack_integer_lane<F>(s, row0, column0, lane, target + tile_offset<F>(k), target + header_offset<F>(k));
    else if constexpr (F::kActivations == kFp4Terms)
        pack_fp4_lane(s, row0, column0, lane, target + tile_offset<F>(k));
    else
        pack_float_lane<F>(s, row0, column0, lane, target + tile_offset<F>(k));
}

__global__ void probe_kernel(int32_t *flag) {
    KernelOrder launch_order;
    *flag = kHasFp4Mma;
}

} // namespace

/* The engine plans memory by the sizes in layout.h. */
#define CHECK(type, Format, columns, tile, header)                                                                     \
    static_assert(Format::kTileCols == columns && Format::kTileBytes == tile && Format::kHeaderBytes == header,        \
                  #Format);
DG_CUDA_FORMATS(CHECK)
#undef CHECK

bool has_fp4_mma() {
    int32_t *flag = nullptr, found = 0;
    cudaStream_t stream = nullptr;
    cudaError_t e = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (e == cudaSuccess) e = cudaMalloc((void **)&flag, sizeof *flag);
    if (e == cudaSuccess) {
        launch(probe_kernel, dim3(1), dim3(32), 0, stream, flag);
        e = cudaMemcpyAsync(&found, flag, sizeof found, cudaMemcpyDeviceToHost, stream);
    }
    if (stream != nullptr && e == cudaSuccess) e = cudaStreamSynchronize(stream);
    cudaFree(flag);
    if (stream != nullptr) cudaStreamDestroy(stream);
    cudaGetLastError(); /* a failure shows again where it matters */
    return e == cudaSuccess && found != 0;
}

PackedShape packed_shape(int32_t type, int64_t n_rows, int64_t n_cols) {
    PackedShape shape = {};
    shape.known = with_format(type, [&](auto format) {
        using F = decltype(format);
        shape.activations = F::kActivations;
        shape.k_tiles = (n_cols + F::kTileCols - 1) / F::kTileCols;
        shape.row_tiles = (n_rows + kTileRows - 1) / kTileRows;
        shape.row_tile_bytes = (uint64_t)row_tile_bytes<F>(shape.k_tiles);
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
