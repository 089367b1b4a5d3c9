/* Packing activations, and multiplying them with a panel. Included by body.h, once for each instruction set. */

static void pack_floats(const dg_rows *rows, int32_t row, int64_t first_col, const float *x, int64_t n_cols) {
    int64_t tile = row / rows->per_tile;
    float *dst = rows->values + (tile * rows->n_cols + first_col) * TILE_ROWS + row % rows->per_tile;
    for (int64_t c = 0; c < n_cols; c++) dst[c * TILE_ROWS] = x[c];
}

static void pack(const dg_rows *rows, int32_t row, int64_t first_col, const float *x, int64_t n_cols) {
    if (!rows->form.integer) {
        pack_floats(rows, row, first_col, x, n_cols);
        return;
    }
    enum { VECTORS = DG_BLOCK / LANES };
    const int groups_per_block = DG_BLOCK / rows->form.group;
    int64_t tile = row / rows->per_tile, slot = row % rows->per_tile;
    int64_t block = tile * (rows->n_cols / DG_BLOCK) + first_col / DG_BLOCK;
    for (int64_t b = 0; b < n_cols / DG_BLOCK; b++, block++, x += DG_BLOCK) {
        vf v[VECTORS], largest = vf_set(0);
        for (int i = 0; i < VECTORS; i++) {
            v[i] = vf_load(x + i * LANES);
            largest = vf_max(largest, vf_abs(v[i]));
        }
        float amax = vf_largest(largest);
        float scale = amax / 127.0f;
        vf inverse = vf_set(amax > 0x1p-100f ? 127.0f / amax : 0.0f);
        int8_t *codes = rows->codes + (block * TILE_ROWS + slot) * DG_BLOCK;
        float sums[2] = {0, 0};
        for (int i = 0; i < VECTORS; i++) {
            vi q = vi_from_float(vf_mul(v[i], inverse));
            vi_store_bytes(codes + i * LANES, q);
            sums[i * LANES / 16] += vf_sum(vf_from_int(q)); /* whole numbers below 2^24: exact */
        }
        rows->scales[block * TILE_ROWS + slot] = scale;
        if (groups_per_block == 1) sums[0] += sums[1];
        for (int g = 0; g < groups_per_block; g++) {
            int64_t at = (block * groups_per_block + g) * TILE_ROWS + slot;
            rows->bias[at] = -rows->form.offset * (int32_t)sums[g];
            if (rows->form.has_mins) rows->sums[at] = scale * sums[g];
        }
    }
}

/* Products of n_rows packed rows (a compile-time constant) with an integer panel. Four products of bytes at a time are
 * summed exactly in 32 bits over a group; only then does a sum become a float. */
static inline __attribute__((always_inline)) void multiply_integers(const int n_rows, const int group,
                                                                    const bool is_signed, const bool has_mins,
                                                                    const dg_panel *panel, const dg_rows *rows,
                                                                    int64_t tile, vf acc[TILE_ROWS]) {
    const int n_quads = group / 4, groups_per_block = DG_BLOCK / group;
    const int64_t n_blocks = panel->n_cols / DG_BLOCK;
    const uint8_t *w = panel->codes;
    const float *w_scale = panel->scales, *w_min = panel->mins;
    const int8_t *x = rows->codes + tile * n_blocks * TILE_ROWS * DG_BLOCK;
    const float *x_scale = rows->scales + tile * n_blocks * TILE_ROWS;
    const int32_t *bias = rows->bias + tile * n_blocks * groups_per_block * TILE_ROWS;
    const float *x_sum = has_mins ? rows->sums + tile * n_blocks * groups_per_block * TILE_ROWS : NULL;

    UNROLL
    for (int t = 0; t < n_rows; t++) acc[t] = vf_set(0);
    for (int64_t b = 0; b < n_blocks; b++) {
        UNROLL
        for (int g = 0; g < groups_per_block; g++) {
            vi quads[8];
            UNROLL
            for (int i = 0; i < n_quads; i++) quads[i] = vi_load(w + i * LANES * 4);
            vf scale = vf_load(w_scale);
            UNROLL
            for (int t = 0; t < n_rows; t++) {
                vi sum = has_mins ? vi_set(0) : vi_set(bias[t]);
                UNROLL
                for (int i = 0; i < n_quads; i++)
                    sum = vi_dot4(sum, quads[i], x + t * DG_BLOCK + g * group + 4 * i, is_signed);
                acc[t] = vf_fma(vf_from_int(sum), vf_mul(scale, vf_set(x_scale[t])), acc[t]);
            }
            if (has_mins) {
                vf min = vf_sub(vf_set(0), vf_load(w_min));
                UNROLL
                for (int t = 0; t < n_rows; t++) acc[t] = vf_fma(min, vf_set(x_sum[t]), acc[t]);
                x_sum += TILE_ROWS;
                w_min += LANES;
            }
            w += group * LANES;
            w_scale += LANES;
            bias += TILE_ROWS;
        }
        x += TILE_ROWS * DG_BLOCK;
        x_scale += TILE_ROWS;
    }
}

static inline __attribute__((always_inline)) void multiply_floats(const int n_rows, const dg_panel *panel,
                                                                  const dg_rows *rows, int64_t tile,
                                                                  vf acc[TILE_ROWS]) {
    const float *w = panel->values;
    const float *x = rows->values + tile * panel->n_cols * TILE_ROWS;
    UNROLL
    for (int t = 0; t < n_rows; t++) acc[t] = vf_set(0);
    for (int64_t c = 0; c < panel->n_cols; c++, w += LANES, x += TILE_ROWS) {
        vf column = vf_load(w);
        UNROLL
        for (int t = 0; t < n_rows; t++) acc[t] = vf_fma(column, vf_set(x[t]), acc[t]);
    }
}

static inline __attribute__((always_inline)) void multiply_tile(const int n_rows, const dg_panel *panel,
                                                                const dg_rows *rows, int64_t tile, int n_stored,
                                                                float *out, int64_t out_stride, int32_t n_lanes) {
    vf acc[TILE_ROWS];
    const dg_form form = panel->form;
    if (!form.integer)
        multiply_floats(n_rows, panel, rows, tile, acc);
    else if (form.group == 32 && form.has_mins)
        multiply_integers(n_rows, 32, false, true, panel, rows, tile, acc);
    else if (form.group == 32 && form.is_signed)
        multiply_integers(n_rows, 32, true, false, panel, rows, tile, acc);
    else if (form.group == 32)
        multiply_integers(n_rows, 32, false, false, panel, rows, tile, acc);
    else if (form.has_mins)
        multiply_integers(n_rows, 16, false, true, panel, rows, tile, acc);
    else
        multiply_integers(n_rows, 16, false, false, panel, rows, tile, acc);
    UNROLL
    for (int t = 0; t < n_rows; t++) {
        if (t == n_stored) break;
        if (n_lanes == LANES)
            vf_store(out + t * out_stride, acc[t]);
        else
            vf_store_part(out + t * out_stride, acc[t], n_lanes);
    }
}

static void multiply(const dg_panel *panel, const dg_rows *rows, float *out, int64_t out_stride, int32_t n_lanes) {
    for (int32_t tile = 0; tile < rows->n_tiles; tile++) {
        int n = rows->n - tile * rows->per_tile;
        if (n > rows->per_tile) n = rows->per_tile;
        /* An odd number of rows is rounded up: what stands in the last place of the tile is computed and not stored. */
        switch ((n + 1) / 2 * 2) {
#define CASE(n_rows)                                                                                                   \
    case n_rows: multiply_tile(n_rows, panel, rows, tile, n, out, out_stride, n_lanes); break;
            CASE(2)
            CASE(4)
#if TILE_ROWS > 4
            CASE(6)
            CASE(8)
#endif
#if TILE_ROWS > 8
            CASE(10)
            CASE(12)
            CASE(14)
            CASE(16)
#endif
#undef CASE
        }
        out += (int64_t)rows->per_tile * out_stride;
    }
}

static inline __attribute__((always_inline)) void accumulate_tile(const int n_rows, int n_stored, const float *x,
                                                                  int64_t n_cols, const float *factor,
                                                                  const float *values, int64_t stride, int64_t n_dims,
                                                                  float *out, int64_t out_stride) {
    for (int64_t d = 0; d < n_dims; d += LANES) {
        int n_lanes = n_dims - d < LANES ? (int)(n_dims - d) : LANES;
        vf acc[TILE_ROWS];
        UNROLL
        for (int t = 0; t < n_rows; t++) {
            if (t < n_stored)
                acc[t] = vf_mul(vf_load_part(out + t * out_stride + d, n_lanes), vf_set(factor[t]));
            else
                acc[t] = vf_set(0);
        }
        const float *v = values + d;
        for (int64_t c = 0; c < n_cols; c++, v += stride) {
            vf column = n_lanes == LANES ? vf_load(v) : vf_load_part(v, n_lanes);
            UNROLL
            for (int t = 0; t < n_rows; t++) acc[t] = vf_fma(column, vf_set(x[c * TILE_ROWS + t]), acc[t]);
        }
        UNROLL
        for (int t = 0; t < n_rows; t++)
            if (t < n_stored) vf_store_part(out + t * out_stride + d, acc[t], n_lanes);
    }
}

static void accumulate(const dg_rows *rows, const float *factor, const float *values, int64_t stride, int64_t n_dims,
                       float *out, int64_t out_stride) {
    for (int32_t tile = 0; tile < rows->n_tiles; tile++) {
        const float *x = rows->values + tile * rows->n_cols * TILE_ROWS;
        int n = rows->n - tile * rows->per_tile;
        if (n > rows->per_tile) n = rows->per_tile;
        if (n > TILE_ROWS / 2)
            accumulate_tile(TILE_ROWS, n, x, rows->n_cols, factor, values, stride, n_dims, out, out_stride);
        else
            accumulate_tile(TILE_ROWS / 2, n, x, rows->n_cols, factor, values, stride, n_dims, out, out_stride);
        factor += rows->per_tile;
        out += (int64_t)rows->per_tile * out_stride;
    }
}
