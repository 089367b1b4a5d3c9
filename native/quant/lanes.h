/* Several groups of elements side by side, one in each lane of a vector.
 *
 * Searching for a group's scale takes many sums over its elements. With one group a lane these are sums of whole
 * vectors in a fixed order: nothing is added across lanes, so that the number of lanes, which is that of the machine's
 * registers, changes no bit of the result. */
#ifndef DG_QUANT_LANES_H
#define DG_QUANT_LANES_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#define N_LANES 8
#else
#define N_LANES 4
#endif

typedef float floats __attribute__((vector_size(4 * N_LANES)));
typedef int32_t ints __attribute__((vector_size(4 * N_LANES)));

#define LANES_INLINE static inline __attribute__((always_inline))

LANES_INLINE floats all(float x) { return (floats){0} + x; }

/* `mask` is what a comparison gives: all bits set where it holds. */
LANES_INLINE floats choose(ints mask, floats yes, floats no) {
    return (floats)((mask & (ints)yes) | (~mask & (ints)no));
}

LANES_INLINE ints choose_ints(ints mask, ints yes, ints no) { return (mask & yes) | (~mask & no); }

LANES_INLINE floats larger(floats a, floats b) { return choose(a > b, a, b); }
LANES_INLINE floats smaller(floats a, floats b) { return choose(a < b, a, b); }
LANES_INLINE floats magnitude(floats x) { return (floats)((ints)x & 0x7fffffff); }

/* To the nearest integer, ties to even, for |x| < 2^22: the sum has no bits left below one. */
LANES_INLINE floats rounded(floats x) { return (x + 0x1.8p23f) - 0x1.8p23f; }

/* 1/x, or 0 where x is zero or so small that the quotient would overflow. */
LANES_INLINE floats inverse(floats x) {
    ints usable = magnitude(x) > 0x1p-120f;
    return (floats)(usable & (ints)(1.0f / choose(usable, x, all(1.0f))));
}

LANES_INLINE ints to_ints(floats x) { return __builtin_convertvector(x, ints); }
LANES_INLINE floats to_floats(ints x) { return __builtin_convertvector(x, floats); }

/* The binary16 nearest to x, as its bits; beyond the largest one that. See dg_f32_to_f16. */
LANES_INLINE ints f16_bits(floats x) {
    ints bits = (ints)x, size = bits & 0x7fffffff;
    ints normal = (size - (112 << 23) + 0xfff + (size >> 13 & 1)) >> 13;
    ints subnormal = (ints)((floats)size + 0.5f) - 0x3f000000;
    ints half = choose_ints(size < 0x38800000, subnormal, normal);
    half = choose_ints(half > 0x7bff, (ints){0} + 0x7bff, half);
    return half | (bits >> 16 & 0x8000);
}

LANES_INLINE floats f16_value(ints half) {
    floats size = (floats)((half & 0x7fff) << 13) * 0x1p112f;
    return (floats)((ints)size | (half & 0x8000) << 16);
}

LANES_INLINE floats round_to_f16(floats x) { return f16_value(f16_bits(x)); }

/* ---- Between memory and lanes -------------------------------------------------------------------------------- */

typedef float floats4 __attribute__((vector_size(16)));
typedef uint8_t bytes __attribute__((vector_size(N_LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * N_LANES)));

LANES_INLINE floats load(const float *src) {
    floats x;
    memcpy(&x, src, sizeof x);
    return x;
}

LANES_INLINE void store(float *dst, floats x) { memcpy(dst, &x, sizeof x); }

/* The lowest eight bits of each lane. */
LANES_INLINE void store_bytes(uint8_t *dst, ints x) {
    bytes narrow = __builtin_convertvector(x, bytes);
    memcpy(dst, &narrow, sizeof narrow);
}

/* x[j] lane g = src[n · g + j], for N_LANES groups of n elements; n is a multiple of 4. */
LANES_INLINE void load_groups(const float *src, int n, floats *x) {
    for (int g = 0; g < N_LANES; g += 4) {
        for (int j = 0; j < n; j += 4) {
            floats4 row[4]; /* a square of 4 × 4, transposed by interleaving twice */
            for (int i = 0; i < 4; i++) memcpy(&row[i], src + n * (g + i) + j, sizeof row[i]);
            floats4 a = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
            floats4 b = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
            floats4 c = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
            floats4 d = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
            row[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
            row[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
            row[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
            row[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
            for (int i = 0; i < 4; i++) memcpy((float *)&x[j + i] + g, &row[i], sizeof row[i]);
        }
    }
}

#endif
