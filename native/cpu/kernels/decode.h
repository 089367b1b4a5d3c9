/* Weights to panels. Included by body.h, once for each instruction set.
 *
 * All LANES rows of a vector are decoded at once: sixteen bytes of each are read and transposed, so that word j of
 * every row stands in one vector, and everything after that is the same arithmetic in all lanes. */

static dg_form form_of(int32_t type) {
    const dg_form q8 = {.integer = true, .is_signed = Q8_OFFSET == 0, .group = 32, .offset = Q8_OFFSET};
    switch (type) {
    case DG_TYPE_Q4_0:
        return (dg_form){.integer = true, .group = 32, .offset = 8};
    case DG_TYPE_Q5_0:
        return (dg_form){.integer = true, .group = 32, .offset = 16};
    case DG_TYPE_Q4_1:
    case DG_TYPE_Q5_1:
    case DG_TYPE_Q4_K:
    case DG_TYPE_Q5_K:
        return (dg_form){.integer = true, .has_mins = true, .group = 32};
    case DG_TYPE_Q8_0:
    case DG_TYPE_IQ4_NL:
    case DG_TYPE_IQ4_XS:
        return q8;
    case DG_TYPE_NVFP4:
        return (dg_form){.integer = true, .group = 16, .offset = 12};
    case DG_TYPE_Q2_K:
        return (dg_form){.integer = true, .has_mins = true, .group = 16};
    case DG_TYPE_Q3_K:
        return (dg_form){.integer = true, .group = 16, .offset = 4};
    case DG_TYPE_Q6_K:
        return (dg_form){.integer = true, .group = 16, .offset = 32};
    default:
        return (dg_form){.integer = false};
    }
}

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
ALWAYS_INLINE void put_scale(target *t, vf scale) {
    vf_store(t->scales, vf_mul(scale, t->multiplier));
    t->scales += PANEL_LANES;
}
ALWAYS_INLINE void put_min(target *t, vf min) {
    vf_store(t->mins, vf_mul(min, t->multiplier));
    t->mins += PANEL_LANES;
}

/* ---- Blocks of 32 -------------------------------------------------------------------------------------------- */

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
    put_scale(t, low_half(head[0]));
    put_min(t, vf_sub(vf_set(0), high_half(head[0])));
}

ALWAYS_INLINE void decode_q8_0(source s, target *t) {
    const vi flip =
        vi_set(Q8_OFFSET != 0 ? (int32_t)0x80808080 : 0); /* to add 128 to a byte is to turn its top bit over */
    for (int h = 0; h < 2; h++) {
        vi m[4];
        load_rows(s, 2 + 16 * h, m);
        for (int j = 0; j < 4; j++) put_codes(t, vi_xor(m[j], flip));
    }
    put_scale(t, low_half(load_words(s, 0)));
}

#define IQ4(q) ((uint8_t)(q + Q8_OFFSET))
static const uint8_t iq4_codes[16] = {IQ4(-127), IQ4(-104), IQ4(-83), IQ4(-65), IQ4(-49), IQ4(-35), IQ4(-22), IQ4(-10),
                                      IQ4(1),    IQ4(13),   IQ4(25),  IQ4(38),  IQ4(53),  IQ4(69),  IQ4(89),  IQ4(113)};
#undef IQ4

ALWAYS_INLINE void put_iq4(target *t, const vi m[4]) {
    for (int j = 0; j < 4; j++) put_codes(t, vi_look_up(iq4_codes, bits(m[j], 0, 15)));
    for (int j = 0; j < 4; j++) put_codes(t, vi_look_up(iq4_codes, bits(m[j], 4, 15)));
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

/* ---- Super-blocks of 256 ------------------------------------------------------------------------------------- */

/* Eight scales and minima of six bits, whose words stand in head[1 … 3]; d and dmin in head[0]. */
ALWAYS_INLINE void put_scales_and_mins(target *t, const vi head[4]) {
    vf d = low_half(head[0]), dmin = high_half(head[0]);
    vi scales[2] = {bits(head[1], 0, 63), vi_or(bits(head[3], 0, 15), vi_shift_left(bits(head[1], 6, 3), 4))};
    vi mins[2] = {bits(head[2], 0, 63), vi_or(bits(head[3], 4, 15), vi_shift_left(bits(head[2], 6, 3), 4))};
    UNROLL
    for (int i = 0; i < 8; i++) {
        put_scale(t, vf_mul(d, signed_byte(scales[i / 4], i % 4)));
        put_min(t, vf_mul(dmin, signed_byte(mins[i / 4], i % 4)));
    }
}

ALWAYS_INLINE void decode_q4_k(source s, target *t) {
    vi head[4];
    load_rows(s, 0, head);
    put_scales_and_mins(t, head);
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
    put_scales_and_mins(t, head);
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

/* ---- Any type ------------------------------------------------------------------------------------------------ */

#define FOR_EACH_BLOCK(decode_block, block_size, block_bytes)                                                          \
    for (int64_t c = 0; c < n_cols; c += (block_size), s.p += (block_bytes)) decode_block(s, &t)

/* One vector of an integer panel. */
static void decode_integers(int32_t type, source s, target t, int64_t n_cols) {
    switch (type) {
    case DG_TYPE_Q4_0:
        FOR_EACH_BLOCK(decode_q4_0, 32, sizeof(dg_block_q4_0));
        break;
    case DG_TYPE_Q4_1:
        FOR_EACH_BLOCK(decode_q4_1, 32, sizeof(dg_block_q4_1));
        break;
    case DG_TYPE_Q5_0:
        FOR_EACH_BLOCK(decode_q5_0, 32, sizeof(dg_block_q5_0));
        break;
    case DG_TYPE_Q5_1:
        FOR_EACH_BLOCK(decode_q5_1, 32, sizeof(dg_block_q5_1));
        break;
    case DG_TYPE_Q8_0:
        FOR_EACH_BLOCK(decode_q8_0, 32, sizeof(dg_block_q8_0));
        break;
    case DG_TYPE_IQ4_NL:
        FOR_EACH_BLOCK(decode_iq4_nl, 32, sizeof(dg_block_iq4_nl));
        break;
    case DG_TYPE_IQ4_XS:
        FOR_EACH_BLOCK(decode_iq4_xs, 256, sizeof(dg_block_iq4_xs));
        break;
    case DG_TYPE_NVFP4:
        FOR_EACH_BLOCK(decode_nvfp4, 64, sizeof(dg_block_nvfp4));
        break;
    case DG_TYPE_Q2_K:
        FOR_EACH_BLOCK(decode_q2_k, 256, sizeof(dg_block_q2_k));
        break;
    case DG_TYPE_Q3_K:
        FOR_EACH_BLOCK(decode_q3_k, 256, sizeof(dg_block_q3_k));
        break;
    case DG_TYPE_Q4_K:
        FOR_EACH_BLOCK(decode_q4_k, 256, sizeof(dg_block_q4_k));
        break;
    case DG_TYPE_Q5_K:
        FOR_EACH_BLOCK(decode_q5_k, 256, sizeof(dg_block_q5_k));
        break;
    default:
        FOR_EACH_BLOCK(decode_q6_k, 256, sizeof(dg_block_q6_k));
        break; /* the last of form_of's integer types */
    }
}

/* One vector of a float panel, from rows of 2- or 4-byte floats. */
static void decode_plain_floats(int32_t type, source s, float multiplier, int64_t n_cols, float *values) {
    const vf multipliers = vf_set(multiplier);
    const int bytes = type == DG_TYPE_F32 ? 4 : 2;
    for (int64_t c = 0; c < n_cols; c += 16 / bytes) {
        vi m[4];
        vf columns[8];
        int64_t left = n_cols - c;
        load_rows_part(s, c * bytes, left * bytes, m);
        for (int j = 0; j < 4; j++) {
            if (type == DG_TYPE_F32) {
                columns[j] = vf_from_bits(m[j]);
            } else if (type == DG_TYPE_BF16) {
                columns[2 * j] = vf_from_bits(vi_shift_left(m[j], 16));
                columns[2 * j + 1] = vf_from_bits(vi_and(m[j], vi_set((int32_t)0xffff0000)));
            } else {
                columns[2 * j] = low_half(m[j]);
                columns[2 * j + 1] = high_half(m[j]);
            }
        }
        for (int j = 0; j < 16 / bytes && j < left; j++)
            vf_store(values + (c + j) * PANEL_LANES, vf_mul(columns[j], multipliers));
    }
}

/* One vector of a float panel, from rows of any type, by way of the type's own decoder. */
static void decode_any_floats(int32_t type, source s, float multiplier, int64_t n_cols, float *values) {
    enum { STRIP = 256 }; /* the largest block of any type */
    const dg_type_traits *traits = dg_type_traits_of(type);
    const vf multipliers = vf_set(multiplier);
    float strip[LANES][STRIP];
    memset(strip, 0, sizeof strip);
    for (int64_t c = 0; c < n_cols; c += STRIP) {
        int n = n_cols - c < STRIP ? (int)(n_cols - c) : STRIP;
        for (int i = 0; i < s.n; i++)
            traits->decode(s.p + c / traits->block_size * traits->block_bytes + i * s.stride, strip[i], n);
        for (int j = 0; j < n; j += 4) {
            vi m[4];
            vi_load_rows((const uint8_t *)&strip[0][j], STRIP * sizeof(float), m);
            for (int k = 0; k < 4 && j + k < n; k++)
                vf_store(values + (c + j + k) * PANEL_LANES, vf_mul(vf_from_bits(m[k]), multipliers));
        }
    }
}

static void decode(const dg_weight *weight, int64_t matrix, int64_t first_row, int32_t n_rows, dg_panel *panel) {
    const int64_t row_bytes = (int64_t)dg_row_bytes(weight->type, weight->n_cols);
    const uint8_t *src = (const uint8_t *)weight->data + (uint64_t)matrix * weight->matrix_bytes +
                         first_row * row_bytes + dg_row_bytes(weight->type, panel->first_col);
    const float multiplier = weight->scale != NULL ? weight->scale[matrix] : 1.0f;
    const bool plain = weight->type == DG_TYPE_F32 || weight->type == DG_TYPE_F16 || weight->type == DG_TYPE_BF16;
    for (int v = 0; v < VECTORS; v++) {
        const int first = v * LANES;
        if (first >= n_rows) break;
        const source s = {src + first * row_bytes, row_bytes, n_rows - first < LANES ? n_rows - first : LANES};
        if (panel->form.integer)
            decode_integers(
                weight->type, s,
                (target){panel->codes + first * 4, panel->scales + first, panel->mins + first, vf_set(multiplier)},
                panel->n_cols);
        else if (plain)
            decode_plain_floats(weight->type, s, multiplier, panel->n_cols, panel->values + first);
        else
            decode_any_floats(weight->type, s, multiplier, panel->n_cols, panel->values + first);
    }
#if HAS_ROW_PAIRS
    if (panel->form.integer) pair_codes(panel);
#endif
}
