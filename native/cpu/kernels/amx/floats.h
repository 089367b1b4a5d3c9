/* The types without tiles: float32 products as in body_multiply.h, but with sixteen rows of activations to a tile.
 * Included by body_amx.h. */

static void pack_floats(const dg_rows *rows, int32_t row, int64_t first_col, const float *x, int64_t n_cols) {
    float *dst =
        rows->values + (row / rows->per_tile * rows->n_cols + first_col) * ACTIVATION_ROWS + row % rows->per_tile;
    for (int64_t c = 0; c < n_cols; c++) dst[c * ACTIVATION_ROWS] = x[c];
}

/* As many rows of a tile as there are registers for their sums, of which the first n_rows are wanted; the others may be
 * beyond the tile, where the memory of packed rows goes on. */
static void multiply_some_floats(const dg_panel *panel, const float *x, int32_t n_rows, bool last, float *sums,
                                 float *out, int64_t out_stride, int32_t n_lanes) {
    const float *w = panel->values;
    vf acc[TILE_ROWS][VECTORS];
    UNROLL
    for (int t = 0; t < TILE_ROWS; t++) {
        UNROLL
        for (int v = 0; v < VECTORS; v++)
            acc[t][v] = panel->first_col > 0 && t < n_rows ? vf_load(sums + t * PANEL_LANES + v * LANES) : vf_set(0);
    }
    for (int64_t c = 0; c < panel->n_cols; c++, w += PANEL_LANES, x += ACTIVATION_ROWS) {
        vf column[VECTORS];
        UNROLL
        for (int v = 0; v < VECTORS; v++) column[v] = vf_load(w + v * LANES);
        UNROLL
        for (int t = 0; t < TILE_ROWS; t++) {
            vf factor = vf_set(x[t]);
            UNROLL
            for (int v = 0; v < VECTORS; v++) acc[t][v] = vf_fma(column[v], factor, acc[t][v]);
        }
    }
    UNROLL
    for (int t = 0; t < TILE_ROWS; t++) {
        if (t >= n_rows) break;
        UNROLL
        for (int v = 0; v < VECTORS; v++) {
            const int left = n_lanes - v * LANES;
            if (!last)
                vf_store(sums + t * PANEL_LANES + v * LANES, acc[t][v]);
            else if (left > 0)
                vf_store_part(out + t * out_stride + v * LANES, acc[t][v], left < LANES ? left : LANES);
        }
    }
}

static void multiply_floats(const dg_panel *panel, const dg_rows *rows, float *sums, float *out, int64_t out_stride,
                            int32_t n_lanes) {
    const bool last = panel->first_col + panel->n_cols == rows->n_cols;
    for (int32_t tile = 0; tile < rows->n_tiles; tile++, sums += ACTIVATION_ROWS * PANEL_LANES) {
        const int32_t left = rows->n - tile * rows->per_tile, n = left < rows->per_tile ? left : rows->per_tile;
        const float *x = rows->values + (tile * rows->n_cols + panel->first_col) * ACTIVATION_ROWS;
        for (int32_t r = 0; r < n; r += TILE_ROWS)
            multiply_some_floats(panel, x + r, n - r < TILE_ROWS ? n - r : TILE_ROWS, last, sums + r * PANEL_LANES,
                                 out + ((int64_t)tile * rows->per_tile + r) * out_stride, out_stride, n_lanes);
    }
}
