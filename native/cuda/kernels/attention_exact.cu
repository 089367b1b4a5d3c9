/* Attention in float32, for caches of float32: slow, and as exact as the CPU. */
#include "cuda/kernels/attention_params.cuh"
#include "cuda/kernels/reduce.cuh"

namespace {

constexpr int kExactWarps = 4;

/* A warp for each query and head. */
__global__ void __launch_bounds__(32 * kExactWarps, 3) exact_kernel(AttentionParams p) {
    KernelOrder launch_order;
    const int lane = (int)threadIdx.x % 32, dim = p.head_dim, half = dim / 2, n_pairs = p.n_rot / 2;
    const int64_t item = (int64_t)blockIdx.x * kExactWarps + threadIdx.x / 32;
    if (item >= (int64_t)p.n * p.n_heads) return;
    const int kv_head = (int)(item % p.n_heads) / (p.n_heads / p.n_kv_heads);
    const int query_position = p.position + (int)(item / p.n_heads);
    const float *q = p.q + item * dim;
    float acc[kMaxHeadDim / 32], maximum = -INFINITY, denominator = 0;
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
            denominator = denominator * correction + weight;
            maximum = largest;
#pragma unroll
            for (int j = 0; j < kMaxHeadDim / 32; j++)
                if (lane + 32 * j < dim)
                    acc[j] = acc[j] * correction + weight * cache_value(p.type_v, span.v, row, dim, lane + 32 * j);
        }
#pragma unroll
    for (int j = 0; j < kMaxHeadDim / 32; j++)
        if (lane + 32 * j < dim) p.out[item * dim + lane + 32 * j] = acc[j] / denominator;
}

} // namespace

void attend_exactly(const Queue &queue, const AttentionParams &p) {
    launch(exact_kernel, dim3((unsigned)ceil_div((int64_t)p.n * p.n_heads, kExactWarps)), dim3(32 * kExactWarps), 0,
           queue.stream, p);
}
