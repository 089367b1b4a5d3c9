/* Vectors of 16 lanes: AVX-512 with VNNI and BF16. The functions are explained in simd_scalar.h. */
#ifndef DG_CPU_SIMD_AVX512_H
#define DG_CPU_SIMD_AVX512_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define VECTORS 2
#define TILE_ROWS 6   /* 12 sums of integers and 12 of floats; with 16 × 1 the loads of x would be the limit */
#define Q8_OFFSET 128 /* vpdpbusd multiplies unsigned by signed bytes */

typedef __m512 vf;
typedef __m512i vi;

/* The compiler must not assume that it knows the value. */
#define KEEP_IN_REGISTERS(v) __asm__ volatile("" : "+v"(v))

static inline vf vf_set(float x) { return _mm512_set1_ps(x); }
static inline vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void vf_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
static inline __mmask16 first_lanes(int n) { return (__mmask16)((1u << n) - 1); }
static inline vf vf_load_part(const float *p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
static inline void vf_store_part(float *p, vf a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a); }
static inline vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf vf_abs(vf a) { return _mm512_abs_ps(a); }
static inline vf vf_where_less(vf a, vf b, vf x, vf y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
static inline float vf_sum(vf a) { return _mm512_reduce_add_ps(a); }
static inline float vf_largest(vf a) { return _mm512_reduce_max_ps(a); }
static inline vf vf_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline vf vf_load_bf16(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
static inline void vf_store_f16(uint16_t *p, vf a) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

static inline vi vi_set(int32_t x) { return _mm512_set1_epi32(x); }
static inline vi vi_load(const void *p) { return _mm512_loadu_si512(p); }
static inline void vi_store(void *p, vi a) { _mm512_storeu_si512(p, a); }
static inline vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
static inline vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
static inline vi vi_xor(vi a, vi b) { return _mm512_xor_si512(a, b); }
static inline vi vi_multiply(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
static inline vi vi_shift_left(vi a, const int n) { return _mm512_slli_epi32(a, (unsigned)n); }
static inline vi vi_shift_right(vi a, const int n) { return _mm512_srli_epi32(a, (unsigned)n); }
static inline vi vi_shift_right_signed(vi a, const int n) { return _mm512_srai_epi32(a, (unsigned)n); }
static inline vi vi_look_up(const uint8_t table[16], vi a) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table)), a);
}

/* Rows i, i + 4, i + 8 and i + 12. */
static inline __m512i load_four_rows(const uint8_t *p, int64_t stride) {
    __m512i r = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)p));
    r = _mm512_inserti32x4(r, _mm_loadu_si128((const __m128i *)(p + 4 * stride)), 1);
    r = _mm512_inserti32x4(r, _mm_loadu_si128((const __m128i *)(p + 8 * stride)), 2);
    return _mm512_inserti32x4(r, _mm_loadu_si128((const __m128i *)(p + 12 * stride)), 3);
}
/* With four neighbouring rows in the same quarter of four registers, a 4 × 4 transpose of words within each quarter is
 * all there is to do. */
static inline void vi_load_rows(const uint8_t *p, int64_t stride, vi m[4]) {
    __m512i a = load_four_rows(p, stride), b = load_four_rows(p + stride, stride);
    __m512i c = load_four_rows(p + 2 * stride, stride), d = load_four_rows(p + 3 * stride, stride);
    __m512i ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
    __m512i cd_low = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);
    m[0] = _mm512_unpacklo_epi64(ab_low, cd_low);
    m[1] = _mm512_unpackhi_epi64(ab_low, cd_low);
    m[2] = _mm512_unpacklo_epi64(ab_high, cd_high);
    m[3] = _mm512_unpackhi_epi64(ab_high, cd_high);
}
static inline vf vf_from_bits(vi a) { return _mm512_castsi512_ps(a); }
static inline vf vf_from_low_halves(vi a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a)); }
static inline vf vf_from_int(vi a) { return _mm512_cvtepi32_ps(a); }
static inline vi vi_from_float(vf a) { return _mm512_cvtps_epi32(a); }
static inline vf vf_power_of_two(vi exponent) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(exponent, _mm512_set1_epi32(127)), 23));
}
static inline void vi_store_bytes(int8_t *p, vi a) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(a)); }

static inline vi vi_dot4(vi acc, vi w, const int8_t *x, const int w_signed) {
    int32_t four;
    (void)w_signed;
    memcpy(&four, x, sizeof four);
    return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(four));
}

#define HAS_SHORT_SUMS 0

#define HAS_WIDE_CODES 0
#define HAS_PAIRS 1
#define FUSED_DOT2 1
#define PAIR_KEYS 6 /* keys whose scores are summed side by side in registers */
#define PAIR_ROWS 8 /* query rows whose values are */
/* acc + Σ of two products of 16-bit integers per lane */
static inline vi vi_dot2(vi acc, vi a, vi b) { return _mm512_dpwssd_epi32(acc, a, b); }
/* The low halves, which hold all of each number. */
static inline void vi_store_halves(int16_t *p, vi a) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(a)); }

#endif
