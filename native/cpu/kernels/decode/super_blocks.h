/* Decoders of the types with super-blocks of 256 columns. Included by decode.h, once for each instruction set. */

/* Eight scales and minima of six bits, whose words stand in head[1 … 3]; d and dmin in head[0]. `offset`: of the codes.
 */
ALWAYS_INLINE void put_scales_and_mins(target *t, const vi head[4], const int offset) {
    vf d = low_half(head[0]), dmin = high_half(head[0]);
    vi scales[2] = {bits(head[1], 0, 63), vi_or(bits(head[3], 0, 15), vi_shift_left(bits(head[1], 6, 3), 4))};
    vi mins[2] = {bits(head[2], 0, 63), vi_or(bits(head[3], 4, 15), vi_shift_left(bits(head[2], 6, 3), 4))};
    UNROLL
    for (int i = 0; i < 8; i++) {
        const vf scale = vf_mul(d, signed_byte(scales[i / 4], i % 4));
        const vf min = vf_mul(dmin, signed_byte(mins[i / 4], i % 4));
        put_scale(t, scale);
        put_min(t, offset != 0 ? vf_fma(scale, vf_set((float)-offset), min) : min);
    }
}

ALWAYS_INLINE void decode_q4_k(source s, target *t) {
    vi head[4];
    load_rows(s, 0, head);
    put_scales_and_mins(t, head, 0);
    for (int k = 0; k < 4; k++) {
        vi a[4], b[4];
        load_rows(s, 16 + 32 * k, a);
        load_rows(s, 32 + 32 * k, b);
        for (int j = 0; j < 4; j++) put_codes(t, bits(a[j], 0, 15));
        for (int j = 0; j < 4; j++) put_codes(t, bits(b[j], 0, 15));
        for (int j = 0; j < 4; j++) put_codes(t, bits(a[j], 4, 15));
        for (int j = 0; j < 4; j++) put_codes(t, bits(b[j], 4, 15));
    }
}

ALWAYS_INLINE void decode_q5_k(source s, target *t) {
    vi head[4], high[8];
    load_rows(s, 0, head);
    put_scales_and_mins(t, head, FIVE_BITS_OFFSET);
    load_rows(s, 16, high);
    load_rows(s, 32, high + 4);
    UNROLL
    for (int k = 0; k < 4; k++) {
        vi low[8];
        load_rows(s, 48 + 32 * k, low);
        load_rows(s, 64 + 32 * k, low + 4);
        for (int j = 0; j < 8; j++) put_codes(t, vi_or(bits(low[j], 0, 15), vi_shift_left(bits(high[j], 2 * k, 1), 4)));
        for (int j = 0; j < 8; j++)
            put_codes(t, vi_or(bits(low[j], 4, 15), vi_shift_left(bits(high[j], 2 * k + 1, 1), 4)));
    }
}

ALWAYS_INLINE void decode_q6_k(source s, target *t) {
    vi scales[4];
    vi end[4];
    load_rows(s, 194, end);
    vf d = high_half(end[3]); /* the last two bytes */
    load_rows(s, 192, scales);
    UNROLL
    for (int i = 0; i < 16; i++) put_scale(t, vf_mul(d, signed_byte(scales[i / 4], i % 4)));
    for (int h = 0; h < 2; h++) {
        vi low[16], high[8];
        for (int i = 0; i < 4; i++) load_rows(s, 64 * h + 16 * i, low + 4 * i);
        for (int i = 0; i < 2; i++) load_rows(s, 128 + 32 * h + 16 * i, high + 4 * i);
        for (int j = 0; j < 8; j++) put_codes(t, vi_or(bits(low[j], 0, 15), vi_shift_left(bits(high[j], 0, 3), 4)));
        for (int j = 0; j < 8; j++) put_codes(t, vi_or(bits(low[8 + j], 0, 15), vi_shift_left(bits(high[j], 2, 3), 4)));
        for (int j = 0; j < 8; j++) put_codes(t, vi_or(bits(low[j], 4, 15), vi_shift_left(bits(high[j], 4, 3), 4)));
        for (int j = 0; j < 8; j++) put_codes(t, vi_or(bits(low[8 + j], 4, 15), vi_shift_left(bits(high[j], 6, 3), 4)));
    }
}

ALWAYS_INLINE void decode_q2_k(source s, target *t) {
    vi scales[4], end[4];
    load_rows(s, 68, end);
    vf d = low_half(end[3]), dmin = high_half(end[3]);
    load_rows(s, 0, scales);
    UNROLL
    for (int i = 0; i < 16; i++) {
        put_scale(t, vf_mul(d, signed_byte(bits(scales[i / 4], 0, 15), i % 4)));
        put_min(t, vf_mul(dmin, signed_byte(bits(scales[i / 4], 4, 15), i % 4)));
    }
    for (int h = 0; h < 2; h++) {
        vi m[8];
        load_rows(s, 16 + 32 * h, m);
        load_rows(s, 32 + 32 * h, m + 4);
        UNROLL
        for (int k = 0; k < 4; k++)
            for (int j = 0; j < 8; j++) put_codes(t, bits(m[j], 2 * k, 3));
    }
}

ALWAYS_INLINE void decode_q3_k(source s, target *t) {
    vi high[8], words[4]; /* words[0 … 2]: the scales; the last has d in its upper half */
    load_rows(s, 0, high);
    load_rows(s, 16, high + 4);
    load_rows(s, 94, words); /* so that the sixteen bytes end with the block: two of qs, then scales, then d */
    vf d = high_half(words[3]);
    vi packed[3];
    for (int i = 0; i < 3; i++) packed[i] = vi_or(vi_shift_right(words[i], 16), vi_shift_left(words[i + 1], 16));
    UNROLL
    for (int i = 0; i < 16; i++) {
        vi low = bits(packed[i / 4 % 2], 4 * (i / 8), 15), pair = bits(packed[2], 2 * (i / 4), 3);
        vf scale = signed_byte(vi_or(low, vi_shift_left(pair, 4)), i % 4);
        put_scale(t, vf_mul(d, vf_sub(scale, vf_set(32))));
    }
    for (int h = 0; h < 2; h++) {
        vi m[8];
        load_rows(s, 32 + 32 * h, m);
        load_rows(s, 48 + 32 * h, m + 4);
        UNROLL
        for (int k = 0; k < 4; k++)
            for (int j = 0; j < 8; j++)
                put_codes(t, vi_or(bits(m[j], 2 * k, 3),
                                   vi_shift_left(vi_and(vi_shift_right(high[j], 4 * h + k), vi_set(0x01010101)), 2)));
    }
}

ALWAYS_INLINE void decode_iq4_xs(source s, target *t) {
    vi head[4]; /* d and the high bits of the scales, their low bits */
    load_rows(s, 0, head);
    vf d = low_half(head[0]);
    vi high = vi_shift_right(head[0], 16), low = head[1];
    UNROLL
    for (int i = 0; i < 8; i++) {
        vi nibble = vi_and(vi_shift_right(low, 4 * i), vi_set(15));
        vi pair = vi_and(vi_shift_right(high, 2 * i), vi_set(3));
        vf scale = vf_from_int(vi_or(nibble, vi_shift_left(pair, 4)));
        put_scale(t, vf_mul(d, vf_sub(scale, vf_set(32))));
    }
    for (int i = 0; i < 8; i++) {
        vi m[4];
        load_rows(s, 8 + 16 * i, m);
        put_iq4(t, m);
    }
}
