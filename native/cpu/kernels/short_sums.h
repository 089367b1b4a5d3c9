/* Products of integers in sums of 16 bits, for instruction sets whose products of bytes have 16 bits and have to be
 * widened (vpmaddubsw, smull). Codes of few bits allow that once a group of columns rather than with every four: half
 * of the instructions. Included by multiply.h where a simd_*.h says HAS_SHORT_SUMS, which defines
 *
 *   vs vs_begin(bias)       a sum that starts at the bias of a group
 *   vs vs_add(sum, w, x)    with the products of four columns added
 *   vi vs_end(sum, bias)    the sum, in 32 bits
 *   vs_bias(x, n, offset)   the bias −offset · Σ x of n codes, in the form that these two expect
 *
 * and shows that no sum overflows. */

/* As multiply_integers. */
ALWAYS_INLINE void multiply_short(const int n_rows, const int group, const bool has_mins, const dg_panel *panel,
                                  const dg_rows *rows, int64_t tile, vf acc[TILE_ROWS][VECTORS]) {
    const int groups_per_block = DG_BLOCK / group;
    const int64_t n_blocks = panel->n_cols / DG_BLOCK;
    const uint8_t *w = panel->codes;
    const float *w_scale = panel->scales, *w_min = panel->mins;
    const int64_t block = (tile * rows->n_cols + panel->first_col) / DG_BLOCK;
    const int8_t *x = rows->codes + block * TILE_ROWS * DG_BLOCK;
    const float *x_scale = rows->scales + block * TILE_ROWS;
    const int32_t *bias = rows->bias + block * groups_per_block * TILE_ROWS;
    const float *x_sum = has_mins ? rows->sums + block * groups_per_block * TILE_ROWS : NULL;
    const int n_prefetched = lines_per_block(panel, rows);
    const uint8_t *next = panel->prefetch + tile * n_blocks * n_prefetched * CACHE_LINE;

    for (int64_t b = 0; b < n_blocks; b++) {
        for (int i = 0; i < n_prefetched; i++, next += CACHE_LINE) __builtin_prefetch(next, 0, 2);
        UNROLL
        for (int g = 0; g < groups_per_block; g++) {
            vs sum[TILE_ROWS][VECTORS];
            UNROLL
            for (int t = 0; t < n_rows; t++) {
                UNROLL
                for (int v = 0; v < VECTORS; v++) sum[t][v] = vs_begin(bias[t]);
            }
            UNROLL
            for (int i = 0; i < group / 4; i++) {
                vi codes[VECTORS];
                UNROLL
                for (int v = 0; v < VECTORS; v++) codes[v] = vi_load(w + (i * VECTORS + v) * LANES * 4);
                UNROLL
                for (int t = 0; t < n_rows; t++) {
                    UNROLL
                    for (int v = 0; v < VECTORS; v++)
                        sum[t][v] = vs_add(sum[t][v], codes[v], x + t * DG_BLOCK + g * group + 4 * i);
                }
            }
            UNROLL
            for (int v = 0; v < VECTORS; v++) {
                const vf scale = vf_load(w_scale + v * LANES);
                UNROLL
                for (int t = 0; t < n_rows; t++)
                    acc[t][v] =
                        vf_fma(vf_from_int(vs_end(sum[t][v], bias[t])), vf_mul(scale, vf_set(x_scale[t])), acc[t][v]);
                if (has_mins) {
                    const vf min = vf_sub(vf_set(0), vf_load(w_min + v * LANES));
                    UNROLL
                    for (int t = 0; t < n_rows; t++) acc[t][v] = vf_fma(min, vf_set(x_sum[t]), acc[t][v]);
                }
            }
            if (has_mins) {
                x_sum += TILE_ROWS;
                w_min += PANEL_LANES;
            }
            w += group * PANEL_LANES;
            w_scale += PANEL_LANES;
            bias += TILE_ROWS;
        }
        x += TILE_ROWS * DG_BLOCK;
        x_scale += TILE_ROWS;
    }
}
