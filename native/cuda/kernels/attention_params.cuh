/* What the kernels of attention share. */
#ifndef DG_CUDA_ATTENTION_PARAMS_CUH
#define DG_CUDA_ATTENTION_PARAMS_CUH

#include "cuda/device.cuh"

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
    bool direct; /* cached rows can be copied as they are */
    const float *q;
    float *out;
    int n_splits;
    float *partial;     /* (n_splits, n · n_heads, head_dim), not yet divided by the denominator */
    float *partial_max; /* (n_splits, n · n_heads, 2) maximum of the scores · log2 e, and denominator */
};

static __device__ __forceinline__ float cache_value(int type, const void *rows, int64_t row, int dim, int d) {
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

static __device__ __forceinline__ bool is_visible(const AttentionParams &p, int query_position, int key_position) {
    if (!p.causal) return true;
    return key_position <= query_position && (p.window == 0 || query_position - key_position < p.window);
}

/* attention_exact.cu: in float32, for caches of float32 and for heads that have no tiles. */
void attend_exactly(const Queue &queue, const AttentionParams &p);

#endif
