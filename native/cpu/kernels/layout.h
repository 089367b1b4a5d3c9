/* How bytes lie in panels and in packed activations. Included by body.h, once for each instruction set.
 *
 * A vector of a panel holds four columns of LANES rows, and a block of packed activations the columns of a row one
 * after the other. With HAS_ROW_PAIRS both lie in pairs of rows, eight columns of each side by side:
 *
 *   two vectors of a panel     r0 c0…7 | r1 c0…7   and   r2 c0…7 | r3 c0…7
 *   packed activations         t0 c0…7 | t1 c0…7   and so on: (n_tiles, n_cols/32, tile_rows/2, 4, 2, 8)
 *
 * Wide codes (wide_codes.h) lie two to a word: where a vector would hold columns 0…3, one holds 0 and 2, the next 1 and
 * 3, which bytes become by shifts alone. So do packed activations. */

#define PANEL_LANES (VECTORS * LANES)

#if HAS_ROW_PAIRS

/* Where column c of a row's block lies, from the start of the tile's block on. */
static inline int64_t packed_place(int64_t slot, int64_t c) {
    return slot / 2 * 2 * DG_BLOCK + c / 8 * 16 + slot % 2 * 8 + c % 8;
}

/* From four columns of four rows in a vector, as types are decoded, to eight columns of two. */
static void pair_codes(const dg_panel *panel) {
    uint8_t *even = panel->codes, *odd = even + PANEL_LANES * 4;
    for (int64_t c = 0; c < panel->n_cols; c += 8, even += PANEL_LANES * 8, odd += PANEL_LANES * 8)
        for (int v = 0; v < VECTORS; v++) {
            vi a = vi_load(even + v * LANES * 4), b = vi_load(odd + v * LANES * 4);
            vi_store(even + v * LANES * 4, vi_zip_low(a, b));
            vi_store(odd + v * LANES * 4, vi_zip_high(a, b));
        }
}

/* Back again: four columns, the c/4-th, of the rows of vector v. */
ALWAYS_INLINE vi load_quad(const dg_panel *panel, int64_t quad, int v) {
    const uint8_t *even = panel->codes + (quad / 2 * 2 * PANEL_LANES + v * LANES) * 4;
    vi a = vi_load(even), b = vi_load(even + PANEL_LANES * 4);
    return quad % 2 == 0 ? vi_unzip_even(a, b) : vi_unzip_odd(a, b);
}

#else

static inline int64_t packed_place(int64_t slot, int64_t c) { return slot * DG_BLOCK + c; }

ALWAYS_INLINE vi load_quad(const dg_panel *panel, int64_t quad, int v) {
    return vi_load(panel->codes + (quad * PANEL_LANES + v * LANES) * 4);
}

#endif

/* Column c of the rows of vector v, as a number. */
ALWAYS_INLINE vi load_code(const dg_panel *panel, int64_t c, int v) {
    const dg_form form = panel->form;
#if HAS_WIDE_CODES
    if (form.is_wide) {
        const vi pair = vi_load(panel->codes + ((c / 4 * 2 + c % 2) * PANEL_LANES + v * LANES) * 4);
        return vi_shift_right_signed(c % 4 < 2 ? vi_shift_left(pair, 16) : pair, 16);
    }
#endif
    const vi code = vi_shift_left(load_quad(panel, c / 4, v), 24 - 8 * (int)(c % 4));
    return form.is_signed ? vi_shift_right_signed(code, 24) : vi_shift_right(code, 24);
}
