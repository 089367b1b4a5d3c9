/* Packing activations, and multiplying them with a panel. Included by body.h, once for each instruction set. */

static void pack(const dg_rows *rows, int32_t row, int64_t first_col, const float *x, int64_t n_cols) {
    if (!rows->form.integer) {
        pack_floats(rows, row, first_col, x, n_cols);
        return;
    }
    enum { PARTS = DG_BLOCK / LANES };
    const int groups_per_block = DG_BLOCK / rows->form.group;
    int64_t tile = row / rows->per_tile, slot = row % rows->per_tile;
    int64_t block = tile * (rows->n_cols / DG_BLOCK) + first_col / DG_BLOCK;
    for (int64_t b = 0; b < n_cols / DG_BLOCK; b++, block++, x += DG_BLOCK) {
        vf v[PARTS], largest = vf_set(0);
        for (int i = 0; i < PARTS; i++) {
            v[i] = vf_load(x + i * LANES);
            largest = vf_max(largest, vf_abs(v[i]));
        }
        float amax = vf_largest(largest);
        float scale = amax / 127.0f;
        vf inverse = vf_set(amax > 0x1p-100f ? 127.0f / amax : 0.0f);
        int8_t *codes = rows->codes + block * TILE_ROWS * DG_BLOCK;
        float sums[2] = {0, 0}; /* of sixteen columns each, then of a group */
        for (int i = 0; i < PARTS; i++) {
            vi q = vi_from_float(vf_mul(v[i], inverse));
#if HAS_WIDE_CODES
            if (rows->form.is_wide)
                vi_store_wide((int16_t *)rows->codes + (block * TILE_ROWS + slot) * DG_BLOCK + i * LANES, q);
            else
#endif
                vi_store_bytes(codes + packed_place(slot, i * LANES), q);
            sums[i * LANES / 16] += vf_sum(vf_from_int(q)); /* whole numbers below 2^24: exact */
        }
        rows->scales[block * TILE_ROWS + slot] = scale;
        if (groups_per_block == 1) sums[0] += sums[1];
        for (int g = 0; g < groups_per_block; g++) {
            int64_t at = (block * groups_per_block + g) * TILE_ROWS + slot;
#if HAS_SHORT_SUMS
            rows->bias[at] = rows->form.is_signed ? 0
                                                  : vs_bias(codes + packed_place(slot, g * rows->form.group),
                                                            rows->form.group, rows->form.offset);
#else
            rows->bias[at] = -rows->form.offset * (int32_t)sums[g];
#endif
            if (rows->form.has_mins) rows->sums[at] = scale * sums[g];
        }
    }
}

#define CACHE_LINE 64

/* How many lines of the next weights to fetch with each block of columns, so that all are there in the end. Without
 * this the experts, whose weights are used for a few rows only, wait for memory half of the time. */
static int lines_per_block(const dg_panel *panel, const dg_rows *rows) {
    if (panel->prefetch == NULL) return 0;
    int64_t n_blocks = rows->n_tiles * (panel->n_cols / DG_BLOCK);
    return (int)((panel->prefetch_bytes / CACHE_LINE + n_blocks - 1) / n_blocks);
}

#if HAS_ROW_PAIRS
#include "cpu/kernels/pairs.h"
#else
/* Products of n_rows packed rows (a compile-time constant) with an integer panel. Four products of bytes at a time are
 * summed exactly in 32 bits over a group; only then does a sum become a float.
 *
 * Every code and every activation is read once for several products: a load is as dear as a product. */
ALWAYS_INLINE void multiply_integers(const int n_rows, const int group, const bool is_signed, const bool has_mins,
                                     const dg_panel *panel, const dg_rows *rows, int64_t tile,
                                     vf acc[TILE_ROWS][VECTORS]) {
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
            vi sum[TILE_ROWS][VECTORS];
            UNROLL
            for (int t = 0; t < n_rows; t++) {
                vi start = has_mins ? vi_set(0) : vi_set(bias[t]);
                UNROLL
                for (int v = 0; v < VECTORS; v++) sum[t][v] = start;
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
                        sum[t][v] = vi_dot4(sum[t][v], codes[v], x + t * DG_BLOCK + g * group + 4 * i, is_signed);
                }
            }
            UNROLL
            for (int v = 0; v < VECTORS; v++) {
                vf scale = vf_load(w_scale + v * LANES);
                UNROLL
                for (int t = 0; t < n_rows; t++)
                    acc[t][v] = vf_fma(vf_from_int(sum[t][v]), vf_mul(scale, vf_set(x_scale[t])), acc[t][v]);
                if (has_mins) {
                    vf min = vf_sub(vf_set(0), vf_load(w_min + v * LANES));
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
#endif

#if HAS_WIDE_CODES
#include "cpu/kernels/wide_codes.h"
#define MULTIPLY_SIGNED multiply_wide
#else
#define MULTIPLY_SIGNED(n_rows, ...) multiply_integers(n_rows, 32, true, false, __VA_ARGS__)
#endif

#if HAS_SHORT_SUMS
#include "cpu/kernels/short_sums.h"
#define MULTIPLY_UNSIGNED multiply_short
#else
#define MULTIPLY_UNSIGNED(n_rows, group, has_mins, ...) multiply_integers(n_rows, group, false, has_mins, __VA_ARGS__)
#endif

/* One row tile, its first n_rows rows (a compile-time constant), in integers. */
ALWAYS_INLINE void multiply_tile(const int n_rows, const dg_panel *panel, const dg_rows *rows, int64_t tile,
                                 float *sums, float *out, int64_t out_stride, int32_t n_lanes) {
    const dg_form form = panel->form;
    vf acc[TILE_ROWS][VECTORS];
    load_sums(n_rows, panel, sums, acc);
    if (form.is_signed)
        MULTIPLY_SIGNED(n_rows, panel, rows, tile, acc);
    else if (form.group == 32 && form.has_mins)
        MULTIPLY_UNSIGNED(n_rows, 32, true, panel, rows, tile, acc);
    else if (form.group == 32)
        MULTIPLY_UNSIGNED(n_rows, 32, false, panel, rows, tile, acc);
    else if (form.has_mins)
        MULTIPLY_UNSIGNED(n_rows, 16, true, panel, rows, tile, acc);
    else
        MULTIPLY_UNSIGNED(n_rows, 16, false, panel, rows, tile, acc);
    store_sums(n_rows, panel, rows->n_cols, acc, sums, out, out_stride, n_lanes);
}

static void multiply(const dg_panel *panel, const dg_rows *rows, float *sums, float *out, int64_t out_stride,
                     int32_t n_lanes) {
    if (!panel->form.integer) {
        multiply_floats(panel, rows, sums, out, out_stride, n_lanes);
        return;
    }
    for (int32_t tile = 0; tile < rows->n_tiles; tile++) {
        const int32_t left = rows->n - tile * rows->per_tile;
        switch (left < rows->per_tile ? left : rows->per_tile) {
#define CASE(n_rows)                                                                                                   \
    case n_rows:                                                                                                       \
        multiply_tile(n_rows, panel, rows, tile, sums, out, out_stride, n_lanes);                                      \
        break;
            FOR_EACH_TILE(CASE)
#undef CASE
        }
        sums += TILE_ROWS * PANEL_LANES;
        out += (int64_t)rows->per_tile * out_stride;
    }
}
