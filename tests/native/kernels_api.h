/* The CPU backend's operations as plain functions of arrays; kernels_api.c explains them. */
#ifndef DG_KERNELS_API_H
#define DG_KERNELS_API_H

#include <stdint.h>

#include "settle_case.h"

#define EXPORT __attribute__((visibility("default")))

typedef struct test_moe_params {
    int32_t n_embd, n_ff, n_experts, n_used, type, down_type;
    const float *router, *router_scale, *norm, *expert_scale;
    const void *gate_up;   /* fused, or NULL */
    const void *gate, *up; /* apart */
    const void *down;
    const float *scales; /* (n_experts) multipliers of all of them */
} test_moe_params;

typedef struct test_attention_params {
    int32_t n_embd, n_heads, n_kv_heads, head_dim, n_rot, window; /* window 0: a full layer */
    int32_t complete_keys;                                        /* 0: keys are a function of values */
    int32_t type_k, type_v, n_threads;
    float rope_base;
    void *k[2], *v[2]; /* of two spans, (n_kv_heads, capacity, …) */
    int32_t capacity[2], span_position[2], span_n[2];
} test_attention_params;

typedef struct test_head_params {
    int32_t n_embd, n_vocab, type, canvas_length, n_threads;
    const void *table;
    const float *scale; /* (1) */
    const float *norm;
    float softcap, bound;
} test_head_params;

EXPORT const char *test_isa(void);
EXPORT int32_t test_operands(int32_t type);
EXPORT int test_mlp(int32_t n_embd, int32_t n_ff, int32_t gate_type, const void *gate, int32_t up_type, const void *up,
                    int32_t down_type, const void *down, const float *scales, const float *norm, const float *x,
                    int32_t n, int32_t n_threads, float *out);
EXPORT int test_moe(const test_moe_params *p, const float *x, int32_t n, int32_t n_threads, float *out);
EXPORT int test_attend(const test_attention_params *p, const float *q, int32_t n, int32_t position, int32_t causal,
                       float *out);
EXPORT int test_project_qkv(const test_attention_params *p, const float *wq, const float *wk, const float *wv,
                            const float *norm, const float *q_norm, const float *k_norm, const float *x, int32_t n,
                            int32_t position, float *q);
EXPORT int test_logits(const test_head_params *p, const float *x, int32_t n, float *logits);
EXPORT int test_soft_embedding(const test_head_params *p, const float *z, int32_t n, float *soft);
EXPORT int test_sample(const test_head_params *p, const float *x, int32_t n, float temperature, const float *uniforms,
                       int32_t *argmax, int32_t *candidates, float *entropies, float *soft);
EXPORT void test_settle(test_settle_case *t, int32_t *order);
EXPORT int test_embed(const test_head_params *p, const int32_t *ids, int32_t n, float *x);
EXPORT int test_dequantize(int32_t type, const void *src, float *dst, int64_t n_rows, int64_t n_cols);
EXPORT int64_t test_row_bytes(int32_t type, int64_t n_cols);
EXPORT int32_t test_block_size(int32_t type);

#endif
