/* Products of signed codes of eight bits as integers of 16, for instruction sets whose products of bytes are summed in
 * 16 bits (vpmaddubsw): two products of such codes fill those, and the sign has to be handed over besides. Products of
 * words are summed in 32 bits at once (vpmaddwd), exactly: two instructions for 16 products, where bytes take four for
 * 32, three of them multiplications to the processor. Included by multiply.h where a simd_*.h says HAS_WIDE_CODES,
 * which defines
 *
 *   vi vi_widen_even(bytes), vi_widen_odd(bytes)   columns 0 and 2, 1 and 3 of four bytes in a word, as halves of it
 *   vi_store_wide(p, codes)                        LANES columns of activations in the same order
 *
 * A strip has half of the columns that it has with bytes, and takes as much of the nearest cache. */

/* As multiply_integers, for groups of a block, without minima. */
ALWAYS_INLINE void multiply_wide(const int n_rows, const dg_panel *panel, const dg_rows *rows, int64_t tile,
                                 vf acc[TILE_ROWS][VECTORS]) {
    const int64_t n_blocks = panel->n_cols / DG_BLOCK;
    const int16_t *w = (const int16_t *)panel->codes;
    const float *w_scale = panel->scales;
    const int64_t block = (tile * rows->n_cols + panel->first_col) / DG_BLOCK;
    const int16_t *x = (const int16_t *)rows->codes + block * TILE_ROWS * DG_BLOCK;
    const float *x_scale = rows->scales + block * TILE_ROWS;
    const int n_prefetched = lines_per_block(panel, rows);
    const uint8_t *next = panel->prefetch + tile * n_blocks * n_prefetched * CACHE_LINE;

    for (int64_t b = 0; b < n_blocks; b++) {
        for (int i = 0; i < n_prefetched; i++, next += CACHE_LINE) __builtin_prefetch(next, 0, 2);
        vi sum[TILE_ROWS][VECTORS];
        UNROLL
        for (int t = 0; t < n_rows; t++) {
            UNROLL
            for (int v = 0; v < VECTORS; v++) sum[t][v] = vi_set(0);
        }
        UNROLL
        for (int i = 0; i < DG_BLOCK / 2; i++) {
            vi codes[VECTORS];
            UNROLL
            for (int v = 0; v < VECTORS; v++) codes[v] = vi_load(w + (i * VECTORS + v) * LANES * 2);
            add_dot2(n_rows, codes[0], codes[1], (const int32_t *)(const void *)(x + 2 * i), DG_BLOCK / 2, sum);
        }
        UNROLL
        for (int v = 0; v < VECTORS; v++) {
            const vf scale = vf_load(w_scale + v * LANES);
            UNROLL
            for (int t = 0; t < n_rows; t++)
                acc[t][v] = vf_fma(vf_from_int(sum[t][v]), vf_mul(scale, vf_set(x_scale[t])), acc[t][v]);
        }
        w += DG_BLOCK * PANEL_LANES;
        w_scale += PANEL_LANES;
        x += TILE_ROWS * DG_BLOCK;
        x_scale += TILE_ROWS;
    }
}
