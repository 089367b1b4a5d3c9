/* Products of integers by pairs of rows, for an instruction that multiplies two rows of eight bytes with two others
 * (smmla). Included by multiply.h in place of its own loop where a simd_*.h says HAS_ROW_PAIRS; layout.h
 * shows how both operands lie then. A sum is t0 r0, t0 r1, t1 r0, t1 r1 for rows t of activations and r of the panel.
 *
 * The loop is written for LANES = 4. */

#define PAIRS (TILE_ROWS / 2)
#define QUARTERS (PANEL_LANES / 2) /* pairs of the panel's rows */

ALWAYS_INLINE vf add_group(vi sum, vf w_scale, vf x_scale, vf acc) {
    return vf_fma(vf_from_int(sum), vf_mul(w_scale, x_scale), acc);
}

/* Sums of rows to squares: the halves of two rows' vectors side by side. */
ALWAYS_INLINE void pair_rows(const int n_rows, vf acc[TILE_ROWS][VECTORS], vf square[PAIRS][QUARTERS]) {
    UNROLL
    for (int p = 0; p < (n_rows + 1) / 2; p++) {
        const int t = 2 * p, other = t + 1 < n_rows ? t + 1 : t; /* what stands in for a missing row is never read */
        UNROLL
        for (int v = 0; v < VECTORS; v++) {
            square[p][2 * v] = vf_low_halves(acc[t][v], acc[other][v]);
            square[p][2 * v + 1] = vf_high_halves(acc[t][v], acc[other][v]);
        }
    }
}

/* And back. */
ALWAYS_INLINE void part_rows(const int n_rows, vf square[PAIRS][QUARTERS], vf acc[TILE_ROWS][VECTORS]) {
    UNROLL
    for (int t = 0; t < n_rows; t++) {
        UNROLL
        for (int v = 0; v < VECTORS; v++)
            acc[t][v] = t % 2 == 0 ? vf_low_halves(square[t / 2][2 * v], square[t / 2][2 * v + 1])
                                   : vf_high_halves(square[t / 2][2 * v], square[t / 2][2 * v + 1]);
    }
}

/* Adds a group's sums, scaled, and its minima times the sums of the activations. */
ALWAYS_INLINE void add_scaled_sums(const int n_pairs, const bool has_mins, vi sum[PAIRS][QUARTERS],
                                   const float *w_scale, const float *x_scale, const float *w_min, const float *x_sum,
                                   vf square[PAIRS][QUARTERS]) {
    UNROLL
    for (int q = 0; q < QUARTERS; q++) {
        const vf scale = vf_two_twice(w_scale + 2 * q);
        UNROLL
        for (int p = 0; p < n_pairs; p++)
            square[p][q] = add_group(sum[p][q], scale, vf_two_and_two(x_scale + 2 * p), square[p][q]);
        if (has_mins) {
            const vf min = vf_sub(vf_set(0), vf_two_twice(w_min + 2 * q));
            UNROLL
            for (int p = 0; p < n_pairs; p++) square[p][q] = vf_fma(min, vf_two_and_two(x_sum + 2 * p), square[p][q]);
        }
    }
}

ALWAYS_INLINE void multiply_integers(const int n_rows, const int group, const bool is_signed, const bool has_mins,
                                     const dg_panel *panel, const dg_rows *rows, int64_t tile,
                                     vf acc[TILE_ROWS][VECTORS]) {
    const int groups_per_block = DG_BLOCK / group, n_pairs = (n_rows + 1) / 2;
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
    vf square[PAIRS][QUARTERS];
    (void)is_signed; /* unsigned codes are below 128 */
    pair_rows(n_rows, acc, square);

    for (int64_t b = 0; b < n_blocks; b++) {
        for (int i = 0; i < n_prefetched; i++, next += CACHE_LINE) __builtin_prefetch(next, 0, 2);
        UNROLL
        for (int g = 0; g < groups_per_block; g++) {
            vi sum[PAIRS][QUARTERS];
            UNROLL
            for (int p = 0; p < n_pairs; p++) {
                vi start = has_mins ? vi_set(0) : vi_two_and_two(bias + 2 * p);
                UNROLL
                for (int q = 0; q < QUARTERS; q++) sum[p][q] = start;
            }
            UNROLL
            for (int i = 0; i < group / 8; i++) {
                vi codes[QUARTERS];
                UNROLL
                for (int q = 0; q < QUARTERS; q++) /* q: pair q % 2 of the four rows of vector q / 2 */
                    codes[q] = vi_load(w + ((2 * i + q % 2) * PANEL_LANES + q / 2 * LANES) * 4);
                UNROLL
                for (int p = 0; p < n_pairs; p++) {
                    vi two = vi_load(x + p * 2 * DG_BLOCK + g * group * 2 + i * 16);
                    UNROLL
                    for (int q = 0; q < QUARTERS; q++) sum[p][q] = vi_dot8_pairs(sum[p][q], two, codes[q]);
                }
            }
            add_scaled_sums(n_pairs, has_mins, sum, w_scale, x_scale, w_min, x_sum, square);
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
    part_rows(n_rows, square, acc);
}
