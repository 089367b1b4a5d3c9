/* What the decoders of all types share: loading encoded rows with a row to a lane, and writing codes, scales and mins
 * to a panel. Included by decode.h, once for each instruction set. */

/* The encoded rows of one vector. */
typedef struct source {
    const uint8_t *p;
    int64_t stride;
    int32_t n; /* rows that there are; what the lanes beyond hold is never read */
} source;

/* vi_load_rows through a copy, for the last rows or columns of a matrix, beyond which nothing may be read. */
static __attribute__((noinline)) void load_edge(source s, int64_t offset, int64_t n_bytes, vi m[4]) {
    uint8_t copy[LANES * 16] = {0};
    for (int i = 0; i < s.n; i++) memcpy(copy + i * 16, s.p + offset + i * s.stride, (size_t)n_bytes);
    vi_load_rows(copy, 16, m);
}

/* Sixteen bytes of each row, of which n_bytes exist: word j of every row in m[j]. */
ALWAYS_INLINE void load_rows_part(source s, int64_t offset, int64_t n_bytes, vi m[4]) {
    if (s.n == LANES && n_bytes >= 16) {
        vi_load_rows(s.p + offset, s.stride, m);
        return;
    }
    load_edge(s, offset, n_bytes < 16 ? n_bytes : 16, m);
}
ALWAYS_INLINE void load_rows(source s, int64_t offset, vi m[4]) { load_rows_part(s, offset, 16, m); }

/* The first of the four words at `offset`. Loading all sixteen bytes takes fewer instructions than gathering words. */
ALWAYS_INLINE vi load_words(source s, int64_t offset) {
    vi m[4];
    load_rows(s, offset, m);
    return m[0];
}

ALWAYS_INLINE vf low_half(vi a) { return vf_from_low_halves(a); }
ALWAYS_INLINE vf high_half(vi a) { return vf_from_low_halves(vi_shift_right(a, 16)); }

/* The bits `mask` of each byte, after a shift to the right. */
ALWAYS_INLINE vi bits(vi a, const int shift, const int mask) {
    return vi_and(vi_shift_right(a, shift), vi_set(mask * 0x01010101));
}
/* Byte i as a number, −128 … 127 */
ALWAYS_INLINE vf signed_byte(vi a, const int i) {
    return vf_from_int(vi_shift_right_signed(vi_shift_left(a, 24 - 8 * i), 24));
}

/* Where a vector's part of a panel is written; each advances by the columns it is given. */
typedef struct target {
    uint8_t *codes;
    float *scales, *mins;
    vf multiplier;
} target;

ALWAYS_INLINE void put_codes(target *t, vi codes) { /* four columns */
    vi_store(t->codes, codes);
    t->codes += PANEL_LANES * 4;
}
/* Likewise, of a form with signed codes if there is such. */
ALWAYS_INLINE void put_signed_codes(target *t, vi codes) {
#if HAS_WIDE_CODES
    put_codes(t, vi_widen_even(codes));
    put_codes(t, vi_widen_odd(codes));
#else
    put_codes(t, codes);
#endif
}
ALWAYS_INLINE void put_scale(target *t, vf scale) {
    vf_store(t->scales, vf_mul(scale, t->multiplier));
    t->scales += PANEL_LANES;
}
ALWAYS_INLINE void put_min(target *t, vf min) {
    vf_store(t->mins, vf_mul(min, t->multiplier));
    t->mins += PANEL_LANES;
}
