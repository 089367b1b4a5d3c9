/* The soft embedding: sums of rows of the embedding table, weighted by probabilities. Included by body.h, once for each
 * instruction set. */

/* Column c of vector v of a panel. */
ALWAYS_INLINE vf panel_column(const dg_panel *panel, int64_t c, int v) {
    const dg_form form = panel->form;
    if (!form.integer) return vf_load(panel->values + c * PANEL_LANES + v * LANES);
    vi quad = load_quad(panel, c / 4, v);
    vi code = vi_shift_left(quad, 24 - 8 * (int)(c % 4));
    code = form.is_signed ? vi_shift_right_signed(code, 24) : vi_shift_right(code, 24);
    const int64_t at = c / form.group * PANEL_LANES + v * LANES;
    vf value = vf_mul(vf_sub(vf_from_int(code), vf_set((float)form.offset)), vf_load(panel->scales + at));
    return form.has_mins ? vf_sub(value, vf_load(panel->mins + at)) : value;
}

/* A square of LANES columns by LANES rows is written column by column, then read back row by row. */
static void spread(const dg_panel *panel, bool narrow, int64_t n_cols, int32_t values_stride, void *values) {
    uint32_t *out = (uint32_t *)values + panel->first_col * values_stride;
    const int64_t left = n_cols - panel->first_col;
    n_cols = left - panel->n_cols < PANEL_LANES ? left : panel->n_cols; /* the last strip is padded */
    for (int64_t c = 0; c < n_cols; c += LANES)
        for (int v = 0; v < VECTORS; v++) {
            float square[LANES][LANES];
            const int64_t n = panel->n_cols - c < LANES ? panel->n_cols - c : LANES;
            for (int64_t j = n < 0 ? 0 : n; j < LANES; j++) vf_store(square[j], vf_set(0));
            if (n == LANES) {
                UNROLL
                for (int j = 0; j < LANES; j++) store_square(narrow, square[j], panel_column(panel, c + j, v));
            } else {
                for (int64_t j = 0; j < n; j++) store_square(narrow, square[j], panel_column(panel, c + j, v));
            }
            const int n_words = narrow ? LANES / 2 : LANES; /* of a column */
            for (int i = 0; i < n_words; i += 4) {
                vi m[4];
                vi_load_rows((const uint8_t *)square + 4 * i, sizeof square[0], m);
                for (int k = 0; k < 4 && i + k < n_words; k++) {
                    const int64_t word = c / PANEL_LANES * values_stride + v * n_words + i + k;
                    vi_store(out + word * PANEL_LANES + c % PANEL_LANES, m[k]);
                }
            }
        }
}

static void pack_weights(const float *weights, int32_t n_tokens, bool narrow, int32_t row, void *packed) {
    const int32_t n_words = narrow ? n_tokens / 2 : n_tokens;
    uint32_t *out = (uint32_t *)packed + (int64_t)(row / TILE_ROWS) * n_words * TILE_ROWS + row % TILE_ROWS;
    for (int32_t i = 0; i < n_words; i++, out += TILE_ROWS) {
        uint32_t word = dg_float_bits(weights[i]);
        if (narrow)
            word = (uint32_t)dg_f32_to_bf16(weights[2 * i]) | (uint32_t)dg_f32_to_bf16(weights[2 * i + 1]) << 16;
        *out = word;
    }
}

/* One panel's width of columns for up to TILE_ROWS rows. */
ALWAYS_INLINE void add_weighted_rows(const int n_rows, const bool narrow, const dg_soft_tile *tile, int32_t n_words,
                                     int32_t first, const uint32_t *values, float *sums) {
    const uint32_t *w = (const uint32_t *)tile->weights + (int64_t)first * n_words;
    vf acc[TILE_ROWS][VECTORS];
    UNROLL
    for (int t = 0; t < n_rows; t++) {
        const float *sum = sums + (int64_t)tile->rows[first + t] * PANEL_LANES;
        UNROLL
        for (int v = 0; v < VECTORS; v++)
            acc[t][v] = vf_mul(vf_load(sum + v * LANES), vf_set(tile->factors[first + t]));
    }
    for (int32_t i = 0; i < n_words; i++, values += PANEL_LANES, w += TILE_ROWS) {
        vi value[VECTORS];
        UNROLL
        for (int v = 0; v < VECTORS; v++) value[v] = vi_load(values + v * LANES);
        UNROLL
        for (int t = 0; t < n_rows; t++) {
            vi weight = vi_set((int32_t)w[t]);
            UNROLL
            for (int v = 0; v < VECTORS; v++)
                acc[t][v] = narrow ? vf_dot2(acc[t][v], value[v], weight)
                                   : vf_fma(vf_from_bits(value[v]), vf_from_bits(weight), acc[t][v]);
        }
    }
    UNROLL
    for (int t = 0; t < n_rows; t++) {
        float *sum = sums + (int64_t)tile->rows[first + t] * PANEL_LANES;
        UNROLL
        for (int v = 0; v < VECTORS; v++) vf_store(sum + v * LANES, acc[t][v]);
    }
}

static void add_weighted(const dg_soft_tile *tile) {
    const int32_t n_words = tile->narrow ? tile->n_tokens / 2 : tile->n_tokens;
    const uint32_t *values = tile->values;
    float *sums = tile->sums;
    for (int64_t c = 0; c < tile->n_cols; c += PANEL_LANES) {
        for (int32_t first = 0; first < tile->n_rows; first += TILE_ROWS) {
            const int n = tile->n_rows - first < TILE_ROWS ? (int)(tile->n_rows - first) : TILE_ROWS;
            switch (n + (tile->narrow ? 100 : 0)) {
#define CASE(n_rows)                                                                                                   \
    case n_rows:                                                                                                       \
        add_weighted_rows(n_rows, false, tile, n_words, first, values, sums);                                          \
        break;                                                                                                         \
    case n_rows + 100:                                                                                                 \
        add_weighted_rows(n_rows, HAS_BF16, tile, n_words, first, values, sums);                                       \
        break;
                FOR_EACH_TILE(CASE)
#undef CASE
            }
        }
        values += (int64_t)tile->values_stride * PANEL_LANES;
        sums += tile->n_sums * PANEL_LANES;
    }
}
