/* Attention by key tiles with an online softmax.
 *
 * A block computes 32 rows for one head of keys. A row is a query and one of the heads that share those keys, so that
 * grouped queries fill the matrix instructions however few tokens there are. Its eight warps:
 *
 *                   scores: 32 keys              sums: the head's dimensions
 *                 ┌────┬────┬────┬────┐        ┌───────┬───────┬───────┬───────┐
 *     16 rows     │ w0 │ w1 │ w2 │ w3 │        │ w0    │ w1    │ w2    │ w3    │   each a quarter of the head
 *     16 rows     │ w4 │ w5 │ w6 │ w7 │        │ w4    │ w5    │ w6    │ w7    │
 *                 └────┴────┴────┴────┘        └───────┴───────┴───────┴───────┘
 *                  8 keys each
 *
 * Between the two the softmax takes the scores from shared memory, eight threads a row. Long caches are split over
 * blocks, whose results a second kernel joins. In layers without attn_v the keys hold only the rotated dimensions; over
 * the others the query (which forward.c's project_qkv has multiplied by k_norm) meets the values in place of the keys.
 */
#include "cuda/kernels/attention.cuh"

namespace {

constexpr int kRows = 32;
constexpr int kWarps = 8;
constexpr int kMaxSplits = 16;

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

/* A block's work. A row's softmax is kept by eight threads, each with an eighth of the keys; its sums by a warp of its
 * group. kSliceTiles: tiles of 8 dimensions in a warp's quarter of the head. */
template <int kSliceTiles, int kKeys> struct AttentionBlock {
    static constexpr int kPart = kKeys / 8;

    const AttentionParams &p;
    const Layout l;
    uint16_t *const q, *const rotated, *const k, *const v, *const weights;
    float *const scores, *const corrections;
    const int lane, row_group, slice;
    const int dim, half, n_pairs, group, kv_head, row0, n_rows;
    const int my_row, my_part;
    int my_query, first_query, last_query;
    int first_tiles, tile_end;
    float maximum = -INFINITY, denominator = 0;
    float acc[kSliceTiles][4];

    __device__ __forceinline__ explicit AttentionBlock(const AttentionParams &params)
        : p(params), l(layout_of<kKeys>(p.head_dim, p.k_dim, p.has_v)), q(shared_memory<uint16_t>()),
          rotated(q + l.rotated), k(q + l.k), v(q + l.v), weights(q + l.p),
          scores(reinterpret_cast<float *>(shared_memory<char>() + l.scores)),
          corrections(reinterpret_cast<float *>(shared_memory<char>() + l.corrections)), lane((int)threadIdx.x % 32),
          row_group((int)threadIdx.x / 128), slice((int)threadIdx.x / 32 % 4), dim(p.head_dim), half(dim / 2),
          n_pairs(p.n_rot / 2), group(p.n_heads / p.n_kv_heads), kv_head((int)blockIdx.y),
          row0((int)blockIdx.x * kRows), n_rows(p.n * group), my_row((int)threadIdx.x / 8),
          my_part((int)threadIdx.x % 8) {
        my_query = p.position + min(row0 + my_row, n_rows - 1) / group;
        first_query = p.position + row0 / group;
        last_query = p.position + (min(row0 + kRows, n_rows) - 1) / group;
        first_tiles = (p.spans[0].n + kKeys - 1) / kKeys;
        const int n_tiles = first_tiles + (p.n_spans > 1 ? (p.spans[1].n + kKeys - 1) / kKeys : 0);
        tile_end = min(((int)blockIdx.z + 1) * p.tiles_per_split, n_tiles);
#pragma unroll
        for (int i = 0; i < kSliceTiles; i++) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0;
    }

    /* Where a row of queries (of its position and head) stands among all. */
    __device__ __forceinline__ int64_t index_of(int row) const {
        return (int64_t)(row / group) * p.n_heads + kv_head * group + row % group;
    }

    /* ---- Key tiles ---- */

    __device__ __forceinline__ const Span &span_of(int t) const { return p.spans[t < first_tiles ? 0 : 1]; }
    __device__ __forceinline__ int first_key(int t) const { return (t < first_tiles ? t : t - first_tiles) * kKeys; }
    __device__ __forceinline__ int keys_of(int t) const { return min(kKeys, span_of(t).n - first_key(t)); }

    /* The first tile from `t` on of which some row may see a key. */
    __device__ __forceinline__ int next_visible(int t) const {
        for (; p.causal && t < tile_end; t++) {
            const int key0 = span_of(t).position + first_key(t);
            if (key0 <= last_query && (p.window == 0 || key0 + keys_of(t) - 1 > first_query - p.window)) break;
        }
        return t;
    }
    __device__ __forceinline__ void load_keys(int t) const {
        const Span &span = span_of(t);
        load_tile<kKeys>(p.type_k, span.k, kv_head * span.capacity, span, first_key(t), keys_of(t), p.k_dim, k,
                         l.k_stride);
    }
    __device__ __forceinline__ void load_values(int t) const {
        const Span &span = span_of(t);
        load_tile<kKeys>(p.type_v, span.v, kv_head * span.capacity, span, first_key(t), keys_of(t), dim, v, l.v_stride);
    }

    /* ---- Steps ---- */

    /* Where the keys hold only the rotated dimensions, those go to `rotated` and leave zeros in q. */
    __device__ __forceinline__ void load_queries() const {
        for (int i = (int)threadIdx.x; i < kRows * dim; i += 32 * kWarps) {
            const int row = row0 + i / dim, d = i % dim;
            const float value = row < n_rows ? p.q[index_of(row) * dim + d] : 0.0f;
            const bool rotates = !p.has_v && d % half < n_pairs;
            q[i / dim * l.q_stride + d] = float_to_half(rotates ? 0.0f : value);
            if (rotates) rotated[i / dim * l.rotated_stride + d % half + d / half * n_pairs] = float_to_half(value);
        }
        const int padding = p.has_v ? 0 : pad_16(p.k_dim) - p.k_dim;
        for (int i = (int)threadIdx.x; i < kRows * padding; i += 32 * kWarps)
            rotated[i / padding * l.rotated_stride + p.k_dim + i % padding] = 0;
    }

    /* scores (kRows, kKeys) = q · kᵀ: a warp has 16 rows and 8 keys. */
    __device__ __forceinline__ void score() const {
        if (slice * 8 >= kKeys) return;
        float c[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
        const uint16_t *k_rows = k + slice * 8 * l.k_stride, *v_rows = v + slice * 8 * l.v_stride;
        const uint16_t *q_rows = q + row_group * 16 * l.q_stride;
        if (p.has_v) {
            multiply_rows(c, q_rows, l.q_stride, k_rows, l.k_stride, dim, 0, 0);
        } else {
            multiply_rows(c, rotated + row_group * 16 * l.rotated_stride, l.rotated_stride, k_rows, l.k_stride,
                          pad_16(p.k_dim), 0, 0);
            /* Both halves begin with zeros, which need not be multiplied. */
            const int middle = half / 16 * 16;
            multiply_rows(c, q_rows, l.q_stride, v_rows, l.v_stride, middle, 0, n_pairs);
            multiply_rows(c, q_rows + middle, l.q_stride, v_rows + middle, l.v_stride, dim - middle, 0,
                          half % 16 == 0 ? n_pairs : 0);
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
            scores[(row_group * 16 + lane / 4 + i / 2 * 8) * (kKeys + 4) + slice * 8 + lane % 4 * 2 + i % 2] =
                c[0][i] + c[1][i];
    }

    /* weights = exp(scores − maximum so far), and what earlier sums are to be multiplied by. */
    __device__ __forceinline__ void online_softmax(int tile) {
        const int n_keys = keys_of(tile), key0 = span_of(tile).position + first_key(tile);
        float s[kPart], largest = maximum;
#pragma unroll
        for (int i = 0; i < kPart; i++) {
            const int key = my_part * kPart + i;
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
            const float weight = any ? __expf(s[i] - largest) : 0.0f;
            weights[my_row * (kKeys + 8) + my_part * kPart + i] = float_to_half(weight);
            sum += weight;
        }
#pragma unroll
        for (int bits = 1; bits < 8; bits *= 2) sum += __shfl_xor_sync(0xffffffff, sum, bits);
        denominator = denominator * correction + sum;
        maximum = largest;
        if (my_part == 0) corrections[my_row] = correction;
    }

    /* acc = acc · correction + weights · v: a warp has 16 rows and a quarter of the head. */
    __device__ __forceinline__ void accumulate() {
        const float correct[2] = {corrections[row_group * 16 + lane / 4], corrections[row_group * 16 + lane / 4 + 8]};
#pragma unroll
        for (int i = 0; i < kSliceTiles; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[i][j] *= correct[j / 2];
        const uint16_t *a_row = weights + (row_group * 16 + lane / 8 % 2 * 8 + lane % 8) * (kKeys + 8) + lane / 16 * 8;
#pragma unroll
        for (int step = 0; step < kKeys; step += 16) {
            uint32_t a[4];
            ldmatrix_x4(a, a_row + step);
#pragma unroll
            for (int i = 0; i < kSliceTiles; i += 2) {
                const int d = (slice * kSliceTiles + i) * 8;
                if (d >= dim) continue;
                uint32_t b[4];
                ldmatrix_x4_trans(b, v + (step + lane / 8 % 2 * 8 + lane % 8) * l.v_stride + d + lane / 16 * 8);
                mma_f16_k16(acc[i], a, b);
                mma_f16_k16(acc[i + 1], a, b + 2);
            }
        }
    }

    /* The denominators are handed to the threads that hold the sums; of a split, to join_kernel. */
    __device__ __forceinline__ void write() const {
        __syncthreads();
        if (my_part == 0) corrections[my_row] = p.n_splits == 1 ? denominator : 1.0f;
        if (my_part == 0 && p.n_splits > 1 && row0 + my_row < n_rows) {
            float *m = p.partial_max + ((int64_t)blockIdx.z * p.n * p.n_heads + index_of(row0 + my_row)) * 2;
            m[0] = maximum;
            m[1] = denominator;
        }
        __syncthreads();
        float *out = p.n_splits == 1 ? p.out : p.partial + (int64_t)blockIdx.z * p.n * p.n_heads * dim;
#pragma unroll
        for (int i = 0; i < kSliceTiles; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int local = row_group * 16 + lane / 4 + j / 2 * 8, row = row0 + local;
                const int d = (slice * kSliceTiles + i) * 8 + lane % 4 * 2 + j % 2;
                if (row < n_rows && d < dim) out[index_of(row) * dim + d] = acc[i][j] / corrections[local];
            }
    }
};

template <int kSliceTiles, int kKeys>
__global__ void __launch_bounds__(32 * kWarps, kSliceTiles == 16 ? 1 : 2) attention_kernel(AttentionParams p) {
    KernelOrder launch_order;
    AttentionBlock<kSliceTiles, kKeys> block(p);
    block.load_queries();
    int tile = block.next_visible((int)blockIdx.z * p.tiles_per_split);
    if (tile < block.tile_end) block.load_keys(tile);
    cp_async_commit();
    while (tile < block.tile_end) {
        /* Values are loaded while scores are computed, the next keys while values are multiplied. */
        cp_async_wait<0>();
        __syncthreads(); /* the keys have arrived, and the last tile's values have been read */
        block.load_values(tile);
        cp_async_commit();
        if (!p.has_v) { /* scores need the values too */
            cp_async_wait<0>();
            __syncthreads();
        }
        block.score();
        __syncthreads(); /* the scores stand, and the keys have been read */
        const int next = block.next_visible(tile + 1);
        if (next < block.tile_end) block.load_keys(next);
        cp_async_commit();
        block.online_softmax(tile);
        cp_async_wait<1>(); /* the values; the next keys may be on their way */
        __syncthreads();
        block.accumulate();
        tile = next;
    }
    block.write();
}

constexpr int kJoinWarps = 4;

/* A warp for each query and head. */
__global__ void __launch_bounds__(32 * kJoinWarps) join_kernel(AttentionParams p) {
    KernelOrder launch_order;
    const int64_t rows = (int64_t)p.n * p.n_heads, row = (int64_t)blockIdx.x * kJoinWarps + threadIdx.x / 32;
    if (row >= rows) return;
    float largest = -INFINITY, denominator = 0;
    for (int s = 0; s < p.n_splits; s++) largest = fmaxf(largest, p.partial_max[(s * rows + row) * 2]);
    for (int s = 0; s < p.n_splits; s++)
        denominator += p.partial_max[(s * rows + row) * 2 + 1] * __expf(p.partial_max[(s * rows + row) * 2] - largest);
    for (int d = (int)threadIdx.x % 32; d < p.head_dim; d += 32) {
        float sum = 0;
        for (int s = 0; s < p.n_splits; s++)
            sum += p.partial[(s * rows + row) * p.head_dim + d] * __expf(p.partial_max[(s * rows + row) * 2] - largest);
        p.out[row * p.head_dim + d] = sum / denominator;
    }
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
        attend_exactly(queue, p);
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
