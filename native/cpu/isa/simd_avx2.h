/* Vectors of 8 lanes: AVX2 with FMA and F16C, and AVX-VNNI where the file is compiled for it. The functions are
 * explained in simd_scalar.h. */
#ifndef DG_CPU_SIMD_AVX2_H
#define DG_CPU_SIMD_AVX2_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define LANES 8
#define VECTORS 2
#define TILE_ROWS 3 /* 16 registers: six sums of integers, six of floats, and what feeds them */
#if defined(__AVXVNNI__)
#define Q8_OFFSET 128 /* vpdpbusd multiplies unsigned by signed bytes */
#else
#define Q8_OFFSET 0
#endif

typedef __m256 vf;
typedef __m256i vi;

/* The compiler must not assume that it knows the value. */
#define KEEP_IN_REGISTERS(v) __asm__ volatile("" : "+x"(v))

static inline vf vf_set(float x) { return _mm256_set1_ps(x); }
static inline vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void vf_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
static inline __m256i first_lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline vf vf_load_part(const float *p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
static inline void vf_store_part(float *p, vf a, int n) { _mm256_maskstore_ps(p, first_lanes(n), a); }
static inline vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm256_div_ps(a, b); }
static inline vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline vf vf_min(vf a, vf b) { return _mm256_min_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline vf vf_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline vf vf_where_less(vf a, vf b, vf x, vf y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
static inline float vf_sum(vf a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline float vf_largest(vf a) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
static inline vf vf_load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
static inline vf vf_load_bf16(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline void vf_store_f16(uint16_t *p, vf a) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

static inline vi vi_set(int32_t x) { return _mm256_set1_epi32(x); }
static inline vi vi_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
static inline void vi_store(void *p, vi a) { _mm256_storeu_si256((__m256i *)p, a); }
static inline vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
static inline vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
static inline vi vi_or(vi a, vi b) { return _mm256_or_si256(a, b); }
static inline vi vi_xor(vi a, vi b) { return _mm256_xor_si256(a, b); }
static inline vi vi_multiply(vi a, vi b) { return _mm256_mullo_epi32(a, b); }
static inline vi vi_shift_left(vi a, const int n) { return _mm256_slli_epi32(a, n); }
static inline vi vi_shift_right(vi a, const int n) { return _mm256_srli_epi32(a, n); }
static inline vi vi_shift_right_signed(vi a, const int n) { return _mm256_srai_epi32(a, n); }
static inline vi vi_look_up(const uint8_t table[16], vi a) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table)), a);
}

static inline __m256i load_two_rows(const uint8_t *p, int64_t stride) { /* rows i and i + 4 */
    return _mm256_set_m128i(_mm_loadu_si128((const __m128i *)(p + 4 * stride)), _mm_loadu_si128((const __m128i *)p));
}
/* With four neighbouring rows in the same half of four registers, a 4 × 4 transpose of words within each half is all
 * there is to do. */
static inline void vi_load_rows(const uint8_t *p, int64_t stride, vi m[4]) {
    __m256i a = load_two_rows(p, stride), b = load_two_rows(p + stride, stride);
    __m256i c = load_two_rows(p + 2 * stride, stride), d = load_two_rows(p + 3 * stride, stride);
    __m256i ab_low = _mm256_unpacklo_epi32(a, b), ab_high = _mm256_unpackhi_epi32(a, b);
    __m256i cd_low = _mm256_unpacklo_epi32(c, d), cd_high = _mm256_unpackhi_epi32(c, d);
    m[0] = _mm256_unpacklo_epi64(ab_low, cd_low);
    m[1] = _mm256_unpackhi_epi64(ab_low, cd_low);
    m[2] = _mm256_unpacklo_epi64(ab_high, cd_high);
    m[3] = _mm256_unpackhi_epi64(ab_high, cd_high);
}
static inline vf vf_from_bits(vi a) { return _mm256_castsi256_ps(a); }
static inline vf vf_from_low_halves(vi a) {
    __m256i masked = _mm256_and_si256(a, _mm256_set1_epi32(0xffff));
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(masked, masked), 0x08);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
}
static inline vf vf_from_int(vi a) { return _mm256_cvtepi32_ps(a); }
static inline vi vi_from_float(vf a) { return _mm256_cvtps_epi32(a); }
static inline vf vf_power_of_two(vi exponent) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
}
static inline void vi_store_bytes(int8_t *p, vi a) {
    const __m256i low_bytes = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, /**/
                                               0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    __m256i bytes = _mm256_shuffle_epi8(a, low_bytes);
    __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    _mm_storel_epi64((__m128i *)p, both);
}

static inline vi vi_dot4(vi acc, vi w, const int8_t *x, const int w_signed) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    __m256i all = _mm256_set1_epi32(four);
#if defined(__AVXVNNI__)
    (void)w_signed;
    return _mm256_dpbusd_avx_epi32(acc, w, all);
#else
    /* vpmaddubsw takes unsigned by signed bytes too, and its 16-bit sums of two hold ±127·127·2 but not 255·127·2: a
     * signed weight hands its sign to x. */
    __m256i pairs =
        w_signed ? _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(all, w)) : _mm256_maddubs_epi16(w, all);
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    KEEP_IN_REGISTERS(acc); /* as in vs_add */
    return acc;
#endif
}

#if defined(__AVXVNNI__)
#define HAS_SHORT_SUMS 0
#else
/* For short_sums.h, which explains them. A word of 32 bits holds two sums: of columns 0 and 1 of each four, and of 2
 * and 3. They start at the bias, so that in the end each has at most 15 bits and a sign; before, they may wrap around.
 */
#define HAS_SHORT_SUMS 1
_Static_assert(16 * 127 * 32 / 2 < 32768 && 32 * 127 * 16 / 2 < 32768,
               "|code − offset| at most 16, and at most 32 in groups of 16");
typedef __m256i vs;
static inline vs vs_begin(int32_t bias) { return _mm256_set1_epi32(bias); }
static inline vs vs_add(vs sum, vi w, const int8_t *x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, _mm256_set1_epi32(four)));
    KEEP_IN_REGISTERS(sum); /* gcc would add products up in pairs, and run out of registers for them */
    return sum;
}
static inline vi vs_end(vs sum, int32_t bias) {
    (void)bias;
    return _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
}
static inline int32_t vs_bias(const int8_t *x, int n, int32_t offset) {
    int32_t sums[2] = {0, 0};
    for (int c = 0; c < n; c++) sums[c / 2 % 2] -= offset * x[c];
    return (int32_t)((uint32_t)sums[0] & 0xffff) | (int32_t)((uint32_t)sums[1] << 16);
}
#endif

#define HAS_PAIRS 1
#define PAIR_KEYS 4
#define PAIR_ROWS 4
#if defined(__AVXVNNI__)
#define FUSED_DOT2 1
#define HAS_WIDE_CODES 0
static inline vi vi_dot2(vi acc, vi a, vi b) { return _mm256_dpwssd_avx_epi32(acc, a, b); }
#else
#define FUSED_DOT2 0
#define HAS_WIDE_CODES 1
static inline vi vi_product2(vi a, vi b) { return _mm256_madd_epi16(a, b); }
/* For wide_codes.h, which explains them. */
static inline vi vi_widen_even(vi bytes) { return _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8); }
static inline vi vi_widen_odd(vi bytes) { return _mm256_srai_epi16(bytes, 8); }
static inline void vi_store_wide(int16_t *p, vi a) {
    a = _mm256_shuffle_epi32(a, 0xd8); /* 0, 2, 1, 3 */
    __m256i halves = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, a), 0x08);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(halves));
}
#endif
static inline void vi_store_halves(int16_t *p, vi a) {
    __m256i halves = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, a), 0x08);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(halves));
}

#endif
