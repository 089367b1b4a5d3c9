/* Vectors of 4 lanes: NEON, with dot products of bytes, products of pairs of rows and bfloat16 where the file is
 * compiled for them. The functions are explained in simd_scalar.h. */
#ifndef DG_CPU_SIMD_NEON_H
#define DG_CPU_SIMD_NEON_H

#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

#define LANES 4
#define VECTORS 2
#if defined(__ARM_FEATURE_DOTPROD)
#define TILE_ROWS 6
#else
#define TILE_ROWS 4 /* 32 registers: 16 sums of 16 bits, eight of floats, and what feeds them */
#endif
#define Q8_OFFSET 0

typedef float32x4_t vf;
typedef int32x4_t vi;

/* The compiler must not assume that it knows the value. */
#define KEEP_IN_REGISTERS(v) __asm__ volatile("" : "+w"(v))

static inline vf vf_set(float x) { return vdupq_n_f32(x); }
static inline vf vf_load(const float *p) { return vld1q_f32(p); }
static inline void vf_store(float *p, vf a) { vst1q_f32(p, a); }
static inline vf vf_load_part(const float *p, int n) {
    float copy[LANES] = {0};
    memcpy(copy, p, (size_t)n * sizeof *p);
    return vld1q_f32(copy);
}
static inline void vf_store_part(float *p, vf a, int n) {
    float copy[LANES];
    vst1q_f32(copy, a);
    memcpy(p, copy, (size_t)n * sizeof *p);
}
static inline vf vf_add(vf a, vf b) { return vaddq_f32(a, b); }
static inline vf vf_sub(vf a, vf b) { return vsubq_f32(a, b); }
static inline vf vf_mul(vf a, vf b) { return vmulq_f32(a, b); }
static inline vf vf_div(vf a, vf b) { return vdivq_f32(a, b); }
static inline vf vf_max(vf a, vf b) { return vmaxq_f32(a, b); }
static inline vf vf_min(vf a, vf b) { return vminq_f32(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
static inline vf vf_abs(vf a) { return vabsq_f32(a); }
static inline vf vf_where_less(vf a, vf b, vf x, vf y) { return vbslq_f32(vcltq_f32(a, b), x, y); }
static inline float vf_sum(vf a) { return vaddvq_f32(a); }
static inline float vf_largest(vf a) { return vmaxvq_f32(a); }
static inline vf vf_load_f16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static inline vf vf_load_bf16(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
static inline void vf_store_f16(uint16_t *p, vf a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }

static inline vi vi_set(int32_t x) { return vdupq_n_s32(x); }
static inline vi vi_load(const void *p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
static inline void vi_store(void *p, vi a) { vst1q_u8(p, vreinterpretq_u8_s32(a)); }
static inline vi vi_add(vi a, vi b) { return vaddq_s32(a, b); }
static inline vi vi_and(vi a, vi b) { return vandq_s32(a, b); }
static inline vi vi_or(vi a, vi b) { return vorrq_s32(a, b); }
static inline vi vi_xor(vi a, vi b) { return veorq_s32(a, b); }
static inline vi vi_multiply(vi a, vi b) { return vmulq_s32(a, b); }
static inline vi vi_shift_left(vi a, const int n) { return vshlq_s32(a, vdupq_n_s32(n)); }
static inline vi vi_shift_right(vi a, const int n) {
    return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a), vdupq_n_s32(-n)));
}
static inline vi vi_shift_right_signed(vi a, const int n) { return vshlq_s32(a, vdupq_n_s32(-n)); }
static inline vi vi_look_up(const uint8_t table[16], vi a) {
    return vreinterpretq_s32_u8(vqtbl1q_u8(vld1q_u8(table), vreinterpretq_u8_s32(a)));
}
static inline void vi_load_rows(const uint8_t *p, int64_t stride, vi m[4]) {
    vi a = vi_load(p), b = vi_load(p + stride), c = vi_load(p + 2 * stride), d = vi_load(p + 3 * stride);
    int64x2_t ab_even = vreinterpretq_s64_s32(vtrn1q_s32(a, b)), ab_odd = vreinterpretq_s64_s32(vtrn2q_s32(a, b));
    int64x2_t cd_even = vreinterpretq_s64_s32(vtrn1q_s32(c, d)), cd_odd = vreinterpretq_s64_s32(vtrn2q_s32(c, d));
    m[0] = vreinterpretq_s32_s64(vtrn1q_s64(ab_even, cd_even));
    m[1] = vreinterpretq_s32_s64(vtrn1q_s64(ab_odd, cd_odd));
    m[2] = vreinterpretq_s32_s64(vtrn2q_s64(ab_even, cd_even));
    m[3] = vreinterpretq_s32_s64(vtrn2q_s64(ab_odd, cd_odd));
}
static inline vf vf_from_bits(vi a) { return vreinterpretq_f32_s32(a); }
static inline vf vf_from_low_halves(vi a) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(vreinterpretq_u32_s32(a))));
}
static inline vf vf_from_int(vi a) { return vcvtq_f32_s32(a); }
static inline vi vi_from_float(vf a) { return vcvtnq_s32_f32(a); }
static inline vf vf_power_of_two(vi exponent) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(exponent, vdupq_n_s32(127)), 23));
}
static inline void vi_store_bytes(int8_t *p, vi a) {
    int8x8_t bytes = vmovn_s16(vcombine_s16(vmovn_s32(a), vdup_n_s16(0)));
    vst1_lane_s32((int32_t *)(void *)p, vreinterpret_s32_s8(bytes), 0);
}

static inline vi vi_dot4(vi acc, vi w, const int8_t *x, const int w_signed) {
    int32_t four;
    (void)w_signed; /* unsigned codes are below 128 */
    memcpy(&four, x, sizeof four);
    int8x16_t codes = vreinterpretq_s8_s32(w), all = vreinterpretq_s8_s32(vdupq_n_s32(four));
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(acc, codes, all);
#else
    int16x8_t low = vmull_s8(vget_low_s8(codes), vget_low_s8(all)), high = vmull_high_s8(codes, all);
    return vaddq_s32(acc, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
}

#if defined(__ARM_FEATURE_MATMUL_INT8)
/* For pairs.h, which explains them. */
#define HAS_ROW_PAIRS 1
static inline vi vi_dot8_pairs(vi acc, vi x, vi w) {
    return vmmlaq_s32(acc, vreinterpretq_s8_s32(x), vreinterpretq_s8_s32(w));
}
static inline vi vi_zip_low(vi a, vi b) { return vzip1q_s32(a, b); }
static inline vi vi_zip_high(vi a, vi b) { return vzip2q_s32(a, b); }
static inline vi vi_unzip_even(vi a, vi b) { return vuzp1q_s32(a, b); }
static inline vi vi_unzip_odd(vi a, vi b) { return vuzp2q_s32(a, b); }
static inline vi vi_two_and_two(const int32_t *p) { /* p0 p0 p1 p1 */
    int32x2_t two = vld1_s32(p);
    return vcombine_s32(vdup_lane_s32(two, 0), vdup_lane_s32(two, 1));
}
static inline vf vf_two_and_two(const float *p) {
    float32x2_t two = vld1_f32(p);
    return vcombine_f32(vdup_lane_f32(two, 0), vdup_lane_f32(two, 1));
}
static inline vf vf_two_twice(const float *p) { /* p0 p1 p0 p1 */
    float32x2_t two = vld1_f32(p);
    return vcombine_f32(two, two);
}
static inline vf vf_low_halves(vf a, vf b) { return vcombine_f32(vget_low_f32(a), vget_low_f32(b)); }
static inline vf vf_high_halves(vf a, vf b) { return vcombine_f32(vget_high_f32(a), vget_high_f32(b)); }
#endif

#if defined(__ARM_FEATURE_DOTPROD)
#define HAS_SHORT_SUMS 0
#else
/* For short_sums.h, which explains them: sums of each of four columns, of two rows in a register. */
#define HAS_SHORT_SUMS 1
_Static_assert(31 * 127 * 32 / 4 < 32768 && 63 * 127 * 16 / 4 < 32768,
               "codes of five bits, and of six in groups of 16");
typedef struct vs {
    int16x8_t low, high;
} vs;
static inline vs vs_begin(int32_t bias) {
    (void)bias;
    return (vs){vdupq_n_s16(0), vdupq_n_s16(0)};
}
static inline vs vs_add(vs sum, vi w, const int8_t *x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    int8x16_t codes = vreinterpretq_s8_s32(w), all = vreinterpretq_s8_s32(vdupq_n_s32(four));
    return (vs){vmlal_s8(sum.low, vget_low_s8(codes), vget_low_s8(all)), vmlal_high_s8(sum.high, codes, all)};
}
static inline vi vs_end(vs sum, int32_t bias) {
    return vaddq_s32(vpaddq_s32(vpaddlq_s16(sum.low), vpaddlq_s16(sum.high)), vdupq_n_s32(bias));
}
static inline int32_t vs_bias(const int8_t *x, int n, int32_t offset) {
    int32_t sum = 0;
    for (int c = 0; c < n; c++) sum += x[c];
    return -offset * sum;
}
#endif

#define HAS_WIDE_CODES 0
#define HAS_PAIRS 0

#endif
