/* Vectors of 8 lanes in plain C: the reference for the other simd_*.h, and the fallback for machines without any.
 *
 * What every simd_*.h offers: LANES, the types vf (float) and vi (int32) of LANES elements, and the functions below.
 * vf_fma rounds once where the machine has such an instruction and twice here. */
#ifndef DG_CPU_SIMD_SCALAR_H
#define DG_CPU_SIMD_SCALAR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "quant/float.h"

#define LANES 8
#define VECTORS 1   /* vectors side by side in a panel */
#define TILE_ROWS 2 /* activation rows that one pass over a weight panel serves */
#define UNROLL      /* these are loops already: unrolling them again only takes the compiler long */
#define Q8_OFFSET 0 /* what is added to signed weights so that the dot product takes them */

typedef struct vf {
    float lane[LANES];
} vf;
typedef struct vi {
    int32_t lane[LANES];
} vi;

#define EACH_LANE for (int lane_ = 0; lane_ < LANES; lane_++)
#define OF(v) (v).lane[lane_]

/* The compiler must not assume that it knows the value. */
#define KEEP_IN_REGISTERS(v) __asm__ volatile("" : "+m"(v))

static inline vf vf_set(float x) {
    vf r;
    EACH_LANE OF(r) = x;
    return r;
}
static inline vf vf_load(const float *p) {
    vf r;
    memcpy(&r, p, sizeof r);
    return r;
}
static inline void vf_store(float *p, vf a) { memcpy(p, &a, sizeof a); }
/* The first n lanes; the others are zero, and nothing beyond them is touched. */
static inline vf vf_load_part(const float *p, int n) {
    vf r = {{0}};
    memcpy(&r, p, (size_t)n * sizeof *p);
    return r;
}
static inline void vf_store_part(float *p, vf a, int n) { memcpy(p, &a, (size_t)n * sizeof *p); }

#define DEFINE_BINARY(name, expression)                                                                                \
    static inline vf name(vf a, vf b) {                                                                                \
        vf r;                                                                                                          \
        EACH_LANE {                                                                                                    \
            float x = OF(a), y = OF(b);                                                                                \
            OF(r) = expression;                                                                                        \
        }                                                                                                              \
        return r;                                                                                                      \
    }
DEFINE_BINARY(vf_add, x + y)
DEFINE_BINARY(vf_sub, x - y)
DEFINE_BINARY(vf_mul, x *y)
DEFINE_BINARY(vf_div, x / y)
DEFINE_BINARY(vf_max, x > y ? x : y)
DEFINE_BINARY(vf_min, x < y ? x : y)
#undef DEFINE_BINARY

static inline vf vf_fma(vf a, vf b, vf c) { /* a·b + c */
    vf r;
    EACH_LANE OF(r) = OF(a) * OF(b) + OF(c);
    return r;
}
static inline vf vf_abs(vf a) {
    vf r;
    EACH_LANE OF(r) = fabsf(OF(a));
    return r;
}
/* Per lane: a < b ? x : y */
static inline vf vf_where_less(vf a, vf b, vf x, vf y) {
    vf r;
    EACH_LANE OF(r) = OF(a) < OF(b) ? OF(x) : OF(y);
    return r;
}
static inline float vf_sum(vf a) {
    float s = 0;
    EACH_LANE s += OF(a);
    return s;
}
static inline float vf_largest(vf a) {
    float m = a.lane[0];
    EACH_LANE m = OF(a) > m ? OF(a) : m;
    return m;
}
static inline vf vf_load_f16(const uint16_t *p) {
    vf r;
    EACH_LANE OF(r) = dg_f16_to_f32(p[lane_]);
    return r;
}
static inline vf vf_load_bf16(const uint16_t *p) {
    vf r;
    EACH_LANE OF(r) = dg_bf16_to_f32(p[lane_]);
    return r;
}
static inline void vf_store_f16(uint16_t *p, vf a) { EACH_LANE p[lane_] = dg_f32_to_f16(OF(a)); }

static inline vi vi_set(int32_t x) {
    vi r;
    EACH_LANE OF(r) = x;
    return r;
}
static inline vi vi_load(const void *p) {
    vi r;
    memcpy(&r, p, sizeof r);
    return r;
}
static inline void vi_store(void *p, vi a) { memcpy(p, &a, sizeof a); }
#define DEFINE_BINARY(name, expression)                                                                                \
    static inline vi name(vi a, vi b) {                                                                                \
        vi r;                                                                                                          \
        EACH_LANE {                                                                                                    \
            uint32_t x = (uint32_t)OF(a), y = (uint32_t)OF(b);                                                         \
            OF(r) = (int32_t)(expression);                                                                             \
        }                                                                                                              \
        return r;                                                                                                      \
    }
DEFINE_BINARY(vi_and, x &y)
DEFINE_BINARY(vi_or, x | y)
DEFINE_BINARY(vi_xor, x ^ y)
DEFINE_BINARY(vi_multiply, x *y)
#undef DEFINE_BINARY

static inline vi vi_shift_left(vi a, const int n) {
    vi r;
    EACH_LANE OF(r) = (int32_t)((uint32_t)OF(a) << n);
    return r;
}
static inline vi vi_shift_right(vi a, const int n) { /* zeros come in */
    vi r;
    EACH_LANE OF(r) = (int32_t)((uint32_t)OF(a) >> n);
    return r;
}
static inline vi vi_shift_right_signed(vi a, const int n) {
    vi r;
    EACH_LANE OF(r) = OF(a) >> n;
    return r;
}
/* Each byte, 0 … 15, replaced by that entry of `table`. */
static inline vi vi_look_up(const uint8_t table[16], vi a) {
    vi r;
    EACH_LANE {
        uint8_t b[4];
        memcpy(b, &OF(a), sizeof b);
        for (int i = 0; i < 4; i++) b[i] = table[b[i] & 15];
        memcpy(&OF(r), b, sizeof b);
    }
    return r;
}
/* Sixteen bytes at each of p, p + stride, …: 32-bit word j of each in m[j]. */
static inline void vi_load_rows(const uint8_t *p, int64_t stride, vi m[4]) {
    for (int j = 0; j < 4; j++) EACH_LANE memcpy(&OF(m[j]), p + 4 * j + lane_ * stride, sizeof OF(m[j]));
}
static inline vf vf_from_bits(vi a) {
    vf r;
    memcpy(&r, &a, sizeof r);
    return r;
}
/* The binary16 number in the lower half of each lane. */
static inline vf vf_from_low_halves(vi a) {
    vf r;
    EACH_LANE OF(r) = dg_f16_to_f32((uint16_t)OF(a));
    return r;
}
static inline vf vf_from_int(vi a) {
    vf r;
    EACH_LANE OF(r) = (float)OF(a);
    return r;
}
static inline vi vi_from_float(vf a) { /* to nearest, ties to even */
    vi r;
    EACH_LANE OF(r) = (int32_t)lrintf(OF(a));
    return r;
}
static inline vf vf_power_of_two(vi exponent) { /* 2^exponent, −126 … 127 */
    vf r;
    EACH_LANE OF(r) = dg_float_from_bits((uint32_t)(OF(exponent) + 127) << 23);
    return r;
}
/* The low byte of each lane. */
static inline void vi_store_bytes(int8_t *p, vi a) { EACH_LANE p[lane_] = (int8_t)OF(a); }

/* acc + Σ of four products of bytes per lane; `x` holds four signed bytes, the same for all lanes. The bytes of w are
 * signed with w_signed, and otherwise at most 127. */
static inline vi vi_dot4(vi acc, vi w, const int8_t *x, const int w_signed) {
    (void)w_signed;
    EACH_LANE {
        int8_t b[4];
        memcpy(b, &OF(w), sizeof b);
        OF(acc) += b[0] * x[0] + b[1] * x[1] + b[2] * x[2] + b[3] * x[3];
    }
    return acc;
}

#undef EACH_LANE
#undef OF

/* Products in sums of 16 bits, and dot products of 16-bit integers: simd_avx2.h has them. */
#define HAS_SHORT_SUMS 0
#define HAS_WIDE_CODES 0
#define HAS_PAIRS 0

#endif
