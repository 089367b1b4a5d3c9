/* Norms, activations for the products, rotation and residuals: a block a row, which stays in registers (rows.cuh). */
#include "cuda/kernels/rows.cuh"

namespace {

/* ---- Activations ---------------------------------------------------------------------------------------------- */

__global__ void __launch_bounds__(kMaxRowThreads)
    prepare_kernel(Rows rows, int n_cols, bool norm, float eps, Preparation targets) {
    KernelOrder launch_order;
    float *shared = shared_memory<float>(); /* (32) */
    const int row = (int)blockIdx.x;
    const Row x = load_rows(rows, row, n_cols);
    prepare(targets, x, norm ? norm_factor(x, n_cols, eps, shared) : 1.0f, row, n_cols, shared);
}

__global__ void __launch_bounds__(kMaxRowThreads)
    gated_kernel(Partials gate_up, int n_ff, ActivationKind kind, Activations x) {
    KernelOrder launch_order;
    float *shared = shared_memory<float>(); /* (32) */
    const int row = (int)blockIdx.x;
    const bool wanted[kActivationKinds] = {kind == kInt8, kind == kFp4Terms, kind == kFloats, kind == kHalves};
    const Row gate = load_partials(gate_up, row, 0, n_ff), up = load_partials(gate_up, row, n_ff, n_ff);
    const Row hidden = combine_rows(gate, up, [](float g, float u) { return gelu_tanh(g) * u; });
    write_activations(x, wanted, row, n_ff, hidden, shared);
}

/* ---- Queries, keys and values --------------------------------------------------------------------------------- */

/* Stores a head's row of `dim` values from shared memory as `type`; a warp's work. */
__device__ void store_cache_row(int type, void *rows, int64_t row, const float *values, int dim) {
    const int lane = (int)threadIdx.x % 32;
    for (int d0 = 0; d0 < dim; d0 += 32) {
        const int d = d0 + lane;
        const float value = d < dim ? values[d] : 0.0f;
        if (type == DG_TYPE_Q8_0) {
            dg_block_q8_0 *block = (dg_block_q8_0 *)rows + row * ((dim + 31) / 32) + d0 / 32;
            float largest = warp_max(fabsf(value));
            block->qs[lane] = (int8_t)quantize(value, largest);
            if (lane == 0) store_half(block, largest / 127.0f);
        } else if (d < dim) {
            if (type == DG_TYPE_F32)
                ((float *)rows)[row * dim + d] = value;
            else if (type == DG_TYPE_F16)
                store_half((uint16_t *)rows + row * dim + d, value);
            else { /* bfloat16, to nearest even */
                uint32_t bits = __float_as_uint(value);
                ((uint16_t *)rows)[row * dim + d] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
            }
        }
    }
}

struct QkvParams {
    Partials projections;
    const float *q_norm, *k_norm, *frequencies;
    int n_heads, n_kv_heads, head_dim, n_rot;
    int position;
    float eps;
    float *q;
    void *k, *v;
    int64_t capacity;
    int type_k, type_v;
    bool has_v;
};

constexpr int kQkvWarps = 4;

/* A warp for each token's head of q (unless q is NULL), of k and of v. */
__global__ void __launch_bounds__(32 * kQkvWarps) qkv_kernel(QkvParams p) {
    KernelOrder launch_order;
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int n_queries = p.q != nullptr ? p.n_heads : 0;
    const int heads = n_queries + 2 * p.n_kv_heads;
    const int64_t item = (int64_t)blockIdx.x * kQkvWarps + warp;
    if (item >= (int64_t)p.projections.n * heads) return;
    const int token = (int)(item / heads), h = (int)(item % heads);
    const bool is_q = h < n_queries, is_v = h >= n_queries + p.n_kv_heads;
    const int dim = p.head_dim, half = dim / 2, n_pairs = p.n_rot / 2;
    float *y = shared_memory<float>() + warp * dim;

    /* Without a projection of its own v is that of k. */
    const int column = is_v && !p.has_v ? (h - p.n_kv_heads) * dim : h * dim;
    float squares = 0;
    for (int d = lane; d < dim; d += 32) {
        y[d] = partial_sum(p.projections, token, column + d);
        squares += y[d] * y[d];
    }
    const float factor = 1.0f / sqrtf(warp_sum(squares) / (float)dim + p.eps);
    const float *norm = is_q ? p.q_norm : p.k_norm;
    for (int d = lane; d < dim; d += 32) y[d] *= is_v ? factor : factor * norm[d];
    __syncwarp();

    const int64_t slot = (p.position + token) % p.capacity;
    if (is_v) {
        store_cache_row(p.type_v, p.v, (h - n_queries - p.n_kv_heads) * p.capacity + slot, y, dim);
        return;
    }
    for (int i = lane; i < n_pairs; i += 32) {
        float sine, cosine;
        sincosf((float)(p.position + token) * p.frequencies[i], &sine, &cosine);
        float a = y[i], b = y[i + half];
        y[i] = a * cosine - b * sine;
        y[i + half] = b * cosine + a * sine;
    }
    __syncwarp();
    if (is_q) {
        float *q = p.q + ((int64_t)token * p.n_heads + h) * dim;
        for (int d = lane; d < dim; d += 32) {
            bool meets_v = !p.has_v && d % half >= n_pairs; /* in place of k, which is v · k_norm there */
            q[d] = meets_v ? y[d] * p.k_norm[d] : y[d];
        }
        return;
    }
    const int64_t row = (h - n_queries) * p.capacity + slot;
    if (p.has_v) {
        store_cache_row(p.type_k, p.k, row, y, dim);
        return;
    }
    /* Only the rotated dimensions are kept: the second halves move up behind the first ones. */
    float moved[16];
    for (int i = lane, j = 0; i < n_pairs; i += 32, j++) moved[j] = y[half + i];
    __syncwarp();
    for (int i = lane, j = 0; i < n_pairs; i += 32, j++) y[n_pairs + i] = moved[j];
    __syncwarp();
    store_cache_row(p.type_k, p.k, row, y, p.n_rot);
}

/* ---- Residual stream ------------------------------------------------------------------------------------------ */

__global__ void __launch_bounds__(kMaxRowThreads) store_kernel(Rows rows, int n_cols, float *out) {
    KernelOrder launch_order;
    const int row = (int)blockIdx.x;
    store_row(out + (int64_t)row * n_cols, n_cols, load_rows(rows, row, n_cols));
}

__global__ void __launch_bounds__(kMaxRowThreads)
    add_normed_kernel(Partials p, const float *weight, float eps, float *x, Preparation next) {
    KernelOrder launch_order;
    float *shared = shared_memory<float>(); /* (32) */
    const int n = p.n_columns, row = (int)blockIdx.x;
    const Row before = load_row(x + (int64_t)row * n, n), w = load_row(weight, n), y = load_partials(p, row, 0, n);
    const float factor = norm_factor(y, n, eps, shared);
    const Row normed = combine_rows(y, w, [&](float value, float gain) { return value * factor * gain; });
    finish_row(x, combine_rows(before, normed, [](float a, float b) { return a + b; }), row, n, eps, next, shared);
}

/* x = rms(x + d); without d where `add` is false. */
__global__ void __launch_bounds__(kMaxRowThreads)
    add_then_norm_kernel(float *x, bool add, Rows d, int n, float eps, Preparation next) {
    KernelOrder launch_order;
    float *shared = shared_memory<float>(); /* (32) */
    const int row = (int)blockIdx.x;
    Row y = load_row(x + (int64_t)row * n, n);
    if (add) y = combine_rows(y, load_rows(d, row, n), [](float a, float b) { return a + b; });
    const float factor = norm_factor(y, n, eps, shared);
    finish_row(x, map_row(y, [&](float value) { return value * factor; }), row, n, eps, next, shared);
}

__global__ void __launch_bounds__(kMaxRowThreads) combine_kernel(CombineTask p, Preparation next) {
    KernelOrder launch_order;
    float *shared = shared_memory<float>(); /* (64) */
    const int n = p.n_embd, row = (int)blockIdx.x;
    const Row d = load_rows(p.d, row, n), e = load_rows(p.e, row, n);
    const float2 sums = block_sum_pair(make_float2(squares(d), squares(e)), shared);
    const float d_factor = 1.0f / sqrtf(sums.x / (float)n + p.eps), e_factor = 1.0f / sqrtf(sums.y / (float)n + p.eps);
    const Row from_d =
        combine_rows(d, load_row(p.d_norm, n), [&](float value, float w) { return value * d_factor * w; });
    const Row from_e =
        combine_rows(e, load_row(p.e_norm, n), [&](float value, float w) { return value * e_factor * w; });
    const Row y = combine_rows(from_d, from_e, [](float a, float b) { return a + b; });
    const float factor = norm_factor(y, n, p.eps, shared), scalar = p.scalar;
    const Row normed = combine_rows(y, load_row(p.norm, n), [&](float value, float w) { return value * factor * w; });
    const Row x = combine_rows(load_row(p.x + (int64_t)row * n, n), normed,
                               [&](float before, float added) { return scalar * (before + added); });
    finish_row(p.x, x, row, n, p.eps, next, shared);
}

/* ---- Embedding ------------------------------------------------------------------------------------------------ */

constexpr int kEmbedThreads = 256;

/* A thread for each (token, tile of columns, t of formats.cuh). */
template <class F>
__global__ void __launch_bounds__(kEmbedThreads) embed_kernel(const char *tiles, const float *scale, const int32_t *ids,
                                                              int n_cols, int k_tiles, float gain, float *x) {
    KernelOrder launch_order;
    const int token = (int)blockIdx.x;
    const int id = ids[token], row = id % kTileRows;
    if (scale != nullptr) gain *= *scale;
    for (int i = (int)threadIdx.x; i < k_tiles * 4; i += kEmbedThreads) {
        const char *row_tile = tiles + id / kTileRows * row_tile_bytes<F>(k_tiles);
        for_each_value<F>(row_tile, i / 4, row % 8 * 4 + i % 4, [&](int half, int slot, float value) {
            int column = i / 4 * F::kTileCols + F::lane_column(slot, i % 4);
            if (half == row / 8 && column < n_cols) x[(int64_t)token * n_cols + column] = value * gain;
        });
    }
}

constexpr size_t kReduceBytes = 64 * sizeof(float);

} // namespace

void prepare_rows(const Queue &queue, const Rows &x, int n, int n_cols, bool norm, float eps,
                  const Preparation &targets) {
    launch(prepare_kernel, dim3((unsigned)n), row_threads(n_cols), kReduceBytes, queue.stream, x, n_cols, norm, eps,
           targets);
}

void prepare_gated(const Queue &queue, const Partials &gate_up, int n_ff, ActivationKind kind, const Activations &x) {
    launch(gated_kernel, dim3((unsigned)gate_up.n), row_threads(n_ff), kReduceBytes, queue.stream, gate_up, n_ff, kind,
           x);
}

void finish_qkv(const Queue &queue, const Partials &projections, const QkvTarget &t) {
    const dg_layer *layer = t.layer;
    QkvParams p = {projections,
                   t.q_norm,
                   t.k_norm,
                   t.frequencies,
                   t.n_heads,
                   layer->n_kv_heads,
                   layer->head_dim,
                   layer->n_rot,
                   t.position,
                   t.eps,
                   t.q,
                   t.kv.k,
                   t.kv.v,
                   t.kv.capacity,
                   t.type_k,
                   t.type_v,
                   layer->attn_v.data != nullptr};
    int64_t items = (int64_t)projections.n * ((t.q != nullptr ? t.n_heads : 0) + 2 * layer->n_kv_heads);
    launch(qkv_kernel, dim3((unsigned)ceil_div(items, kQkvWarps)), dim3(32 * kQkvWarps),
           (size_t)kQkvWarps * (size_t)layer->head_dim * sizeof(float), queue.stream, p);
}

void store_rows(const Queue &queue, const Rows &rows, int n, int n_cols, float *out) {
    launch(store_kernel, dim3((unsigned)n), row_threads(n_cols), 0, queue.stream, rows, n_cols, out);
}

void add_normed(const Queue &queue, const Partials &p, const float *weight, float eps, float *x,
                const Preparation &next) {
    launch(add_normed_kernel, dim3((unsigned)p.n), row_threads(p.n_columns), kReduceBytes, queue.stream, p, weight, eps,
           x, next);
}

void add_then_norm(const Queue &queue, float *x, const Rows *d, int n, int n_embd, float eps, const Preparation &next) {
    launch(add_then_norm_kernel, dim3((unsigned)n), row_threads(n_embd), kReduceBytes, queue.stream, x, d != nullptr,
           d != nullptr ? *d : Rows{}, n_embd, eps, next);
}

void combine(const Queue &queue, const CombineTask &task, int n, const Preparation &next) {
    launch(combine_kernel, dim3((unsigned)n), row_threads(task.n_embd), kReduceBytes, queue.stream, task, next);
}

void embed_rows(const Queue &queue, const DeviceWeight &embedding, const int32_t *ids, int n, float *x) {
    PackedShape shape = packed_shape(embedding.type, embedding.n_rows, embedding.n_cols);
    float gain = sqrtf((float)embedding.n_cols);
    with_format(embedding.type, [&](auto format) {
        launch(embed_kernel<decltype(format)>, dim3((unsigned)n), dim3(kEmbedThreads), 0, queue.stream, embedding.tiles,
               embedding.scale, ids, (int)embedding.n_cols, (int)shape.k_tiles, gain, x);
    });
}
