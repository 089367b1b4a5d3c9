/* How the kernels of rows.cu hold a row: one block a row, read once with 16-byte loads and kept in registers.
 *
 *     thread 0        thread 1             thread T − 1     thread 0
 *     columns 0 … 3   columns 4 … 7   …    … 4·T − 1        columns 4·T … 4·T + 3   …
 *
 * Thread i of T has the kVectors groups of four columns i, i + T, …; behind the last column they are zeros. So 32
 * columns, which share a scale, lie in eight neighbouring lanes. */
#ifndef DG_CUDA_ROWS_CUH
#define DG_CUDA_ROWS_CUH

#include "cuda/device.cuh"
#include "cuda/kernels/reduce.cuh"

constexpr int kVectors = 4;
constexpr int kMaxRowThreads = kMaxRowColumns / (4 * kVectors);

/* Threads of a block for rows of n_cols, padded to whole weight tiles. */
static inline dim3 row_threads(int64_t n_cols) {
    return dim3((unsigned)(ceil_div(ceil_div(n_cols, 64) * 16, 32 * kVectors) * 32));
}

struct Row {
    float4 v[kVectors];
};

/* First column of group i of this thread. */
static __device__ __forceinline__ int row_column(int i) { return 4 * ((int)threadIdx.x + i * (int)blockDim.x); }

/* value_of(column) of each group of four, zeros from n_cols on. */
template <class ValueOf> static __device__ __forceinline__ Row row_of(int n_cols, ValueOf value_of) {
    Row row;
#pragma unroll
    for (int i = 0; i < kVectors; i++) {
        const int column = row_column(i);
        row.v[i] = column < n_cols ? value_of(column) : make_float4(0, 0, 0, 0);
    }
    return row;
}

static __device__ __forceinline__ float4 load4(const float *from) { return *reinterpret_cast<const float4 *>(from); }
static __device__ __forceinline__ void store4(float *to, float4 v) { *reinterpret_cast<float4 *>(to) = v; }

static __device__ __forceinline__ Row load_row(const float *from, int n_cols) {
    return row_of(n_cols, [&](int column) { return load4(from + column); });
}
static __device__ __forceinline__ void store_row(float *to, int n_cols, const Row &row) {
#pragma unroll
    for (int i = 0; i < kVectors; i++)
        if (row_column(i) < n_cols) store4(to + row_column(i), row.v[i]);
}

/* A row of the result of products: the sum over splits, in their order. */
static __device__ __forceinline__ Row load_partials(const Partials &p, int row, int first, int n_cols) {
    const float *from = p.values + (int64_t)row * p.n_columns + first;
    const int64_t stride = (int64_t)p.n * p.n_columns;
    Row sum = load_row(from, n_cols);
    for (int s = 1; s < p.n_splits; s++) {
        const Row other = load_row(from + s * stride, n_cols);
#pragma unroll
        for (int i = 0; i < kVectors; i++) {
            sum.v[i].x += other.v[i].x;
            sum.v[i].y += other.v[i].y;
            sum.v[i].z += other.v[i].z;
            sum.v[i].w += other.v[i].w;
        }
    }
    return sum;
}

/* Of the experts' results for a token, in the order of choice. */
static __device__ __forceinline__ Row load_mixed(const Rows &rows, int row, int n_cols) {
    Row sum = row_of(n_cols, [](int) { return make_float4(0, 0, 0, 0); });
#pragma unroll 2
    for (int k = 0; k < rows.n_used; k++) {
        const float share = rows.shares[row * rows.n_used + k];
        const Row result = load_row(rows.values + (int64_t)rows.slots[row * rows.n_used + k] * n_cols, n_cols);
#pragma unroll
        for (int i = 0; i < kVectors; i++)
            sum.v[i] = make_float4(fmaf(share, result.v[i].x, sum.v[i].x), fmaf(share, result.v[i].y, sum.v[i].y),
                                   fmaf(share, result.v[i].z, sum.v[i].z), fmaf(share, result.v[i].w, sum.v[i].w));
    }
    return sum;
}

/* Of attention's splits, whose maxima are in units of log2 e. Four columns belong to one head. */
static __device__ __forceinline__ Row load_attended(const Rows &rows, int row, int n_cols) {
    return row_of(n_cols, [&](int column) {
        const int head = column / rows.head_dim, d = column - head * rows.head_dim;
        const int64_t index = (int64_t)row * (n_cols / rows.head_dim) + head;
        const float2 *const statistics = reinterpret_cast<const float2 *>(rows.statistics) + index;
        float largest = -INFINITY, denominator = 0;
        for (int s = 0; s < rows.n_splits; s++) largest = fmaxf(largest, statistics[s * rows.n_rows].x);
        float4 sum = make_float4(0, 0, 0, 0);
        for (int s = 0; s < rows.n_splits; s++) {
            const float2 split = statistics[s * rows.n_rows];
            const float factor = fast_exp2(split.x - largest);
            const float4 part = load4(rows.values + (s * rows.n_rows + index) * rows.head_dim + d);
            denominator += split.y * factor;
            sum = make_float4(fmaf(part.x, factor, sum.x), fmaf(part.y, factor, sum.y), fmaf(part.z, factor, sum.z),
                              fmaf(part.w, factor, sum.w));
        }
        return make_float4(sum.x / denominator, sum.y / denominator, sum.z / denominator, sum.w / denominator);
    });
}

static __device__ __forceinline__ Row load_rows(const Rows &rows, int row, int n_cols) {
    switch (rows.kind) {
    case kSplits:
        return load_partials(rows.splits, row, 0, n_cols);
    case kMixed:
        return load_mixed(rows, row, n_cols);
    case kAttended:
        return load_attended(rows, row, n_cols);
    default:
        return load_row(rows.values + (int64_t)row * n_cols, n_cols);
    }
}

/* fn(a, b) of each pair of values. */
template <class Fn> static __device__ __forceinline__ Row combine_rows(const Row &a, const Row &b, Fn fn) {
    Row out;
#pragma unroll
    for (int i = 0; i < kVectors; i++)
        out.v[i] =
            make_float4(fn(a.v[i].x, b.v[i].x), fn(a.v[i].y, b.v[i].y), fn(a.v[i].z, b.v[i].z), fn(a.v[i].w, b.v[i].w));
    return out;
}
template <class Fn> static __device__ __forceinline__ Row map_row(const Row &a, Fn fn) {
    return combine_rows(a, a, [&](float x, float) { return fn(x); });
}

/* This thread's part. */
static __device__ __forceinline__ float squares(const Row &row) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kVectors; i++)
        sum += row.v[i].x * row.v[i].x + row.v[i].y * row.v[i].y + (row.v[i].z * row.v[i].z + row.v[i].w * row.v[i].w);
    return sum;
}
static __device__ __forceinline__ float largest4(float4 v) {
    return fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
}
static __device__ __forceinline__ float row_largest(const Row &row, float *shared) {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < kVectors; i++) largest = fmaxf(largest, largest4(row.v[i]));
    return block_max(largest, shared);
}

/* 1 / rms */
static __device__ __forceinline__ float norm_factor(const Row &row, int n_cols, float eps, float *shared) {
    return 1.0f / sqrtf(block_sum(squares(row), shared) / (float)n_cols + eps);
}

/* ---- Rows as activations -------------------------------------------------------------------------------------- */

/* What warps have to exchange must be exchanged by all lanes, also by those behind the row's padding (`inside` false).
 */

/* Four columns from `column` on, as int8 with the scale of the 32 that eight lanes hold. */
static __device__ __forceinline__ void write_codes(const Activations &x, int64_t row, int column, int64_t k_tiles,
                                                   float4 v, bool inside) {
    const float largest = group_max<8>(largest4(v));
    const int codes[4] = {quantize(v.x, largest), quantize(v.y, largest), quantize(v.z, largest),
                          quantize(v.w, largest)};
    const int sum = group_sum<8>(codes[0] + codes[1] + codes[2] + codes[3]);
    if (!inside) return;
    const uint32_t word = (uint32_t)(codes[0] & 0xff) | (uint32_t)(codes[1] & 0xff) << 8 |
                          (uint32_t)(codes[2] & 0xff) << 16 | (uint32_t)codes[3] << 24;
    *reinterpret_cast<uint32_t *>(x.codes + row * k_tiles * 64 + code_position(column)) = word;
    if (column % 32 == 0) {
        const float scale = largest / 127.0f;
        x.scales[row * k_tiles * 2 + column / 32] = scale;
        x.sums[row * k_tiles * 2 + column / 32] = scale * (float)sum;
    }
}

/* Four columns of a scaled row, as the sum of two terms (formats/fp4.cuh). */
static __device__ __forceinline__ void write_terms(const Activations &x, int64_t row, int column, int64_t k_tiles,
                                                   float4 v, bool inside) {
    const int64_t chunk = row * k_tiles + column / 64;
    float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int term = 0; term < 2; term++) {
        const float largest =
            group_max<4>(fmaxf(fmaxf(fabsf(values[0]), fabsf(values[1])), fmaxf(fabsf(values[2]), fabsf(values[3]))));
        const uint32_t scale_code = e4m3_code(fminf(largest / 6, 448.0f));
        const float scale = e4m3_value(scale_code);
        uint32_t codes = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t code = scale > 0 ? e2m1_code(values[i] / scale) : 0;
            codes |= code << 4 * i;
            values[i] -= e2m1_value(code) * scale;
        }
        if (!inside) continue;
        uint8_t *const to = x.terms + chunk * 64 + term * 32 + column % 32 / 8 * 8 + column % 64 / 32 * 4;
        *reinterpret_cast<uint16_t *>(to + column % 8 / 2) = (uint16_t)codes;
        if (column % 16 == 0)
            reinterpret_cast<uint8_t *>(x.term_scales + chunk * 2 + term)[column % 64 / 16] = (uint8_t)scale_code;
    }
}

/* Four columns as floats, in the order of value_position: even lanes have columns 0 … 3 of eight and write the first
 * half, odd ones 4 … 7 and the second. */
static __device__ __forceinline__ void write_values(const Activations &x, int64_t row, int column, int n_cols,
                                                    float4 v) {
    const bool odd = column % 8 != 0;
    const float a = __shfl_xor_sync(0xffffffff, odd ? v.x : v.z, 1),
                b = __shfl_xor_sync(0xffffffff, odd ? v.y : v.w, 1);
    if (column < n_cols)
        store4(x.values + row * n_cols + column, odd ? make_float4(a, v.z, b, v.w) : make_float4(v.x, a, v.y, b));
}

/* Four columns as float16. */
static __device__ __forceinline__ void write_halves(const Activations &x, int64_t row, int column, int64_t k_tiles,
                                                    float4 v, bool inside) {
    if (!inside) return;
    uint32_t *const to = reinterpret_cast<uint32_t *>(x.halves + row * k_tiles * 64 + half_position(column));
    to[0] = (uint32_t)float_to_half(v.x) | (uint32_t)float_to_half(v.z) << 16;
    to[4] = (uint32_t)float_to_half(v.y) | (uint32_t)float_to_half(v.w) << 16;
}

/* The power of two that brings `largest` between 2^14 and 2^15, so that no value of the row is too large for float16,
 * and only what is 2^28 times smaller loses bits. */
static __device__ __forceinline__ float half_gain(float largest) {
    const int exponent = (int)(__float_as_uint(largest) >> 23);
    return __uint_as_float((uint32_t)min(127 + 14 + 127 - exponent, 253) << 23); /* 253: 1 / gain is no subnormal */
}

constexpr float kLargestTerm = 448 * 6; /* what a row is scaled to */

/* A row in every kind that is wanted. Zeros fill it up to a whole weight tile. */
static __device__ __forceinline__ void write_activations(const Activations &x, const bool (&wanted)[kActivationKinds],
                                                         int64_t row, int n_cols, const Row &values, float *shared) {
    const int64_t k_tiles = (n_cols + 63) / 64;
    float multiplier = 0;
    if (wanted[kFp4Terms]) {
        const float largest = row_largest(values, shared);
        multiplier = largest > 0 ? kLargestTerm / largest : 0.0f;
        if (threadIdx.x == 0) x.term_multipliers[row] = largest / kLargestTerm;
    }
    float gain = 1;
    if (wanted[kHalves]) {
        gain = half_gain(row_largest(values, shared));
        if (threadIdx.x == 0) x.half_multipliers[row] = 1 / gain;
    }
#pragma unroll
    for (int i = 0; i < kVectors; i++) {
        const int column = row_column(i);
        const float4 v = values.v[i];
        const bool inside = column < k_tiles * 64;
        if (wanted[kInt8]) write_codes(x, row, column, k_tiles, v, inside);
        if (wanted[kFp4Terms])
            write_terms(x, row, column, k_tiles,
                        make_float4(v.x * multiplier, v.y * multiplier, v.z * multiplier, v.w * multiplier), inside);
        if (wanted[kFloats]) write_values(x, row, column, n_cols, v);
        if (wanted[kHalves])
            write_halves(x, row, column, k_tiles, make_float4(v.x * gain, v.y * gain, v.z * gain, v.w * gain), inside);
    }
}

/* rms(x) for every target, or x itself where the factor is one. */
static __device__ __forceinline__ void prepare(const Preparation &next, const Row &x, float factor, int64_t row,
                                               int n_cols, float *shared) {
    for (int i = 0; i < next.n; i++) {
        const PrepareTarget &t = next.targets[i];
        const float gain = t.gain;
        Row y = map_row(x, [&](float value) { return value * factor * gain; });
        if (t.weight != nullptr)
            y = combine_rows(y, load_row(t.weight, n_cols), [](float value, float w) { return value * w; });
        write_activations(t.x, t.wanted, row, n_cols, y, shared);
    }
}

/* What has become of a row of the residual stream goes there, and as activations to those that come next. */
static __device__ __forceinline__ void finish_row(float *x, const Row &row, int64_t index, int n_cols, float eps,
                                                  const Preparation &next, float *shared) {
    store_row(x + index * n_cols, n_cols, row);
    if (next.n > 0) prepare(next, row, norm_factor(row, n_cols, eps, shared), index, n_cols, shared);
}

#endif
