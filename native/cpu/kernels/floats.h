/* Products of float32: packing of activations, and a float panel times row tiles of ACTIVATION_ROWS rows, of which as
 * many are multiplied at a time as there are registers for their sums. Included by body.h, once for each instruction
 * set. */

static void pack_floats(const dg_rows *rows, int32_t row, int64_t first_col, const float *x, int64_t n_cols) {
    float *to =
        rows->values + (row / rows->per_tile * rows->n_cols + first_col) * ACTIVATION_ROWS + row % rows->per_tile;
    for (int64_t c = 0; c < n_cols; c++) to[c * ACTIVATION_ROWS] = x[c];
}

/* Sums (n_rows, PANEL_LANES) of earlier strips of columns, or zeros before the first. */
ALWAYS_INLINE void load_sums(const int n_rows, const dg_panel *panel, const float *sums, vf acc[TILE_ROWS][VECTORS]) {
    UNROLL
    for (int t = 0; t < n_rows; t++) {
        UNROLL
        for (int v = 0; v < VECTORS; v++)
            acc[t][v] = panel->first_col > 0 ? vf_load(sums + t * PANEL_LANES + v * LANES) : vf_set(0);
    }
}

/* Back to `sums`, or to the output after the last strip. */
ALWAYS_INLINE void store_sums(const int n_rows, const dg_panel *panel, int64_t n_cols, const vf acc[TILE_ROWS][VECTORS],
                              float *sums, float *out, int64_t out_stride, int32_t n_lanes) {
    const bool last = panel->first_col + panel->n_cols == n_cols;
    UNROLL
    for (int t = 0; t < n_rows; t++) {
        UNROLL
        for (int v = 0; v < VECTORS; v++) {
            const int left = n_lanes - v * LANES;
            if (!last)
                vf_store(sums + t * PANEL_LANES + v * LANES, acc[t][v]);
            else if (left >= LANES)
                vf_store(out + t * out_stride + v * LANES, acc[t][v]);
            else if (left > 0)
                vf_store_part(out + t * out_stride + v * LANES, acc[t][v], left);
        }
    }
}

/* n_rows (a compile-time constant) rows whose column c stands at x[c · ACTIVATION_ROWS]. */
ALWAYS_INLINE void multiply_float_rows(const int n_rows, const dg_panel *panel, const dg_rows *rows, const float *x,
                                       float *sums, float *out, int64_t out_stride, int32_t n_lanes) {
    const float *w = panel->values;
    vf acc[TILE_ROWS][VECTORS];
    load_sums(n_rows, panel, sums, acc);
    for (int64_t c = 0; c < panel->n_cols; c++, w += PANEL_LANES, x += ACTIVATION_ROWS) {
        vf column[VECTORS];
        UNROLL
        for (int v = 0; v < VECTORS; v++) column[v] = vf_load(w + v * LANES);
        UNROLL
        for (int t = 0; t < n_rows; t++) {
            vf factor = vf_set(x[t]);
            UNROLL
            for (int v = 0; v < VECTORS; v++) acc[t][v] = vf_fma(column[v], factor, acc[t][v]);
        }
    }
    store_sums(n_rows, panel, rows->n_cols, acc, sums, out, out_stride, n_lanes);
}

static void multiply_floats(const dg_panel *panel, const dg_rows *rows, float *sums, float *out, int64_t out_stride,
                            int32_t n_lanes) {
    for (int32_t tile = 0; tile < rows->n_tiles; tile++, sums += ACTIVATION_ROWS * PANEL_LANES) {
        const int32_t left = rows->n - tile * rows->per_tile, n = left < rows->per_tile ? left : rows->per_tile;
        const float *x = rows->values + (tile * rows->n_cols + panel->first_col) * ACTIVATION_ROWS;
        for (int32_t r = 0; r < n; r += TILE_ROWS) {
            float *to = out + ((int64_t)tile * rows->per_tile + r) * out_stride;
            switch (n - r < TILE_ROWS ? n - r : TILE_ROWS) {
#define CASE(n_rows)                                                                                                   \
    case n_rows:                                                                                                       \
        multiply_float_rows(n_rows, panel, rows, x + r, sums + r * PANEL_LANES, to, out_stride, n_lanes);              \
        break;
                FOR_EACH_TILE(CASE)
#undef CASE
            }
        }
    }
}
