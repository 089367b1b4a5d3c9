/* Attention by tiles of keys with a running softmax.
 *
 * A block computes 32 rows for one head of keys. A row is a query and one of the heads that share those keys, so that
 * grouped queries fill the matrix instructions however few tokens there are. Long caches are split over blocks, whose
 * results a second kernel joins. In layers without attn_v the keys hold only the rotated dimensions; over the others
 * the query (which forward.c's project_qkv has multiplied by k_norm) meets the values in place of the keys. */
#include "cuda/device.cuh"
#include "cuda/kernels/reduce.cuh"

namespace {

constexpr int kRows = 32;
constexpr int kWarps =
    8; /* two groups of 16 rows × four slices: of the keys for the scores, of the head for the sums */
constexpr int kMaxSplits = 16;
constexpr int kMaxHeadDim = 512;

struct Span {
    const void *k, *v;
    int64_t capacity;
    int position, n;
};

struct AttentionParams {
    Span spans[2];
    int n_spans;
    int n_heads, n_kv_heads, head_dim, k_dim, n_rot;
    bool has_v;
    int n, position;
    bool causal;
    int window;
    int type_k, type_v;
    const float *q;
    float *out;
    int n_splits, tiles_per_split;
    float *partial;     /* (n_splits, n · n_heads, head_dim), not yet divided by the normaliser */
    float *partial_max; /* (n_splits, n · n_heads, 2) maximum and normaliser */
};

__device__ float cache_value(int type, const void *rows, int64_t row, int dim, int d) {
    switch (type) {
    case DG_TYPE_F32:
        return ((const float *)rows)[row * dim + d];
    case DG_TYPE_F16:
        return half_to_float(((const uint16_t *)rows)[row * dim + d]);
    case DG_TYPE_BF16:
        return __uint_as_float((uint32_t)((const uint16_t *)rows)[row * dim + d] << 16);
    default: {
        const uint8_t *block =
            (const uint8_t *)rows + (row * ((dim + 31) / 32) + d / 32) * (int64_t)sizeof(dg_block_q8_0);
        return half_to_float((uint16_t)(block[0] | block[1] << 8)) * (float)(int8_t)block[2 + d % 32];
    }
    }
}

__device__ bool is_visible(const AttentionParams &p, int query_position, int key_position) {
    if (!p.causal) return true;
    return key_position <= query_position && (p.window == 0 || query_position - key_position < p.window);
}

/* ---- Tiles on the matrix units -------------------------------------------------------------------------------- */

__host__ __device__ inline int pad_16(int n) { return (n + 15) / 16 * 16; }

/* Shared memory, in halves; rows are padded by 8, so that the eight rows of a matrix lie in different banks. */
struct Layout {
    int q_stride, rotated_stride, k_stride, v_stride;
    int rotated, k, v, p; /* offsets; q stands at 0 */
    size_t bytes;
    int scores, corrections, positions; /* offsets in bytes */
};

template <int kKeys> __host__ __device__ Layout layout_of(int head_dim, int k_dim, bool has_v) {
    Layout l;
    l.q_stride = head_dim + 8;
    l.rotated_stride = pad_16(k_dim) + 8;
    l.k_stride = pad_16(k_dim) + 8;
    l.v_stride = head_dim + 8;
    l.rotated = kRows * l.q_stride;
    l.k = l.rotated + (has_v ? 0 : kRows * l.rotated_stride);
    l.v = l.k + kKeys * l.k_stride;
    l.p = l.v + kKeys * l.v_stride;
    /* ldmatrix reads two steps of 16 columns at once, up to 16 halves behind the last row */
    l.scores = (l.p + kRows * (kKeys + 8) + 16) * 2;
    l.corrections = l.scores + kRows * (kKeys + 4) * 4;
    l.positions = l.corrections + kRows * 4;
    l.bytes = (size_t)(l.positions + kKeys * 4);
    return l;
}

/* Copies rows of `dim` cached values, one for each key of the tile, as float16; zeros where there is no key. */
template <int kKeys>
__device__ void load_tile(int type, const void *rows, int64_t first_row, const Span &span, int offset, int n_keys,
                          int dim, uint16_t *to, int stride) {
    if (type == DG_TYPE_F16 && dim % 16 == 0) {
        for (int i = (int)threadIdx.x; i < kKeys * dim / 8; i += 32 * kWarps) {
            int key = i / (dim / 8), piece = i % (dim / 8);
            bool valid = key < n_keys;
            int64_t row = first_row + (span.position + offset + (valid ? key : 0)) % span.capacity;
            cp_async_16(to + key * stride + piece * 8, (const uint16_t *)rows + row * dim + piece * 8, valid);
        }
        return;
    }
    const int padded = pad_16(dim);
    for (int i = (int)threadIdx.x; i < kKeys * padded; i += 32 * kWarps) {
        int key = i / padded, d = i % padded;
        float value = 0;
        if (key < n_keys && d < dim)
            value = cache_value(type, rows, first_row + (span.position + offset + key) % span.capacity, dim, d);
        to[key * stride + d] = float_to_half(value);
    }
}

/* c[0] + c[1] (16 rows, 8 keys) += a · bᵀ over columns of shared memory, rows of both `*_stride` apart: two sums, since
 * each instruction waits for the last one of its sum. Steps of 16 columns from `skip0` to `skip1` are left out. */
__device__ void multiply_rows(float (&c)[2][4], const uint16_t *a, int a_stride, const uint16_t *b, int b_stride,
                              int n_cols, int skip0, int skip1) {
    const int lane = (int)threadIdx.x % 32;
    const uint16_t *a_row = a + (lane / 8 % 2 * 8 + lane % 8) * a_stride + lane / 16 * 8;
    const uint16_t *b_row = b + lane % 8 * b_stride + lane / 8 * 8;
    for (int column = 0; column < n_cols; column += 32) {
        if (column >= skip0 && column + 32 <= skip1) continue;
        uint32_t b_words[4], a_words[4];
        ldmatrix_x4(b_words, b_row + column);
        ldmatrix_x4(a_words, a_row + column);
        mma_f16_k16(c[0], a_words, b_words);
        if (column + 16 < n_cols) {
            ldmatrix_x4(a_words, a_row + column + 16);
            mma_f16_k16(c[1], a_words, b_words + 2);
        }
    }
}

/* kSliceTiles: tiles of 8 dimensions in a warp's quarter of the head. */
template <int kSliceTiles, int kKeys>
__global__ void __launch_bounds__(32 * kWarps, kSliceTiles == 16 ? 1 : 2) attention_kernel(AttentionParams p) {
    KernelOrder launch_order;
    const Layout l = layout_of<kKeys>(p.head_dim, p.k_dim, p.has_v);
    uint16_t *q = shared_memory<uint16_t>();
    uint16_t *rotated = q + l.rotated, *k = q + l.k, *v = q + l.v, *weights = q + l.p;
    float *scores = reinterpret_cast<float *>(shared_memory<char>() + l.scores);
    float *corrections = reinterpret_cast<float *>(shared_memory<char>() + l.corrections);
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int row_group = warp / 4, slice = warp % 4;
    const int dim = p.head_dim, half = dim / 2, n_pairs = p.n_rot / 2;
    const int group = p.n_heads / p.n_kv_heads, kv_head = (int)blockIdx.y;
    const int row0 = (int)blockIdx.x * kRows, n_rows = p.n * group;

    /* Queries. Where the keys hold only the rotated dimensions, those go to `rotated` and leave zeros in q. */
    for (int i = (int)threadIdx.x; i < kRows * dim; i += 32 * kWarps) {
        int row = row0 + i / dim, d = i % dim;
        float value = 0;
        if (row < n_rows) value = p.q[((int64_t)(row / group) * p.n_heads + kv_head * group + row % group) * dim + d];
        bool rotates = !p.has_v && d % half < n_pairs;
        q[i / dim * l.q_stride + d] = float_to_half(rotates ? 0.0f : value);
        if (rotates) rotated[i / dim * l.rotated_stride + d % half + d / half * n_pairs] = float_to_half(value);
    }
    if (!p.has_v)
        for (int i = (int)threadIdx.x; i < kRows * (pad_16(p.k_dim) - p.k_dim); i += 32 * kWarps) {
            int padding = pad_16(p.k_dim) - p.k_dim;
            rotated[i / padding * l.rotated_stride + p.k_dim + i % padding] = 0;
        }

    /* The softmax of a row is kept by eight threads, each with an eighth of the keys. */
    const int my_row = (int)threadIdx.x / 8, my_part = (int)threadIdx.x % 8;
    const int my_query = p.position + min(row0 + my_row, n_rows - 1) / group;
    const int first_query = p.position + row0 / group;
    const int last_query = p.position + (min(row0 + kRows, n_rows) - 1) / group;
    float maximum = -INFINITY, normaliser = 0;
    float acc[kSliceTiles][4];
#pragma unroll
    for (int i = 0; i < kSliceTiles; i++) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0;

    const int first_tiles = (p.spans[0].n + kKeys - 1) / kKeys;
    const int n_tiles = first_tiles + (p.n_spans > 1 ? (p.spans[1].n + kKeys - 1) / kKeys : 0);
    const int tile_begin = (int)blockIdx.z * p.tiles_per_split, tile_end = min(tile_begin + p.tiles_per_split, n_tiles);
    auto first_key = [&](int t) { return (t < first_tiles ? t : t - first_tiles) * kKeys; };
    auto span_of = [&](int t) -> const Span & { return p.spans[t < first_tiles ? 0 : 1]; };
    /* The first tile from `t` on of which some row may see a key. */
    auto next_visible = [&](int t) {
        for (; p.causal && t < tile_end; t++) {
            const int key0 = span_of(t).position + first_key(t), n_keys = min(kKeys, span_of(t).n - first_key(t));
            if (key0 <= last_query && (p.window == 0 || key0 + n_keys - 1 > first_query - p.window)) break;
        }
        return t;
    };
    auto load_keys = [&](int t) {
        const Span &span = span_of(t);
        load_tile<kKeys>(p.type_k, span.k, kv_head * span.capacity, span, first_key(t),
                         min(kKeys, span.n - first_key(t)), p.k_dim, k, l.k_stride);
    };
    int tile = next_visible(tile_begin);
    if (tile < tile_end) load_keys(tile);
    cp_async_commit();
    while (tile < tile_end) {
        const Span &span = span_of(tile);
        const int offset = first_key(tile), n_keys = min(kKeys, span.n - offset), key0 = span.position + offset;
        /* Values are loaded while scores are computed, the next keys while values are multiplied. */
        cp_async_wait<0>();
        __syncthreads(); /* the keys have arrived, and the last tile's values have been read */
        load_tile<kKeys>(p.type_v, span.v, kv_head * span.capacity, span, offset, n_keys, dim, v, l.v_stride);
        cp_async_commit();
        if (!p.has_v) { /* scores need the values too */
            cp_async_wait<0>();
            __syncthreads();
        }

        if (slice * 8 < kKeys) {
            float c[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
            const uint16_t *k_rows = k + slice * 8 * l.k_stride, *v_rows = v + slice * 8 * l.v_stride;
            if (p.has_v) {
                multiply_rows(c, q + row_group * 16 * l.q_stride, l.q_stride, k_rows, l.k_stride, dim, 0, 0);
            } else {
                multiply_rows(c, rotated + row_group * 16 * l.rotated_stride, l.rotated_stride, k_rows, l.k_stride,
                              pad_16(p.k_dim), 0, 0);
                /* Both halves begin with zeros, which need not be multiplied. */
                const uint16_t *q_rows = q + row_group * 16 * l.q_stride;
                multiply_rows(c, q_rows, l.q_stride, v_rows, l.v_stride, half / 16 * 16, 0, n_pairs);
                multiply_rows(c, q_rows + half / 16 * 16, l.q_stride, v_rows + half / 16 * 16, l.v_stride,
                              dim - half / 16 * 16, 0, half % 16 == 0 ? n_pairs : 0);
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
                scores[(row_group * 16 + lane / 4 + i / 2 * 8) * (kKeys + 4) + slice * 8 + lane % 4 * 2 + i % 2] =
                    c[0][i] + c[1][i];
        }
        __syncthreads(); /* the scores stand, and the keys have been read */
        const int next = next_visible(tile + 1);
        if (next < tile_end) load_keys(next);
        cp_async_commit();

        constexpr int kPart = kKeys / 8;
        float s[kPart], largest = maximum;
#pragma unroll
        for (int i = 0; i < kPart; i++) {
            int key = my_part * kPart + i;
            s[i] = key < n_keys && is_visible(p, my_query, key0 + key) ? scores[my_row * (kKeys + 4) + key] : -INFINITY;
            largest = fmaxf(largest, s[i]);
        }
#pragma unroll
        for (int bits = 1; bits < 8; bits *= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, bits));
        const bool any = largest > -INFINITY; /* otherwise every key so far is masked */
        const float correction = any ? __expf(maximum - largest) : 1.0f;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kPart; i++) {
            float weight = any ? __expf(s[i] - largest) : 0.0f;
            weights[my_row * (kKeys + 8) + my_part * kPart + i] = float_to_half(weight);
            sum += weight;
        }
#pragma unroll
        for (int bits = 1; bits < 8; bits *= 2) sum += __shfl_xor_sync(0xffffffff, sum, bits);
        normaliser = normaliser * correction + sum;
        maximum = largest;
        if (my_part == 0) corrections[my_row] = correction;
        cp_async_wait<1>(); /* the values; the next keys may be on their way */
        __syncthreads();

        const float correct[2] = {corrections[row_group * 16 + lane / 4], corrections[row_group * 16 + lane / 4 + 8]};
#pragma unroll
        for (int i = 0; i < kSliceTiles; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[i][j] *= correct[j / 2];
#pragma unroll
        for (int step = 0; step < kKeys; step += 16) {
            uint32_t a[4];
            ldmatrix_x4(a,
                        weights + (row_group * 16 + lane / 8 % 2 * 8 + lane % 8) * (kKeys + 8) + step + lane / 16 * 8);
#pragma unroll
            for (int i = 0; i < kSliceTiles; i += 2) {
                int d = (slice * kSliceTiles + i) * 8;
                if (d >= dim) continue;
                uint32_t b[4];
                ldmatrix_x4_trans(b, v + (step + lane / 8 % 2 * 8 + lane % 8) * l.v_stride + d + lane / 16 * 8);
                mma_f16_k16(acc[i], a, b);
                mma_f16_k16(acc[i + 1], a, b + 2);
            }
        }
        tile = next;
    }

    /* The normalisers are handed to the threads that hold the sums. */
    __syncthreads();
    if (my_part == 0) corrections[my_row] = p.n_splits == 1 ? normaliser : 1.0f;
    if (my_part == 0 && p.n_splits > 1 && row0 + my_row < n_rows) {
        int row = row0 + my_row;
        int64_t index = (int64_t)(row / group) * p.n_heads + kv_head * group + row % group;
        float *m = p.partial_max + ((int64_t)blockIdx.z * p.n * p.n_heads + index) * 2;
        m[0] = maximum;
        m[1] = normaliser;
    }
    __syncthreads();
    float *out = p.n_splits == 1 ? p.out : p.partial + (int64_t)blockIdx.z * p.n * p.n_heads * dim;
#pragma unroll
    for (int i = 0; i < kSliceTiles; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int local = row_group * 16 + lane / 4 + j / 2 * 8, row = row0 + local;
            int d = (slice * kSliceTiles + i) * 8 + lane % 4 * 2 + j % 2;
            if (row < n_rows && d < dim)
                out[((int64_t)(row / group) * p.n_heads + kv_head * group + row % group) * dim + d] =
                    acc[i][j] / corrections[local];
        }
}

constexpr int kJoinWarps = 4;

/* A warp for each query and head. */
__global__ void __launch_bounds__(32 * kJoinWarps) join_kernel(AttentionParams p) {
    KernelOrder launch_order;
    const int64_t rows = (int64_t)p.n * p.n_heads, row = (int64_t)blockIdx.x * kJoinWarps + threadIdx.x / 32;
    if (row >= rows) return;
    float largest = -INFINITY, normaliser = 0;
    for (int s = 0; s < p.n_splits; s++) largest = fmaxf(largest, p.partial_max[(s * rows + row) * 2]);
    for (int s = 0; s < p.n_splits; s++)
        normaliser += p.partial_max[(s * rows + row) * 2 + 1] * __expf(p.partial_max[(s * rows + row) * 2] - largest);
    for (int d = (int)threadIdx.x % 32; d < p.head_dim; d += 32) {
        float sum = 0;
        for (int s = 0; s < p.n_splits; s++)
            sum += p.partial[(s * rows + row) * p.head_dim + d] * __expf(p.partial_max[(s * rows + row) * 2] - largest);
        p.out[row * p.head_dim + d] = sum / normaliser;
    }
}

/* ---- In float32 ----------------------------------------------------------------------------------------------- */

/* A warp for each query and head, for caches of float32: slow, and as exact as the CPU. */
__global__ void __launch_bounds__(32 * kJoinWarps, 3) exact_kernel(AttentionParams p) {
    KernelOrder launch_order;
    const int lane = (int)threadIdx.x % 32, dim = p.head_dim, half = dim / 2, n_pairs = p.n_rot / 2;
    const int64_t item = (int64_t)blockIdx.x * kJoinWarps + threadIdx.x / 32;
    if (item >= (int64_t)p.n * p.n_heads) return;
    const int kv_head = (int)(item % p.n_heads) / (p.n_heads / p.n_kv_heads);
    const int query_position = p.position + (int)(item / p.n_heads);
    const float *q = p.q + item * dim;
    float acc[kMaxHeadDim / 32], maximum = -INFINITY, normaliser = 0;
    for (int j = 0; j < kMaxHeadDim / 32; j++) acc[j] = 0;
    for (int s = 0; s < p.n_spans; s++)
        for (int i = 0; i < p.spans[s].n; i++) {
            const Span &span = p.spans[s];
            if (!is_visible(p, query_position, span.position + i)) continue;
            const int64_t row = kv_head * span.capacity + (span.position + i) % span.capacity;
            float score = 0;
            for (int d = lane; d < dim; d += 32) {
                float key;
                if (p.has_v)
                    key = cache_value(p.type_k, span.k, row, dim, d);
                else if (d % half < n_pairs)
                    key = cache_value(p.type_k, span.k, row, p.k_dim, d % half + d / half * n_pairs);
                else
                    key = cache_value(p.type_v, span.v, row, dim, d);
                score += q[d] * key;
            }
            score = warp_sum(score);
            const float largest = fmaxf(maximum, score);
            const float correction = expf(maximum - largest), weight = expf(score - largest);
            normaliser = normaliser * correction + weight;
            maximum = largest;
#pragma unroll
            for (int j = 0; j < kMaxHeadDim / 32; j++)
                if (lane + 32 * j < dim)
                    acc[j] = acc[j] * correction + weight * cache_value(p.type_v, span.v, row, dim, lane + 32 * j);
        }
#pragma unroll
    for (int j = 0; j < kMaxHeadDim / 32; j++)
        if (lane + 32 * j < dim) p.out[item * dim + lane + 32 * j] = acc[j] / normaliser;
}

template <int kKeys> void launch_tiles(const Queue &queue, const AttentionParams &p) {
    dim3 grid((unsigned)ceil_div((int64_t)p.n * (p.n_heads / p.n_kv_heads), kRows), (unsigned)p.n_kv_heads,
              (unsigned)p.n_splits);
    size_t bytes = layout_of<kKeys>(p.head_dim, p.k_dim, p.has_v).bytes;
    dim3 block(32 * kWarps);
    if (p.head_dim <= 64)
        launch(attention_kernel<2, kKeys>, grid, block, bytes, queue.stream, p);
    else if (p.head_dim <= 256)
        launch(attention_kernel<8, kKeys>, grid, block, bytes, queue.stream, p);
    else
        launch(attention_kernel<16, kKeys>, grid, block, bytes, queue.stream, p);
}

constexpr size_t kMaxSharedBytes = 99 * 1024; /* of a block, on every architecture from 80 on */

} // namespace

void attend(const Queue &queue, const AttentionTask &t) {
    const dg_layer *layer = t.layer;
    AttentionParams p = {};
    for (int i = 0; i < t.n_spans; i++) {
        if (t.spans[i].n == 0) continue;
        const dg_kv *kv = t.spans[i].kv;
        p.spans[p.n_spans++] = {kv->k, kv->v, kv->capacity, t.spans[i].position, t.spans[i].n};
    }
    p.n_heads = t.n_heads;
    p.n_kv_heads = layer->n_kv_heads;
    p.head_dim = layer->head_dim;
    p.k_dim = dg_layer_k_dim(layer);
    p.n_rot = layer->n_rot;
    p.has_v = layer->attn_v.data != nullptr;
    p.n = t.n;
    p.position = t.position;
    p.causal = t.causal;
    p.window = t.window;
    p.type_k = t.type_k;
    p.type_v = t.type_v;
    p.q = t.q;
    p.out = t.out;

    if (t.type_k == DG_TYPE_F32 || t.type_v == DG_TYPE_F32) {
        launch(exact_kernel, dim3((unsigned)ceil_div((int64_t)t.n * t.n_heads, kJoinWarps)), dim3(32 * kJoinWarps), 0,
               queue.stream, p);
        return;
    }
    const bool wide = layout_of<32>(p.head_dim, p.k_dim, p.has_v).bytes > kMaxSharedBytes;
    const int keys = wide ? 16 : 32;
    int64_t n_tiles = 0;
    for (int i = 0; i < p.n_spans; i++) n_tiles += ceil_div(p.spans[i].n, keys);
    int64_t blocks = ceil_div((int64_t)t.n * (t.n_heads / p.n_kv_heads), kRows) * p.n_kv_heads;
    int64_t splits = 2 * queue.n_multiprocessors / blocks;
    if (splits > n_tiles / 8) splits = n_tiles / 8;
    if (splits > kMaxSplits) splits = kMaxSplits;
    int64_t row_floats = (int64_t)t.n * t.n_heads * (p.head_dim + 2);
    if (splits > t.scratch_floats / row_floats) splits = t.scratch_floats / row_floats;
    p.n_splits = splits < 1 ? 1 : (int)splits;
    p.tiles_per_split = (int)ceil_div(n_tiles, p.n_splits);
    p.partial = t.scratch;
    p.partial_max = t.scratch + (int64_t)p.n_splits * t.n * t.n_heads * p.head_dim;
    if (wide)
        launch_tiles<16>(queue, p);
    else
        launch_tiles<32>(queue, p);
    if (p.n_splits > 1)
        launch(join_kernel, dim3((unsigned)ceil_div((int64_t)t.n * t.n_heads, kJoinWarps)), dim3(32 * kJoinWarps), 0,
               queue.stream, p);
}
