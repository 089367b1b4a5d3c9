/* Attention over a cache of 16 bits or fewer, in integers: instruction sets that multiply pairs of 16-bit integers do
 * so twice as fast as they multiply floats. Included by attention.h, once for each of them.
 *
 * Queries, keys, values and weights get 13 bits and a scale for each row: at most MOST in magnitude, so that a sum of
 * 64 products fits 32 bits. Then it becomes a float. The rounding error, at most a 11,600th of a row's largest element,
 * is below that of bfloat16 even for rows with a few large elements.
 *
 * A key tile is converted once for ROW_BLOCKS blocks of query rows. */

#define MOST 5792   /* 64 · MOST² < 2³¹ */
#define SUM_DIMS 64 /* dimensions that are summed as integers */

/* One block of ATTENTION_ROWS query rows. */
typedef struct pairs_block {
    attention_state state; /* q, k, v are not used */
    int32_t *q;            /* (head_dim/2, ATTENTION_ROWS) pairs, in the order in which keys are stored */
    float q_scale[ATTENTION_ROWS];
} pairs_block;

/* A key tile. */
typedef struct pairs_key_tile {
    int64_t key_stride; /* words of a row of `keys` */
    int32_t *keys;      /* (ATTENTION_KEYS, key_stride) and padding: pairs of dimensions, of k, then those of v
                           that stand in for the others */
    int32_t *values;    /* (dim/LANES, ATTENTION_KEYS/2, LANES) pairs of keys: what is summed lies side by side */
    int32_t *weights;   /* (ATTENTION_KEYS/2, ATTENTION_ROWS) pairs of keys */
    float *row;         /* (dim) one cache row as floats */
    float k_scale[ATTENTION_KEYS];
    float v_scale[ATTENTION_KEYS];
    float weight_scale[ATTENTION_ROWS];
} pairs_key_tile;

static int64_t pairs_scratch(int32_t head_dim) {
    const int64_t dim = (head_dim + LANES - 1) / LANES * LANES;
    return ROW_BLOCKS * (dim * ATTENTION_ROWS * 3 / 2) + ATTENTION_KEYS * ATTENTION_ROWS * 3 / 2 +
           ATTENTION_KEYS * dim + LANES + dim;
}

/* The factor that brings x (n) to at most MOST, and with *scale what takes it back. A row with a NaN or an infinity
 * gets a NaN for a scale, so that it is not lost in the conversion. */
ALWAYS_INLINE float scale_of_row(const float *x, int32_t n, float *scale) {
    vf largest = vf_set(0), poison = vf_set(0);
    int32_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        vf v = vf_load(x + i);
        largest = vf_max(largest, vf_abs(v));
        poison = vf_fma(v, vf_set(0), poison);
    }
    if (i < n) {
        vf v = vf_load_part(x + i, n - i);
        largest = vf_max(largest, vf_abs(v));
        poison = vf_fma(v, vf_set(0), poison);
    }
    const float most = vf_largest(largest);
    *scale = most * (1.0f / MOST) + vf_sum(poison);
    return most > 0x1p-100f ? MOST / most : 0.0f;
}

/* x (n) · inverse, rounded, as 16-bit integers. `halves` is written up to a multiple of LANES: what comes there is to
 * be written afterwards. */
ALWAYS_INLINE void round_row(const float *x, int32_t n, float inverse, int16_t *halves) {
    int32_t i = 0;
    for (; i + LANES <= n; i += LANES)
        vi_store_halves(halves + i, vi_from_float(vf_mul(vf_load(x + i), vf_set(inverse))));
    if (i < n) vi_store_halves(halves + i, vi_from_float(vf_mul(vf_load_part(x + i, n - i), vf_set(inverse))));
}

ALWAYS_INLINE vi pair_of(vi low, vi high) { return vi_or(vi_and(low, vi_set(0xffff)), vi_shift_left(high, 16)); }

/* From floats, (head_dim, ATTENTION_ROWS) in `floats`. */
static void round_queries(pairs_block *b, const float *floats) {
    const int32_t n_dims = b->state.a->head_dim;
    for (int v = 0; v < ATTENTION_ROWS; v += LANES) {
        vf largest = vf_set(0x1p-100f), poison = vf_set(0);
        for (int32_t d = 0; d < n_dims; d++) {
            vf q = vf_load(floats + d * ATTENTION_ROWS + v);
            largest = vf_max(largest, vf_abs(q));
            poison = vf_fma(q, vf_set(0), poison);
        }
        vf inverse = vf_div(vf_set(MOST), largest);
        vf_store(b->q_scale + v, vf_add(vf_mul(largest, vf_set(1.0f / MOST)), poison));
        for (int32_t d = 0; d < n_dims; d += 2) {
            const float *q = floats + d * ATTENTION_ROWS + v;
            vi low = vi_from_float(vf_mul(vf_load(q), inverse));
            vi high = vi_from_float(vf_mul(vf_load(q + ATTENTION_ROWS), inverse));
            vi_store(b->q + d / 2 * ATTENTION_ROWS + v, pair_of(low, high));
        }
    }
}

static void round_keys(pairs_key_tile *t, const dg_attention *a, const dg_kv_run *run, int32_t first_key,
                       int32_t n_keys) {
    const int32_t half = a->head_dim / 2, rotated = a->n_rot / 2, rest = half - rotated;
    const int64_t dim = (a->head_dim + LANES - 1) / LANES * LANES;
    for (int32_t j = 0; j < n_keys; j++) {
        int16_t *key = (int16_t *)(t->keys + j * t->key_stride);
        load_cache(a->type_k, run->k + (first_key + j) * a->k_row_bytes, a->n_rot, t->row);
        round_row(t->row, a->n_rot, scale_of_row(t->row, a->n_rot, &t->k_scale[j]), key);

        load_cache(a->type_v, run->v + (first_key + j) * a->v_row_bytes, a->head_dim, t->row);
        const float inverse = scale_of_row(t->row, a->head_dim, &t->v_scale[j]);
        for (int32_t d = 0; d < dim; d += LANES) {
            vi value = vi_from_float(vf_mul(vf_load(t->row + d), vf_set(inverse)));
            int32_t *pair = t->values + d * (ATTENTION_KEYS / 2) + j / 2 * LANES;
            vi_store(pair, j % 2 == 0 ? vi_and(value, vi_set(0xffff)) : vi_or(vi_load(pair), vi_shift_left(value, 16)));
        }
        if (rest == 0) continue;
        round_row(t->row + rotated, rest, inverse, key + a->n_rot);
        round_row(t->row + half + rotated, rest, inverse, key + a->n_rot + rest);
    }
}

/* scores (n_keys, ATTENTION_ROWS) += q_scale · scale[key] · Σ q · key over n_pairs pairs of dimensions; n_keys a
 * compile-time constant */
ALWAYS_INLINE void add_pair_scores_of(const int n_keys, const int32_t *q, const float *q_scale, const int32_t *keys,
                                      int64_t key_stride, const float *scale, int32_t n_pairs, float *scores) {
    for (int32_t first = 0; first < n_pairs; first += SUM_DIMS / 2) {
        const int32_t end = first + SUM_DIMS / 2 < n_pairs ? first + SUM_DIMS / 2 : n_pairs;
        vi sum[PAIR_KEYS][2];
        UNROLL
        for (int j = 0; j < n_keys; j++) sum[j][0] = sum[j][1] = vi_set(0);
        UNROLL_ROUNDS
        for (int32_t d = first; d < end; d++) {
            vi q0 = vi_load(q + d * ATTENTION_ROWS), q1 = vi_load(q + d * ATTENTION_ROWS + LANES);
            add_dot2(n_keys, q0, q1, keys + d, key_stride, sum);
        }
        UNROLL
        for (int j = 0; j < n_keys; j++) {
            UNROLL
            for (int v = 0; v < 2; v++) {
                float *at = scores + j * ATTENTION_ROWS + v * LANES;
                vf factor = vf_mul(vf_load(q_scale + v * LANES), vf_set(scale[j]));
                vf_store(at, vf_fma(vf_from_int(sum[j][v]), factor, vf_load(at)));
            }
        }
    }
}

static void add_pair_scores(const pairs_block *b, int32_t first_pair, int32_t n_pairs, const pairs_key_tile *t,
                            const float *scale, int32_t n_keys) {
    const int32_t *q = b->q + first_pair * ATTENTION_ROWS, *keys = t->keys + first_pair;
    float *scores = b->state.scores;
    int32_t j = 0;
    for (; j + PAIR_KEYS <= n_keys; j += PAIR_KEYS)
        add_pair_scores_of(PAIR_KEYS, q, b->q_scale, keys + j * t->key_stride, t->key_stride, scale + j, n_pairs,
                           scores + j * ATTENTION_ROWS);
    for (; j < n_keys; j++)
        add_pair_scores_of(1, q, b->q_scale, keys + j * t->key_stride, t->key_stride, scale + j, n_pairs,
                           scores + j * ATTENTION_ROWS);
}

/* The exponentials, times the scales of the values, to pairs of integers with a scale for each row. */
static void round_weights(const pairs_block *b, pairs_key_tile *t, int32_t n_keys) {
    float *e = b->state.scores;
    for (int i = 0; i < ATTENTION_ROWS; i += LANES) {
        vf largest = vf_set(0x1p-100f), poison = vf_set(0);
        for (int32_t j = 0; j < n_keys; j++) {
            vf weight = vf_mul(vf_load(e + j * ATTENTION_ROWS + i), vf_set(t->v_scale[j]));
            largest = vf_max(largest, weight);
            poison = vf_fma(weight, vf_set(0), poison);
        }
        vf inverse = vf_div(vf_set(MOST), largest);
        vf_store(t->weight_scale + i, vf_add(vf_mul(largest, vf_set(1.0f / MOST)), poison));
        for (int32_t j = 0; j < n_keys; j += 2) {
            const float *at = e + j * ATTENTION_ROWS + i;
            vi low = vi_from_float(vf_mul(vf_mul(vf_load(at), vf_set(t->v_scale[j])), inverse)), high = vi_set(0);
            if (j + 1 < n_keys)
                high = vi_from_float(vf_mul(vf_mul(vf_load(at + ATTENTION_ROWS), vf_set(t->v_scale[j + 1])), inverse));
            vi_store(t->weights + j / 2 * ATTENTION_ROWS + i, pair_of(low, high));
        }
    }
}

/* out (rows, dim) = out · factor[row] + Σ weights · values for PAIR_ROWS rows from `row` on: LANES columns from d and
 * as many from `second` on */
ALWAYS_INLINE void add_pair_values_of(const pairs_block *b, const pairs_key_tile *t, int row, int64_t d, int64_t second,
                                      int32_t n_pairs) {
    const int64_t dim = b->state.dim;
    const int32_t *values = t->values + d * (ATTENTION_KEYS / 2), *others = t->values + second * (ATTENTION_KEYS / 2);
    float *out = b->state.out + row * dim;
    vi sum[PAIR_ROWS][2];
    UNROLL
    for (int r = 0; r < PAIR_ROWS; r++) sum[r][0] = sum[r][1] = vi_set(0);
    UNROLL_ROUNDS
    for (int32_t j = 0; j < n_pairs; j++)
        add_dot2(PAIR_ROWS, vi_load(values + j * LANES), vi_load(others + j * LANES),
                 t->weights + j * ATTENTION_ROWS + row, 1, sum);
    UNROLL
    for (int r = 0; r < PAIR_ROWS; r++) {
        const vf factor = vf_set(b->state.factor[row + r]), scale = vf_set(t->weight_scale[row + r]);
        vf first = vf_fma(vf_from_int(sum[r][0]), scale, vf_mul(vf_load(out + r * dim + d), factor));
        vf other = vf_fma(vf_from_int(sum[r][1]), scale, vf_mul(vf_load(out + r * dim + second), factor));
        vf_store(out + r * dim + d, first);
        vf_store(out + r * dim + second, other);
    }
}

/* All rows and columns; a few columns of values, which the nearest cache keeps, for all rows. */
static void add_pair_values(const pairs_block *b, const pairs_key_tile *t, int32_t n_pairs) {
    for (int64_t d = 0; d < b->state.dim; d += 2 * LANES) {
        const int64_t second = d + LANES < b->state.dim ? d + LANES : d; /* the first twice, with equal results */
        for (int row = 0; row < ATTENTION_ROWS; row += PAIR_ROWS) add_pair_values_of(b, t, row, d, second, n_pairs);
    }
}

static void pairs_attend(const dg_attention *a, int32_t first, int32_t n_rows, float *scratch) {
    const int64_t dim = (a->head_dim + LANES - 1) / LANES * LANES;
    pairs_block blocks[ROW_BLOCKS];
    pairs_key_tile t = {.key_stride = dim / 2};
    float *scores = scratch;
    t.weights = (int32_t *)(scores + ATTENTION_KEYS * ATTENTION_ROWS);
    t.keys = t.weights + ATTENTION_KEYS / 2 * ATTENTION_ROWS;
    t.values = t.keys + ATTENTION_KEYS * dim / 2 + LANES;
    t.row = (float *)(t.values + ATTENTION_KEYS / 2 * dim);
    float *at = t.row + dim;
    memset(t.row, 0, (size_t)dim * sizeof(float)); /* the columns beyond head_dim stay zero */
    memset(t.values, 0, (size_t)(ATTENTION_KEYS / 2 * dim) * sizeof *t.values);
    const int n_blocks = (n_rows + ATTENTION_ROWS - 1) / ATTENTION_ROWS;
    for (int i = 0; i < n_blocks; i++, at += dim * ATTENTION_ROWS * 3 / 2) {
        pairs_block *b = &blocks[i];
        const int32_t left = n_rows - i * ATTENTION_ROWS;
        b->q = (int32_t *)at;
        begin_attention(&b->state, a, first + i * ATTENTION_ROWS, left < ATTENTION_ROWS ? left : ATTENTION_ROWS);
        b->state.scores = scores;
        b->state.q = b->state.out = at + dim * ATTENTION_ROWS / 2;
        load_queries(&b->state);
        round_queries(b, b->state.q);
        memset(b->state.out, 0, (size_t)dim * ATTENTION_ROWS * sizeof(float));
    }
    for (int32_t i = 0; i < a->n_runs; i++) {
        const dg_kv_run *run = &a->runs[i];
        for (int32_t j = 0; j < run->n; j += ATTENTION_KEYS) {
            const int32_t n_keys = run->n - j < ATTENTION_KEYS ? run->n - j : ATTENTION_KEYS;
            bool loaded = false;
            for (int k = 0; k < n_blocks; k++) {
                pairs_block *b = &blocks[k];
                const key_visibility visible = visibility(&b->state, run->position + j, n_keys);
                if (visible == NO_KEYS) continue;
                if (!loaded) round_keys(&t, a, run, j, n_keys);
                loaded = true;
                memset(scores, 0, (size_t)n_keys * ATTENTION_ROWS * sizeof(float));
                add_pair_scores(b, 0, a->n_rot / 2, &t, t.k_scale, n_keys);
                if (a->n_rot < a->head_dim)
                    add_pair_scores(b, a->n_rot / 2, (a->head_dim - a->n_rot) / 2, &t, t.v_scale, n_keys);
                if (visible == SOME_KEYS) mask_scores(&b->state, run->position + j, n_keys);
                exponentiate(&b->state, n_keys);
                round_weights(b, &t, n_keys);
                add_pair_values(b, &t, (n_keys + 1) / 2);
            }
        }
    }
    for (int i = 0; i < n_blocks; i++) write_attention(&blocks[i].state);
}

#undef MOST
#undef SUM_DIMS
