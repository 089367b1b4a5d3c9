/* Norms, activations for the products, rotation and residuals: one pass over rows each. */
#include "cuda/device.cuh"
#include "cuda/kernels/reduce.cuh"

namespace {

constexpr int kThreads = 256;

/* ---- Activations ---------------------------------------------------------------------------------------------- */

/* Both terms of 32 columns of a row that has been scaled (format_fp4.cuh); `column` is this lane's. */
__device__ void write_terms(const Activations &x, int64_t row, int column, int64_t k_tiles, float value) {
    const int lane = (int)threadIdx.x % 32;
    const int64_t chunk = row * k_tiles + column / 64;
#pragma unroll
    for (int term = 0; term < 2; term++) {
        float largest = fabsf(value);
#pragma unroll
        for (int bits = 1; bits < 16; bits *= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, bits));
        const uint32_t scale_code = e4m3_code(fminf(largest / 6, 448.0f));
        const float scale = e4m3_value(scale_code);
        const uint32_t code = scale > 0 ? e2m1_code(value / scale) : 0;
        const uint32_t next = __shfl_xor_sync(0xffffffff, code, 1);
        if (lane % 2 == 0)
            x.terms[chunk * 64 + term * 32 + column % 32 / 8 * 8 + column % 64 / 32 * 4 + column % 8 / 2] =
                (uint8_t)(code | next << 4);
        if (lane % 16 == 0)
            reinterpret_cast<uint8_t *>(x.term_scales + chunk * 2 + term)[column % 64 / 16] = (uint8_t)scale_code;
        value -= e2m1_value(code) * scale;
    }
}

constexpr float kLargestTerm = 448 * 6; /* what a row is scaled to */

/* A warp writes 32 columns of a row, one a lane, from `column0`; beyond n_cols the value must be zero. `largest` of the
 * row's magnitudes is needed for terms. */
__device__ void write_activation(const Activations &x, const bool (&wanted)[3], int64_t row, int column0, int n_cols,
                                 float value, float largest) {
    const int lane = (int)threadIdx.x % 32, column = column0 + lane;
    const int64_t k_tiles = (n_cols + 63) / 64;
    if (wanted[kInt8]) {
        const float block_largest = warp_max(fabsf(value));
        const int code = quantise(value, block_largest);
        const int sum = warp_sum_int(code);
        x.codes[row * k_tiles * 64 + code_position(column)] = (int8_t)code;
        if (lane == 0) {
            float scale = block_largest / 127.0f;
            x.scales[row * k_tiles * 2 + column0 / 32] = scale;
            x.sums[row * k_tiles * 2 + column0 / 32] = scale * (float)sum;
        }
    }
    if (wanted[kFp4Terms]) {
        if (column == 0) x.term_multipliers[row] = largest / kLargestTerm;
        write_terms(x, row, column, k_tiles, largest > 0 ? value * (kLargestTerm / largest) : 0.0f);
    }
    if (wanted[kFloats] && column < n_cols) x.values[row * n_cols + value_position(column)] = value;
}

struct PrepareParams {
    const float *x;
    int n_cols;
    bool norm;
    float eps;
    PrepareTarget targets[2];
    int n_targets;
};

__global__ void __launch_bounds__(kThreads) prepare_kernel(PrepareParams p) {
    wait_for_predecessor();
    float *shared = shared_memory<float>(); /* (32) */
    const int64_t row = blockIdx.x;
    const float *x = p.x + row * p.n_cols;
    float factor = 1;
    if (p.norm) {
        float squares = 0;
        for (int i = (int)threadIdx.x; i < p.n_cols; i += kThreads) squares += x[i] * x[i];
        factor = 1.0f / sqrtf(block_sum(squares, shared) / (float)p.n_cols + p.eps);
    }
    const int padded = (p.n_cols + 63) / 64 * 64;
    for (int i = 0; i < p.n_targets; i++) {
        const PrepareTarget &t = p.targets[i];
        auto value_of = [&](int column) {
            float value = x[column] * factor * t.gain;
            return t.weight != nullptr ? value * t.weight[column] : value;
        };
        float largest = 0;
        if (t.wanted[kFp4Terms]) {
            for (int column = (int)threadIdx.x; column < p.n_cols; column += kThreads)
                largest = fmaxf(largest, fabsf(value_of(column)));
            largest = block_max(largest, shared);
        }
        for (int column0 = (int)threadIdx.x / 32 * 32; column0 < padded; column0 += kThreads) {
            const int column = column0 + (int)threadIdx.x % 32;
            const float value = column < p.n_cols ? value_of(column) : 0.0f;
            write_activation(t.x, t.wanted, row, column0, p.n_cols, value, largest);
        }
    }
}

__global__ void __launch_bounds__(kThreads)
    gated_kernel(Partials gate_up, int n_ff, ActivationKind kind, Activations x) {
    wait_for_predecessor();
    float *shared = shared_memory<float>(); /* (32) */
    const int row = (int)blockIdx.x;
    const bool wanted[3] = {kind == kInt8, kind == kFp4Terms, kind == kFloats};
    auto value_of = [&](int column) {
        return gelu_tanh(partial_sum(gate_up, row, column)) * partial_sum(gate_up, row, n_ff + column);
    };
    float largest = 0;
    if (kind == kFp4Terms) {
        for (int column = (int)threadIdx.x; column < n_ff; column += kThreads)
            largest = fmaxf(largest, fabsf(value_of(column)));
        largest = block_max(largest, shared);
    }
    const int padded = (n_ff + 63) / 64 * 64;
    for (int column0 = (int)threadIdx.x / 32 * 32; column0 < padded; column0 += kThreads) {
        const int column = column0 + (int)threadIdx.x % 32;
        write_activation(x, wanted, row, column0, n_ff, column < n_ff ? value_of(column) : 0.0f, largest);
    }
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
            block->qs[lane] = (int8_t)quantise(value, largest);
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
    wait_for_predecessor();
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

__global__ void __launch_bounds__(kThreads) sum_kernel(Partials p, float *out) {
    wait_for_predecessor();
    for (int i = (int)threadIdx.x; i < p.n_columns; i += kThreads)
        out[(int64_t)blockIdx.x * p.n_columns + i] = partial_sum(p, (int)blockIdx.x, i);
}

__global__ void __launch_bounds__(kThreads) add_normed_kernel(Partials p, const float *weight, float eps, float *x) {
    wait_for_predecessor();
    float *shared = shared_memory<float>(); /* (32), then the row */
    float *y = shared + 32;
    const int n = p.n_columns;
    float squares = 0;
    for (int i = (int)threadIdx.x; i < n; i += kThreads) {
        y[i] = partial_sum(p, (int)blockIdx.x, i);
        squares += y[i] * y[i];
    }
    const float factor = 1.0f / sqrtf(block_sum(squares, shared) / (float)n + eps);
    x += (int64_t)blockIdx.x * n;
    for (int i = (int)threadIdx.x; i < n; i += kThreads) x[i] += y[i] * factor * weight[i];
}

__global__ void __launch_bounds__(kThreads) add_then_norm_kernel(float *x, const float *d, int n, float eps) {
    wait_for_predecessor();
    float *shared = shared_memory<float>(); /* (32), then the row */
    float *y = shared + 32;
    x += (int64_t)blockIdx.x * n;
    float squares = 0;
    for (int i = (int)threadIdx.x; i < n; i += kThreads) {
        y[i] = x[i] + (d != nullptr ? d[(int64_t)blockIdx.x * n + i] : 0.0f);
        squares += y[i] * y[i];
    }
    const float factor = 1.0f / sqrtf(block_sum(squares, shared) / (float)n + eps);
    for (int i = (int)threadIdx.x; i < n; i += kThreads) x[i] = y[i] * factor;
}

struct CombineParams {
    float *x;
    const float *d, *e, *d_norm, *e_norm, *norm;
    int n_embd;
    float eps, scalar;
};

__global__ void __launch_bounds__(kThreads) combine_kernel(CombineParams p) {
    wait_for_predecessor();
    float *shared = shared_memory<float>(); /* (32), then the row */
    float *y = shared + 32;
    const int n = p.n_embd;
    const int64_t row = (int64_t)blockIdx.x * n;
    float d_squares = 0, e_squares = 0, squares = 0;
    for (int i = (int)threadIdx.x; i < n; i += kThreads) {
        d_squares += p.d[row + i] * p.d[row + i];
        e_squares += p.e[row + i] * p.e[row + i];
    }
    const float d_factor = 1.0f / sqrtf(block_sum(d_squares, shared) / (float)n + p.eps);
    const float e_factor = 1.0f / sqrtf(block_sum(e_squares, shared) / (float)n + p.eps);
    for (int i = (int)threadIdx.x; i < n; i += kThreads) {
        y[i] = p.d[row + i] * d_factor * p.d_norm[i] + p.e[row + i] * e_factor * p.e_norm[i];
        squares += y[i] * y[i];
    }
    const float factor = 1.0f / sqrtf(block_sum(squares, shared) / (float)n + p.eps);
    for (int i = (int)threadIdx.x; i < n; i += kThreads)
        p.x[row + i] = p.scalar * (p.x[row + i] + y[i] * factor * p.norm[i]);
}

/* ---- Embedding ------------------------------------------------------------------------------------------------ */

/* A thread for each (token, tile of columns, t of formats.cuh). */
template <class F>
__global__ void __launch_bounds__(kThreads) embed_kernel(const char *tiles, const float *scale, const int32_t *ids,
                                                         int n_cols, int k_tiles, float gain, float *x) {
    wait_for_predecessor();
    const int token = (int)blockIdx.x;
    const int id = ids[token], row = id % kTileRows;
    if (scale != nullptr) gain *= *scale;
    for (int i = (int)threadIdx.x; i < k_tiles * 4; i += kThreads) {
        const char *row_tile = tiles + id / kTileRows * row_tile_bytes<F>(k_tiles);
        for_each_value<F>(row_tile, i / 4, row % 8 * 4 + i % 4, [&](int half, int slot, float value) {
            int column = i / 4 * F::kTileCols + F::lane_column(slot, i % 4);
            if (half == row / 8 && column < n_cols) x[(int64_t)token * n_cols + column] = value * gain;
        });
    }
}

constexpr size_t row_bytes(int n_cols) { return (size_t)(32 + n_cols) * sizeof(float); }

} // namespace

void prepare_rows(const Queue &queue, const float *x, int n, int n_cols, bool norm, float eps,
                  const PrepareTarget *targets, int n_targets) {
    PrepareParams p = {x, n_cols, norm, eps, {}, n_targets};
    for (int i = 0; i < n_targets; i++) p.targets[i] = targets[i];
    launch(prepare_kernel, dim3((unsigned)n), dim3(kThreads), row_bytes(0), queue.stream, p);
}

void prepare_gated(const Queue &queue, const Partials &gate_up, int n_ff, ActivationKind kind, const Activations &x) {
    launch(gated_kernel, dim3((unsigned)gate_up.n), dim3(kThreads), row_bytes(0), queue.stream, gate_up, n_ff, kind, x);
}

void finish_qkv(const Queue &queue, const Partials &projections, const QkvTarget &t) {
    const dg_layer *layer = t.layer;
    QkvParams p = {projections,
                   layer->attn_q_norm,
                   layer->attn_k_norm,
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

void sum_partials(const Queue &queue, const Partials &p, float *out) {
    launch(sum_kernel, dim3((unsigned)p.n), dim3(kThreads), 0, queue.stream, p, out);
}

void add_normed(const Queue &queue, const Partials &p, const float *weight, float eps, float *x) {
    launch(add_normed_kernel, dim3((unsigned)p.n), dim3(kThreads), row_bytes(p.n_columns), queue.stream, p, weight, eps,
           x);
}

void add_then_norm(const Queue &queue, float *x, const float *d, int n, int n_embd, float eps) {
    launch(add_then_norm_kernel, dim3((unsigned)n), dim3(kThreads), row_bytes(n_embd), queue.stream, x, d, n_embd, eps);
}

void combine(const Queue &queue, const dg_layer *layer, float *x, const float *d, const float *e, int n, int n_embd,
             float eps, float scalar) {
    CombineParams p = {x, d, e, layer->post_mlp_norm, layer->post_moe_norm, layer->post_ffn_norm, n_embd, eps, scalar};
    launch(combine_kernel, dim3((unsigned)n), dim3(kThreads), row_bytes(n_embd), queue.stream, p);
}

void embed_rows(const Queue &queue, const dg_weight *embedding, const int32_t *ids, int n, float *x) {
    PackedShape shape = packed_shape(embedding->type, embedding->n_rows, embedding->n_cols);
    float gain = sqrtf((float)embedding->n_cols);
    with_format(embedding->type, [&](auto format) {
        launch(embed_kernel<decltype(format)>, dim3((unsigned)n), dim3(kThreads), 0, queue.stream,
               (const char *)embedding->data, embedding->scale, ids, (int)embedding->n_cols, (int)shape.k_tiles, gain,
               x);
    });
}
