/* Attention by key tiles with an online softmax, all of it in registers.
 *
 * A block computes 64 rows for one head of keys. A row is a query and one of the heads that share those keys, so that
 * grouped queries fill the matrix instructions however few tokens there are. A warp has 16 rows: their queries stay in
 * its registers as fragments, the scores that come out of one product go into the next one as they lie, and so do the
 * sums. Four groups of rows leave two warps for each:
 *
 *     heads up to 256     each warp takes every second 16 keys of a tile; at the end the two add up what they have
 *     wider ones          each warp has half of the head's dimensions, in the queries' products as well as in the
 *                         sums; the two exchange their parts of the scores through shared memory
 *
 * In layers without attn_v the keys hold only the rotated dimensions; over the others the query (which forward.c's
 * project_qkv has multiplied by k_norm) meets the values in place of the keys. A product's steps of 16 columns
 * therefore lie in both halves of a tile's rows (base_of, attention_tiles.cuh).
 *
 * A block visits no tile in which none of its rows sees a key. Long contexts are split over blocks, each with an equal
 * share of its rows' tiles; whoever reads the results adds them up. Scores are in units of log2 e. */
#ifndef DG_CUDA_ATTENTION_BLOCK_CUH
#define DG_CUDA_ATTENTION_BLOCK_CUH

#include "cuda/kernels/attention_tiles.cuh"
#include "cuda/kernels/reduce.cuh"

constexpr int kRowGroups = 4;
constexpr int kRows = 16 * kRowGroups;
constexpr size_t kMaxSharedBytes = 99 * 1024; /* of a block, on every architecture from 80 on */
constexpr float kLog2E = 1.4426950408889634f;

/* kDim: the head's dimensions, or more. */
template <int kDim_, int kKeys_, bool kHasV_, bool kDirect_> struct AttentionShape {
    static constexpr int kDim = kDim_, kKeys = kKeys_;
    static constexpr bool kHasV = kHasV_, kDirect = kDirect_;
    static constexpr int kDimGroups = kDim > 256 ? 2 : 1, kKeyGroups = 2 / kDimGroups;
    static constexpr int kSlice = kDim / kDimGroups;     /* a warp's dimensions */
    static constexpr int kSteps = kSlice / 16;           /* a warp's steps of a product with queries */
    static constexpr int kWarpKeys = kKeys / kKeyGroups; /* of a tile */
    static constexpr int kKeyTiles = kWarpKeys / 8;
};

/* Shared memory. */
struct AttentionLayout {
    int key_columns, stride; /* of a tile's rows, halves */
    int raw_stride;          /* of raw rows, bytes */
    int second, exchange;    /* offsets in bytes */
    size_t bytes;
};

template <class S> __host__ __device__ AttentionLayout layout_of(const AttentionParams &p) {
    AttentionLayout l;
    l.key_columns = S::kHasV ? S::kDim : pad_16(p.k_dim);
    l.stride = l.key_columns + S::kDim + 8;
    l.raw_stride = raw_bytes(cache_row_bytes(p.type_k, p.k_dim)) + raw_bytes(cache_row_bytes(p.type_v, p.head_dim));
    l.second = S::kKeys * l.stride * 2;
    const int other = S::kDirect ? l.second : S::kKeys * l.raw_stride;
    l.exchange = l.second + other;
    l.bytes = (size_t)l.exchange + (S::kDimGroups > 1 ? kAttentionWarps * 16 * S::kWarpKeys * sizeof(float) : 0);
    if constexpr (S::kKeyGroups > 1) { /* at the end sums, maxima and denominators of one warp of each two */
        const size_t merge = (size_t)kRows * (S::kDim + 2) * sizeof(float);
        if (merge > l.bytes) l.bytes = merge;
    }
    return l;
}

/* Whether S has place for these heads. Without attn_v a head's halves, and what is rotated of each, must be whole
 * steps.
 */
template <class S> bool fits(const AttentionParams &p) {
    const int half = p.head_dim / 2;
    return p.head_dim <= S::kDim && p.has_v == S::kHasV && p.direct == S::kDirect &&
           (S::kHasV || (half % 16 == 0 && p.n_rot / 2 % 16 == 0)) && layout_of<S>(p).bytes <= kMaxSharedBytes;
}

/* Keys of a span, as offsets from its first one. */
struct KeyRange {
    int begin, end;
};

template <class S> struct AttentionBlock {
    static constexpr int kKeyTiles = S::kKeyTiles, kSteps = S::kSteps;

    const AttentionParams &p;
    const AttentionLayout l;
    char *const shared;
    const int lane, row_group, dim_group, key_group;
    const int dim, half, n_pairs, group, kv_head, row0, n_rows;
    const int slice, slice0; /* a warp's dimensions, and the first of this one's */
    int first_query, last_query;
    KeyRange first, second; /* of the spans, what some row sees */
    int first_tiles, tile, tile_end;
    uint32_t q[kSteps][4];
    float acc[S::kSlice / 8][4];
    float maximum[2] = {-INFINITY, -INFINITY}, denominator[2] = {0, 0}; /* rows g and g + 8; of this lane's keys */

    __device__ __forceinline__ explicit AttentionBlock(const AttentionParams &params)
        : p(params), l(layout_of<S>(p)), shared(shared_memory<char>()), lane((int)threadIdx.x % 32),
          row_group((int)threadIdx.x / 32 % kRowGroups),
          dim_group(S::kDimGroups > 1 ? (int)threadIdx.x / 32 / kRowGroups : 0),
          key_group(S::kKeyGroups > 1 ? (int)threadIdx.x / 32 / kRowGroups : 0), dim(p.head_dim), half(dim / 2),
          n_pairs(p.n_rot / 2), group(p.n_heads / p.n_kv_heads), kv_head((int)blockIdx.y),
          row0((int)blockIdx.x * kRows), n_rows(p.n * group),
          slice((dim / 16 + S::kDimGroups - 1) / S::kDimGroups * 16), slice0(dim_group * slice) {
        first_query = p.position + row0 / group;
        last_query = p.position + (min(row0 + kRows, n_rows) - 1) / group;
        first = visible(p.spans[0]);
        second = p.n_spans > 1 ? visible(p.spans[1]) : KeyRange{0, 0};
        first_tiles = (first.end - first.begin + S::kKeys - 1) / S::kKeys;
        const int64_t n_tiles = first_tiles + (second.end - second.begin + S::kKeys - 1) / S::kKeys;
        tile = (int)(n_tiles * blockIdx.z / p.n_splits);
        tile_end = (int)(n_tiles * (blockIdx.z + 1) / p.n_splits);
#pragma unroll
        for (int i = 0; i < S::kSlice / 8; i++) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0;
    }

    /* Where a row of queries (of its position and head) stands among all. */
    __device__ __forceinline__ int64_t index_of(int row) const {
        return (int64_t)(row / group) * p.n_heads + kv_head * group + row % group;
    }
    /* The row of half h of the accumulators. */
    __device__ __forceinline__ int row_of(int h) const { return row0 + row_group * 16 + h * 8 + lane / 4; }

    /* ---- Tiles ---- */

    __device__ __forceinline__ KeyRange visible(const Span &span) const {
        KeyRange range = {0, span.n};
        if (p.causal) {
            range.end = max(0, min(span.n, last_query + 1 - span.position));
            if (p.window > 0) range.begin = min(range.end, max(0, first_query - p.window + 1 - span.position));
        }
        return range;
    }

    /* By value: an index that is not known would put what it chooses from into local memory. */
    __device__ __forceinline__ Span span_of(int t) const { return t < first_tiles ? p.spans[0] : p.spans[1]; }
    __device__ __forceinline__ int first_key(int t) const {
        return t < first_tiles ? first.begin + t * S::kKeys : second.begin + (t - first_tiles) * S::kKeys;
    }
    __device__ __forceinline__ int keys_of(int t) const {
        return min(S::kKeys, (t < first_tiles ? first.end : second.end) - first_key(t));
    }
    __device__ __forceinline__ KeyRun run_of(int t) const {
        const Span span = span_of(t);
        const uint32_t capacity = (uint32_t)span.capacity;
        return {keys_of(t), (uint32_t)(span.position + first_key(t)) % capacity, capacity};
    }
    __device__ __forceinline__ CachePart keys_in(int t) const {
        const Span span = span_of(t);
        const int bytes = cache_row_bytes(p.type_k, p.k_dim);
        return {(const char *)span.k + opaque(kv_head) * span.capacity * bytes,
                p.type_k,
                p.k_dim,
                bytes,
                0,
                l.key_columns,
                0};
    }
    __device__ __forceinline__ CachePart values_in(int t) const {
        const Span span = span_of(t);
        const int bytes = cache_row_bytes(p.type_v, dim);
        return {(const char *)span.v + opaque(kv_head) * span.capacity * bytes,
                p.type_v,
                dim,
                bytes,
                l.key_columns,
                dim,
                raw_bytes(cache_row_bytes(p.type_k, p.k_dim))};
    }
    __device__ __forceinline__ void start_copies(int t, int stage) const {
        char *const to = shared + (S::kDirect && stage == 0 ? 0 : l.second);
        copy_tile<S::kKeys, S::kDirect>(to, S::kDirect ? l.stride : l.raw_stride, run_of(t), keys_in(t), values_in(t));
    }
    __device__ __forceinline__ void convert(int t) const {
        convert_tile<S::kKeys>(reinterpret_cast<uint16_t *>(shared), l.stride, shared + l.second, l.raw_stride,
                               run_of(t), keys_in(t), values_in(t));
    }

    /* ---- Steps ---- */

    /* Zeros where tiles have columns that no copy fills but a product reads. */
    __device__ __forceinline__ void clear_columns() const {
        const int behind_keys = S::kDirect ? l.key_columns - p.k_dim : 0, behind_values = S::kDim - dim;
        const int width = behind_keys + behind_values;
        if (width == 0) return;
        for (int i = (int)threadIdx.x; i < S::kKeys * width; i += kAttentionThreads) {
            const int column =
                i % width < behind_keys ? p.k_dim + i % width : l.key_columns + dim + i % width - behind_keys;
            uint16_t *const at = reinterpret_cast<uint16_t *>(shared) + i / width * l.stride + column;
            at[0] = 0;
            if (S::kDirect) at[S::kKeys * l.stride] = 0; /* the second stage's */
        }
    }

    /* Where in a row of the tile step i of the warp's products with queries begins: at 16·i behind one of few places.
     * Without attn_v a half of the head has the steps of its rotated dimensions, in the keys, and then the others. */
    __device__ __forceinline__ int base_of(int i) const {
        if constexpr (S::kHasV) return slice0;
        if constexpr (S::kDimGroups > 1)
            return i * 16 < n_pairs ? dim_group * n_pairs : l.key_columns + dim_group * half;
        return (i * 16 < half ? i * 16 : i * 16 - half) >= n_pairs ? l.key_columns : i * 16 < half ? 0 : n_pairs - half;
    }

    /* What meets columns `column` and the next one of a row of the tile: two of a query's values, times log2 e. */
    __device__ __forceinline__ uint32_t query_pair(const float *row, int column) const {
        int d = column;
        if constexpr (!S::kHasV)
            d = column >= l.key_columns ? column - l.key_columns : column < n_pairs ? column : half + column - n_pairs;
        const float2 both = *reinterpret_cast<const float2 *>(row + d);
        return pack_halves(both.x * kLog2E, both.y * kLog2E);
    }

    /* Rows and steps that do not exist read others, so that all loads are under way at once, and become zeros. */
    __device__ __forceinline__ void load_queries() {
        const float *rows[2];
#pragma unroll
        for (int h = 0; h < 2; h++) rows[h] = p.q + index_of(min(row_of(h), n_rows - 1)) * dim;
        const int n_dims = min(slice, dim - slice0);
#pragma unroll
        for (int i = 0; i < kSteps; i++) {
            const bool exists = i * 16 < n_dims;
            const int column = (exists ? base_of(i) + i * 16 : base_of(0)) + lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const uint32_t pair = query_pair(rows[j % 2], column + j / 2 * 8);
                q[i][j] = exists && row_of(j % 2) < n_rows ? pair : 0;
            }
        }
    }

    /* s (16 rows, kWarpKeys) = q · keysᵀ over the warp's steps. */
    __device__ __forceinline__ void score(float (&s)[kKeyTiles][4], const uint16_t *rows) const {
#pragma unroll
        for (int n = 0; n < kKeyTiles; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
        const uint16_t *const at =
            rows + (key_group * S::kWarpKeys + lane / 16 * 8 + lane % 8) * l.stride + lane / 8 % 2 * 8;
#pragma unroll
        for (int i = 0; i < kSteps; i++) {
            const uint16_t *const from = at + base_of(i) + i * 16;
#pragma unroll
            for (int n = 0; n < kKeyTiles; n += 2) {
                uint32_t b[4];
                ldmatrix_x4(b, from + n * 8 * l.stride);
                mma_f16_k16(s[n], q[i], b);
                mma_f16_k16(s[n + 1], q[i], b + 2);
            }
        }
    }

    /* s += the other warp's part, which has the other dimensions of the same rows. All threads must call it. */
    __device__ __forceinline__ void exchange(float (&s)[kKeyTiles][4]) const {
        float4 *const parts = reinterpret_cast<float4 *>(shared + l.exchange); /* (warps, kKeyTiles, 32) */
        const int warp = opaque((int)threadIdx.x) / 32;
#pragma unroll
        for (int n = 0; n < kKeyTiles; n++)
            parts[(warp * kKeyTiles + n) * 32 + lane] = make_float4(s[n][0], s[n][1], s[n][2], s[n][3]);
        __syncthreads();
        const int other = warp < kRowGroups ? warp + kRowGroups : warp - kRowGroups;
#pragma unroll
        for (int n = 0; n < kKeyTiles; n++) {
            const float4 part = parts[(other * kKeyTiles + n) * 32 + lane];
            s[n][0] += part.x;
            s[n][1] += part.y;
            s[n][2] += part.z;
            s[n][3] += part.w;
        }
    }

    /* Scores of keys that a row does not see become −inf. */
    __device__ __forceinline__ void mask(float (&s)[kKeyTiles][4]) const {
        const int n_keys = keys_of(tile), first = span_of(tile).position + first_key(tile);
        const bool all_seen =
            !p.causal || (first + n_keys - 1 <= first_query && (p.window == 0 || last_query - first < p.window));
        if (n_keys == S::kKeys && all_seen) return;
        const int row = opaque(row_of(0));
        const int queries[2] = {p.position + min(row, n_rows - 1) / group,
                                p.position + min(row + 8, n_rows - 1) / group};
#pragma unroll
        for (int n = 0; n < kKeyTiles; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int key = key_group * S::kWarpKeys + n * 8 + lane % 4 * 2 + j % 2;
                if (key >= n_keys || !is_visible(p, queries[j / 2], first + key)) s[n][j] = -INFINITY;
            }
    }

    /* s = 2^(s − maximum so far); sums so far are brought to the new maximum. */
    __device__ __forceinline__ void online_softmax(float (&s)[kKeyTiles][4]) {
        float correction[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float largest = maximum[h];
#pragma unroll
            for (int n = 0; n < kKeyTiles; n++) largest = fmaxf(largest, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
            largest = group_max<4>(largest);
            const float from = largest > -INFINITY ? largest : 0.0f; /* every key so far may be masked */
            correction[h] = fast_exp2(maximum[h] - from);
            maximum[h] = largest;
            float sum = 0;
#pragma unroll
            for (int n = 0; n < kKeyTiles; n++)
#pragma unroll
                for (int j = 2 * h; j < 2 * h + 2; j++) sum += s[n][j] = fast_exp2(s[n][j] - from);
            denominator[h] = denominator[h] * correction[h] + sum;
        }
        if (__ballot_sync(0xffffffff, correction[0] != 1 || correction[1] != 1) == 0) return;
#pragma unroll
        for (int i = 0; i < S::kSlice / 8; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[i][j] *= correction[j / 2];
    }

    /* acc += s · values: the warp's keys and dimensions. */
    __device__ __forceinline__ void accumulate(const float (&s)[kKeyTiles][4], const uint16_t *rows) {
        const uint16_t *const at =
            rows + (key_group * S::kWarpKeys + lane % 16) * l.stride + l.key_columns + slice0 + lane / 16 * 8;
#pragma unroll
        for (int n = 0; n < kKeyTiles; n += 2) {
            const uint32_t a[4] = {pack_halves(s[n][0], s[n][1]), pack_halves(s[n][2], s[n][3]),
                                   pack_halves(s[n + 1][0], s[n + 1][1]), pack_halves(s[n + 1][2], s[n + 1][3])};
#pragma unroll
            for (int i = 0; i < S::kSlice / 8; i += 2) {
                uint32_t b[4];
                ldmatrix_x4_trans(b, at + n * 8 * l.stride + i * 8);
                mma_f16_k16(acc[i], a, b);
                mma_f16_k16(acc[i + 1], a, b + 2);
            }
        }
    }

    /* Each lane of a row has had its own keys. */
    __device__ __forceinline__ void sum_denominators() {
#pragma unroll
        for (int h = 0; h < 2; h++) denominator[h] = group_sum<4>(denominator[h]);
    }

    /* Keys of the second group join those of the first, which alone has all then. All threads must call it. */
    __device__ __forceinline__ void merge() {
        float4 *const sums = reinterpret_cast<float4 *>(shared); /* (kRowGroups, kSlice / 8, 32) */
        float *const rows = reinterpret_cast<float *>(sums + kRowGroups * S::kSlice / 8 * 32); /* (kRows, 2) */
        __syncthreads(); /* the last tile has been read */
        const int row = row_group * 16 + lane / 4;
        if (key_group == 1) {
#pragma unroll
            for (int i = 0; i < S::kSlice / 8; i++)
                sums[(row_group * (S::kSlice / 8) + i) * 32 + lane] =
                    make_float4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
            if (lane % 4 == 0)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    rows[(row + 8 * h) * 2] = maximum[h];
                    rows[(row + 8 * h) * 2 + 1] = denominator[h];
                }
        }
        __syncthreads();
        if (key_group == 1) return;
        float mine[2], others[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float other = rows[(row + 8 * h) * 2], largest = fmaxf(maximum[h], other);
            const float from = largest > -INFINITY ? largest : 0.0f;
            mine[h] = fast_exp2(maximum[h] - from);
            others[h] = fast_exp2(other - from);
            denominator[h] = denominator[h] * mine[h] + rows[(row + 8 * h) * 2 + 1] * others[h];
            maximum[h] = largest;
        }
#pragma unroll
        for (int i = 0; i < S::kSlice / 8; i++) {
            const float4 other = sums[(row_group * (S::kSlice / 8) + i) * 32 + lane];
            acc[i][0] = acc[i][0] * mine[0] + other.x * others[0];
            acc[i][1] = acc[i][1] * mine[0] + other.y * others[0];
            acc[i][2] = acc[i][2] * mine[1] + other.z * others[1];
            acc[i][3] = acc[i][3] * mine[1] + other.w * others[1];
        }
    }

    /* The rows' results; of a split, for the reader. */
    __device__ __forceinline__ void write() const {
        if (key_group == 1) return;
        const bool whole = p.n_splits == 1;
        const int64_t rows = (int64_t)p.n * p.n_heads;
        float *const out = whole ? p.out : p.partial + blockIdx.z * rows * dim;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            if (row_of(h) >= n_rows) continue;
            const int64_t index = index_of(row_of(h));
            const float factor = whole ? 1.0f / denominator[h] : 1.0f;
            if (!whole && lane % 4 == 0 && dim_group == 0) {
                float *const statistics = p.partial_max + (blockIdx.z * rows + index) * 2;
                statistics[0] = maximum[h];
                statistics[1] = denominator[h];
            }
            const int n_dims = min(slice, dim - slice0);
            float *const to = out + index * dim + slice0 + lane % 4 * 2;
#pragma unroll
            for (int i = 0; i < S::kSlice / 8; i++)
                if (i * 8 < n_dims)
                    *reinterpret_cast<float2 *>(to + i * 8) =
                        make_float2(acc[i][2 * h] * factor, acc[i][2 * h + 1] * factor);
        }
    }
};

#endif
