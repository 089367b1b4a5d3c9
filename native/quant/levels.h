/* The values that codes stand for, in units of their group's scale, and the nearest of them to given numbers. */
#ifndef DG_QUANT_LEVELS_H
#define DG_QUANT_LEVELS_H

#include "quant/lanes.h"

typedef enum levels {
    LEVELS_3_BIT, /* −4 … 3 */
    LEVELS_4_BIT, /* −8 … 7 */
    LEVELS_5_BIT, /* −16 … 15 */
    LEVELS_6_BIT, /* −32 … 31 */
    LEVELS_8_BIT, /* −127 … 127 */
    LEVELS_IQ4,   /* dg_iq4_values */
    LEVELS_E2M1   /* dg_e2m1_doubled */
} levels;

/* Midpoints between neighbouring values, and how far apart the neighbours are. */
static const float iq4_midpoints[15] = {-115.5f, -93.5f, -74.0f, -57.0f, -42.0f, -28.5f, -16.0f, -4.5f,
                                        7.0f,    19.0f,  31.5f,  45.5f,  61.0f,  79.0f,  101.0f};
static const int32_t iq4_gaps[15] = {23, 21, 18, 16, 14, 13, 12, 11, 12, 12, 13, 15, 16, 20, 24};

LANES_INLINE floats clamped(floats x, float low, float high) { return smaller(larger(x, all(low)), all(high)); }

LANES_INLINE floats nearest_iq4(floats x) {
    ints value = (ints){0} - 127;
    for (int k = 0; k < 15; k++) value += (x > iq4_midpoints[k]) & iq4_gaps[k];
    return to_floats(value);
}

/* Codes count in the order of the values. */
LANES_INLINE ints code_iq4(floats x) {
    ints index = {0};
    for (int k = 0; k < 15; k++) index -= x > iq4_midpoints[k];
    return index;
}

/* Doubled E2M1 magnitudes: 0, 1, 2, 3, 4, 6, 8, 12. From 2 on they are the floats with one bit of mantissa. */
LANES_INLINE floats nearest_e2m1(floats x) {
    floats size = magnitude(x);
    floats one_bit = (floats)(((ints)size + (1 << 21)) & ~((1 << 22) - 1));
    size = smaller(choose(size < 2.0f, rounded(size), one_bit), all(12.0f));
    return (floats)((ints)size | ((ints)x & INT32_MIN));
}

LANES_INLINE ints code_e2m1(floats x) {
    floats size = magnitude(nearest_e2m1(x));
    ints index = choose_ints(size < 4.0f, to_ints(size), ((ints)size >> 22) - 254); /* 4, 6, 8, 12 → 4, 5, 6, 7 */
    return index | ((x < 0.0f) & (index > 0) & 8);
}

/* The level nearest to x. */
LANES_INLINE floats nearest(levels kind, floats x) {
    switch (kind) {
    case LEVELS_3_BIT:
        return clamped(rounded(x), -4, 3);
    case LEVELS_4_BIT:
        return clamped(rounded(x), -8, 7);
    case LEVELS_5_BIT:
        return clamped(rounded(x), -16, 15);
    case LEVELS_6_BIT:
        return clamped(rounded(x), -32, 31);
    case LEVELS_8_BIT:
        return clamped(rounded(x), -127, 127);
    case LEVELS_IQ4:
        return nearest_iq4(x);
    case LEVELS_E2M1:
        return nearest_e2m1(x);
    }
    return x;
}

/* The code of the level nearest to x. */
LANES_INLINE ints code_of(levels kind, floats x) {
    switch (kind) {
    case LEVELS_3_BIT:
        return to_ints(nearest(kind, x)) + 4;
    case LEVELS_4_BIT:
        return to_ints(nearest(kind, x)) + 8;
    case LEVELS_5_BIT:
        return to_ints(nearest(kind, x)) + 16;
    case LEVELS_6_BIT:
        return to_ints(nearest(kind, x)) + 32;
    case LEVELS_8_BIT:
        return to_ints(nearest(kind, x));
    case LEVELS_IQ4:
        return code_iq4(x);
    case LEVELS_E2M1:
        return code_e2m1(x);
    }
    return to_ints(x);
}

/* Codes of n contiguous elements of one group, n a multiple of 16. */
LANES_INLINE void store_codes(levels kind, const float *src, int n, float inverse_scale, uint8_t *codes) {
    for (int j = 0; j < n; j += N_LANES) store_bytes(codes + j, code_of(kind, load(src + j) * inverse_scale));
}

/* Likewise for x ≈ scale · q + offset, q in 0 … high. */
LANES_INLINE void store_affine_codes(float high, const float *src, int n, float inverse_scale, float offset,
                                     uint8_t *codes) {
    for (int j = 0; j < n; j += N_LANES)
        store_bytes(codes + j, to_ints(clamped(rounded((load(src + j) - offset) * inverse_scale), 0, high)));
}

#endif
