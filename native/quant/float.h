/* Conversions between float32 and the narrow floating-point formats, exact and the same on every machine.
 * Encoding rounds to nearest, ties to even. */
#ifndef DG_QUANT_FLOAT_H
#define DG_QUANT_FLOAT_H

#include <stdint.h>
#include <string.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

static inline uint32_t dg_float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float dg_float_from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* ---- binary16: SEEE EEMM MMMM MMMM, bias 15 ------------------------------------------------------------------ */

#define DG_F16_MAX 65504.0f

static inline float dg_f16_to_f32(uint16_t half) {
#if defined(__F16C__)
    return _cvtsh_ss(half);
#else
    /* The magnitude moved into float32's fields is too small by 2^112, the difference of the biases; the product is
     * exact, and normalises subnormals on the way. Infinity and NaN get the all-ones exponent back afterwards. */
    uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
    uint32_t bits = dg_float_bits(dg_float_from_bits(magnitude) * 0x1p112f);
    if (magnitude >= 0x7c00u << 13) bits |= 0x7f800000u;
    return dg_float_from_bits(bits | (uint32_t)(half & 0x8000) << 16);
#endif
}

/* Beyond 65519.99 the result is infinity; a NaN stays one. */
static inline uint16_t dg_f32_to_f16(float x) {
#if defined(__F16C__)
    return (uint16_t)_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
    uint32_t bits = dg_float_bits(x);
    uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude >= 0x7f800000) {
        half = magnitude > 0x7f800000 ? 0x7e00 | (magnitude >> 13 & 0x3ff) : 0x7c00;
    } else if (magnitude >= 0x477ff000) {
        half = 0x7c00;
    } else if (magnitude < 0x38800000) {
        /* Below 2^-14: adding 0.5 leaves the value in units of 2^-24, rounded, in the lowest bits of the sum. */
        half = dg_float_bits(dg_float_from_bits(magnitude) + 0.5f) - 0x3f000000;
    } else {
        uint32_t odd = magnitude >> 13 & 1;
        half = (magnitude - (112u << 23) + 0xfff + odd) >> 13;
    }
    return (uint16_t)(sign | half);
#endif
}

/* ---- bfloat16: the upper half of a float32 ------------------------------------------------------------------- */

static inline float dg_bf16_to_f32(uint16_t half) { return dg_float_from_bits((uint32_t)half << 16); }

static inline uint16_t dg_f32_to_bf16(float x) {
    uint32_t bits = dg_float_bits(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64); /* a quiet NaN */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* ---- unsigned E4M3: -EEE EMMM, bias 7, no infinity, 0x7f is NaN ---------------------------------------------- */

#define DG_E4M3_MAX 448.0f
#define DG_E4M3_MAX_CODE 0x7e

/* The sign bit is ignored. NaN, 0x7f and 0xff, reads as zero, as in all kernels. */
static inline float dg_e4m3_to_f32(uint8_t code) {
    uint32_t magnitude = code & 0x7f;
    if (magnitude == 0x7f) return 0.0f;
    /* As for binary16: shifted into float32's fields the value is too small by 2^(127 − 7). */
    return dg_float_from_bits(magnitude << 20) * 0x1p120f;
}

#endif
