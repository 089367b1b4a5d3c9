/* The soft embedding: sums of rows of the embedding table, weighted by probabilities. Included by body.h, once for each
 * instruction set. */

/* Column c of vector v of a panel. */
ALWAYS_INLINE vf panel_column(const dg_panel *panel, int64_t c, int v) {
    const dg_form form = panel->form;
    if (!form.integer) return vf_load(panel->values + c * PANEL_LANES + v * LANES);
    vi code = load_code(panel, c, v);
    const int64_t at = c / form.group * PANEL_LANES + v * LANES;
    vf value = vf_mul(vf_sub(vf_from_int(code), vf_set((float)form.offset)), vf_load(panel->scales + at));
    return form.has_mins ? vf_sub(value, vf_load(panel->mins + at)) : value;
}

#if HAS_PAIRS
#define MOST_VALUE 8191 /* PANEL_LANES · MOST_VALUE · MOST_WEIGHT < 2³¹ */
#define MOST_WEIGHT 8191

/* An upper bound of the magnitudes in PANEL_LANES columns of n_lanes rows, from their scales and the form's codes. */
static float largest_of_columns(const dg_panel *panel, int64_t c, int32_t n_lanes) {
    const dg_form form = panel->form;
    const float code = form.has_mins ? 31.0f : form.offset != 0 ? (float)form.offset : 128.0f;
    vf largest = vf_set(0x1p-100f);
    for (int64_t g = c / form.group; g * form.group < c + PANEL_LANES && g * form.group < panel->n_cols; g++)
        for (int v = 0; v < VECTORS && v * LANES < n_lanes; v++) {
            const int64_t at = g * PANEL_LANES + v * LANES;
            const int n = n_lanes - v * LANES < LANES ? n_lanes - v * LANES : LANES;
            vf most = vf_mul(vf_abs(vf_load_part(panel->scales + at, n)), vf_set(code));
            if (form.has_mins) most = vf_add(most, vf_abs(vf_load_part(panel->mins + at, n)));
            largest = vf_max(largest, most);
        }
    return vf_largest(largest);
}

ALWAYS_INLINE void store_square(const bool narrow, float *column, vf a) {
    if (narrow)
        vi_store_halves((int16_t *)column, vi_from_float(a));
    else
        vf_store(column, a);
}
#else
ALWAYS_INLINE void store_square(const bool narrow, float *column, vf a) { vf_store(column, a); }
#endif

/* A square of LANES columns by LANES rows, times `factor`, is written column by column, then read back row by row. */
ALWAYS_INLINE void spread_square(const dg_panel *panel, const bool narrow, int64_t c, int v, float factor,
                                 uint32_t *out) {
    float square[LANES][LANES];
    const vf factors = vf_set(factor);
    const int64_t n = panel->n_cols - c < LANES ? panel->n_cols - c : LANES;
    for (int64_t j = n < 0 ? 0 : n; j < LANES; j++) vf_store(square[j], vf_set(0));
    if (n == LANES) {
        UNROLL
        for (int j = 0; j < LANES; j++) store_square(narrow, square[j], vf_mul(panel_column(panel, c + j, v), factors));
    } else {
        for (int64_t j = 0; j < n; j++) store_square(narrow, square[j], vf_mul(panel_column(panel, c + j, v), factors));
    }
    const int n_words = narrow ? LANES / 2 : LANES; /* of a column */
    for (int i = 0; i < n_words; i += 4) {
        vi m[4];
        vi_load_rows((const uint8_t *)square + 4 * i, sizeof square[0], m);
        for (int k = 0; k < 4; k++) vi_store(out + (v * n_words + i + k) * PANEL_LANES, m[k]);
    }
}

static void spread(const dg_panel *panel, int32_t n_lanes, bool narrow, int64_t n_cols, int32_t values_stride,
                   void *values, float *value_scales) {
    const int64_t left = n_cols - panel->first_col;
    n_cols = left - panel->n_cols < PANEL_LANES ? left : panel->n_cols; /* the last strip is padded */
    const int64_t words = narrow ? values_stride / 2 : values_stride;   /* of a column of panels */
    for (int64_t c = 0; c < n_cols; c += PANEL_LANES) {
        uint32_t *out = (uint32_t *)values + (panel->first_col + c) * words;
        for (int64_t i = 0; i < PANEL_LANES; i += LANES, out += LANES) {
#if HAS_PAIRS
            if (narrow) {
                const float largest = largest_of_columns(panel, c, n_lanes);
                value_scales[(panel->first_col + c) / PANEL_LANES * (values_stride / PANEL_LANES)] =
                    largest * (1.0f / MOST_VALUE);
                for (int v = 0; v < VECTORS; v++) spread_square(panel, true, c + i, v, MOST_VALUE / largest, out);
                continue;
            }
#endif
            for (int v = 0; v < VECTORS; v++) spread_square(panel, false, c + i, v, 1.0f, out);
        }
    }
}

static float pack_weights(const float *weights, int32_t n_tokens, bool narrow, int32_t row, void *packed) {
    const int32_t n_words = narrow ? n_tokens / 2 : n_tokens;
    uint32_t *out = (uint32_t *)packed + (int64_t)(row / TILE_ROWS) * n_words * TILE_ROWS + row % TILE_ROWS;
#if HAS_PAIRS
    if (narrow) {
        float most = largest(weights, n_tokens);
        if (!(most > 0x1p-100f)) most = 0x1p-100f;
        const float inverse = MOST_WEIGHT / most;
        for (int32_t i = 0; i < n_words; i++, out += TILE_ROWS) {
            const uint32_t low = (uint32_t)(weights[2 * i] * inverse + 0.5f);
            const uint32_t high = (uint32_t)(weights[2 * i + 1] * inverse + 0.5f);
            *out = low | high << 16;
        }
        return most * (1.0f / MOST_WEIGHT);
    }
#endif
    for (int32_t i = 0; i < n_words; i++, out += TILE_ROWS) *out = dg_float_bits(weights[i]);
    return 1.0f;
}

#if HAS_PAIRS
/* One panel's width of columns for up to TILE_ROWS rows, in integers: those from `first` on, the columns of `values`.
 * Tokens whose values share a scale, PANEL_LANES of them, are summed exactly. */
ALWAYS_INLINE void add_narrow_rows(const int n_rows, const dg_soft_block *block, int32_t first, const uint32_t *values,
                                   const float *value_scales, float *sums) {
    enum { WORDS = PANEL_LANES / 2 };
    const int32_t *w = (const int32_t *)block->weights + (int64_t)first * (block->n_tokens / 2);
    vf acc[TILE_ROWS][VECTORS];
    UNROLL
    for (int t = 0; t < n_rows; t++) { /* the sums of a canvas are too large for the nearer caches */
        __builtin_prefetch(sums + (int64_t)block->rows[first + t] * PANEL_LANES, 1);
        UNROLL
        for (int v = 0; v < VECTORS; v++) acc[t][v] = vf_set(0);
    }
    for (int32_t done = 0; done < block->n_tokens; done += PANEL_LANES, value_scales++) {
        vi sum[TILE_ROWS][VECTORS];
        UNROLL
        for (int t = 0; t < n_rows; t++) {
            UNROLL
            for (int v = 0; v < VECTORS; v++) sum[t][v] = vi_set(0);
        }
        UNROLL
        for (int i = 0; i < WORDS; i++) {
            vi value[VECTORS];
            UNROLL
            for (int v = 0; v < VECTORS; v++) value[v] = vi_load(values + i * PANEL_LANES + v * LANES);
            add_dot2(n_rows, value[0], value[1], w + i * TILE_ROWS, 1, sum);
        }
        values += WORDS * PANEL_LANES;
        w += WORDS * TILE_ROWS;
        const vf scale = vf_set(*value_scales);
        UNROLL
        for (int t = 0; t < n_rows; t++) {
            UNROLL
            for (int v = 0; v < VECTORS; v++) acc[t][v] = vf_fma(vf_from_int(sum[t][v]), scale, acc[t][v]);
        }
    }
    UNROLL
    for (int t = 0; t < n_rows; t++) {
        float *sum = sums + (int64_t)block->rows[first + t] * PANEL_LANES;
        const vf factor = vf_set(block->factors[first + t]), scale = vf_set(block->weight_scales[first + t]);
        UNROLL
        for (int v = 0; v < VECTORS; v++)
            vf_store(sum + v * LANES, vf_fma(acc[t][v], scale, vf_mul(vf_load(sum + v * LANES), factor)));
    }
}
#else
#define add_narrow_rows(...) /* never called: has_narrow is false */
#endif

/* The same in float32. */
ALWAYS_INLINE void add_float_rows(const int n_rows, const dg_soft_block *block, int32_t first, const uint32_t *values,
                                  float *sums) {
    const uint32_t *w = (const uint32_t *)block->weights + (int64_t)first * block->n_tokens;
    vf acc[TILE_ROWS][VECTORS];
    UNROLL
    for (int t = 0; t < n_rows; t++) {
        const float *sum = sums + (int64_t)block->rows[first + t] * PANEL_LANES;
        UNROLL
        for (int v = 0; v < VECTORS; v++)
            acc[t][v] = vf_mul(vf_load(sum + v * LANES), vf_set(block->factors[first + t]));
    }
    for (int32_t i = 0; i < block->n_tokens; i++, values += PANEL_LANES, w += TILE_ROWS) {
        vf value[VECTORS];
        UNROLL
        for (int v = 0; v < VECTORS; v++) value[v] = vf_from_bits(vi_load(values + v * LANES));
        UNROLL
        for (int t = 0; t < n_rows; t++) {
            vf weight = vf_set(dg_float_from_bits(w[t]));
            UNROLL
            for (int v = 0; v < VECTORS; v++) acc[t][v] = vf_fma(value[v], weight, acc[t][v]);
        }
    }
    UNROLL
    for (int t = 0; t < n_rows; t++) {
        float *sum = sums + (int64_t)block->rows[first + t] * PANEL_LANES;
        UNROLL
        for (int v = 0; v < VECTORS; v++) vf_store(sum + v * LANES, acc[t][v]);
    }
}

static void add_weighted(const dg_soft_block *block) {
    const uint32_t *values = block->values;
    const float *value_scales = block->value_scales;
    float *sums = block->sums;
    for (int64_t c = 0; c < block->n_cols; c += PANEL_LANES) {
        for (int32_t first = 0; first < block->n_rows; first += TILE_ROWS) {
            const int n = block->n_rows - first < TILE_ROWS ? (int)(block->n_rows - first) : TILE_ROWS;
            switch (n + (block->narrow ? 100 : 0)) {
#define CASE(n_rows)                                                                                                   \
    case n_rows:                                                                                                       \
        add_float_rows(n_rows, block, first, values, sums);                                                            \
        break;                                                                                                         \
    case n_rows + 100:                                                                                                 \
        add_narrow_rows(n_rows, block, first, values, value_scales, sums);                                             \
        break;
                FOR_EACH_TILE(CASE)
#undef CASE
            }
        }
        values += (int64_t)(block->narrow ? block->values_stride / 2 : block->values_stride) * PANEL_LANES;
        value_scales += block->values_stride / PANEL_LANES;
        sums += block->n_sums * PANEL_LANES;
    }
}
