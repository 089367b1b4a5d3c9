/* Decoders of the types with blocks of 32 columns, and of NVFP4. Included by decode.h, once for each instruction set.
 */

ALWAYS_INLINE void put_nibbles(target *t, const vi m[4]) {
    for (int j = 0; j < 4; j++) put_codes(t, bits(m[j], 0, 15));
    for (int j = 0; j < 4; j++) put_codes(t, bits(m[j], 4, 15));
}

/* Bits 4j … 4j + 3 of `high` become bit 4 of four bytes: the multiplication copies the four bits to seven places apart,
 * so that each lands at the foot of a byte. */
ALWAYS_INLINE vi fifth_bits(vi high, const int j) {
    vi four = vi_and(vi_shift_right(high, 4 * j), vi_set(15));
    return vi_shift_left(vi_and(vi_multiply(four, vi_set(0x00204081)), vi_set(0x01010101)), 4);
}

ALWAYS_INLINE void put_five_bits(target *t, const vi m[4], vi high) {
    put_codes(t, vi_or(bits(m[0], 0, 15), fifth_bits(high, 0)));
    put_codes(t, vi_or(bits(m[1], 0, 15), fifth_bits(high, 1)));
    put_codes(t, vi_or(bits(m[2], 0, 15), fifth_bits(high, 2)));
    put_codes(t, vi_or(bits(m[3], 0, 15), fifth_bits(high, 3)));
    put_codes(t, vi_or(bits(m[0], 4, 15), fifth_bits(high, 4)));
    put_codes(t, vi_or(bits(m[1], 4, 15), fifth_bits(high, 5)));
    put_codes(t, vi_or(bits(m[2], 4, 15), fifth_bits(high, 6)));
    put_codes(t, vi_or(bits(m[3], 4, 15), fifth_bits(high, 7)));
}

ALWAYS_INLINE void decode_q4_0(source s, target *t) {
    vi m[4];
    load_rows(s, 2, m);
    put_nibbles(t, m);
    put_scale(t, low_half(load_words(s, 0)));
}

ALWAYS_INLINE void decode_q4_1(source s, target *t) {
    vi m[4], head = load_words(s, 0);
    load_rows(s, 4, m);
    put_nibbles(t, m);
    put_scale(t, low_half(head));
    put_min(t, vf_sub(vf_set(0), high_half(head)));
}

ALWAYS_INLINE void decode_q5_0(source s, target *t) {
    vi m[4], head[4]; /* d, then the high bits */
    load_rows(s, 0, head);
    load_rows(s, 6, m);
    put_five_bits(t, m, vi_or(vi_shift_right(head[0], 16), vi_shift_left(head[1], 16)));
    put_scale(t, low_half(head[0]));
}

ALWAYS_INLINE void decode_q5_1(source s, target *t) {
    vi m[4], head[4]; /* d and m, then the high bits */
    load_rows(s, 0, head);
    load_rows(s, 8, m);
    put_five_bits(t, m, head[1]);
    const vf scale = low_half(head[0]);
    put_scale(t, scale);
    put_min(t, vf_sub(vf_mul(scale, vf_set(-FIVE_BITS_OFFSET)), high_half(head[0])));
}

ALWAYS_INLINE void decode_q8_0(source s, target *t) {
    const vi flip =
        vi_set(Q8_OFFSET != 0 ? (int32_t)0x80808080 : 0); /* to add 128 to a byte is to turn its top bit over */
    for (int h = 0; h < 2; h++) {
        vi m[4];
        load_rows(s, 2 + 16 * h, m);
        for (int j = 0; j < 4; j++) put_signed_codes(t, vi_xor(m[j], flip));
    }
    put_scale(t, low_half(load_words(s, 0)));
}

#define IQ4(q) ((uint8_t)(q + Q8_OFFSET))
static const uint8_t iq4_codes[16] = {IQ4(-127), IQ4(-104), IQ4(-83), IQ4(-65), IQ4(-49), IQ4(-35), IQ4(-22), IQ4(-10),
                                      IQ4(1),    IQ4(13),   IQ4(25),  IQ4(38),  IQ4(53),  IQ4(69),  IQ4(89),  IQ4(113)};
#undef IQ4

ALWAYS_INLINE void put_iq4(target *t, const vi m[4]) {
    for (int j = 0; j < 4; j++) put_signed_codes(t, vi_look_up(iq4_codes, bits(m[j], 0, 15)));
    for (int j = 0; j < 4; j++) put_signed_codes(t, vi_look_up(iq4_codes, bits(m[j], 4, 15)));
}

ALWAYS_INLINE void decode_iq4_nl(source s, target *t) {
    vi m[4];
    load_rows(s, 2, m);
    put_iq4(t, m);
    put_scale(t, low_half(load_words(s, 0)));
}

/* ---- NVFP4 --------------------------------------------------------------------------------------------------- */

/* Half of an E4M3 number (the table of codes is doubled): moved into binary16's fields it is too small by 2^8. Going by
 * way of float32's fields instead would meet its subnormal numbers, which are slow. The code of NaN stands for zero. */
ALWAYS_INLINE vf half_e4m3(vi scales, const int i) {
    vi code = vi_and(vi_shift_right(scales, 8 * i), vi_set(127));
    vf value = vf_mul(vf_from_low_halves(vi_shift_left(code, 7)), vf_set(0x1p7f));
    return vf_where_less(vf_from_int(code), vf_set(127), value, vf_set(0));
}

ALWAYS_INLINE void decode_nvfp4(source s, target *t) {
    static const uint8_t raised[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0}; /* E2M1 · 2 + 12 */
    vi scales = load_words(s, 0);
    for (int h = 0; h < 2; h++) {
        vi m[4];
        load_rows(s, 4 + 16 * h, m);
        for (int j = 0; j < 4; j += 2) {
            put_codes(t, vi_look_up(raised, bits(m[j], 0, 15)));
            put_codes(t, vi_look_up(raised, bits(m[j + 1], 0, 15)));
            put_codes(t, vi_look_up(raised, bits(m[j], 4, 15)));
            put_codes(t, vi_look_up(raised, bits(m[j + 1], 4, 15)));
        }
    }
    put_scale(t, half_e4m3(scales, 0));
    put_scale(t, half_e4m3(scales, 1));
    put_scale(t, half_e4m3(scales, 2));
    put_scale(t, half_e4m3(scales, 3));
}
