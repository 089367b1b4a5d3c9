/* Attention over a cache of 16 bits or fewer, by tiles. Included by attention.h for the one instruction set that
 * has them.
 *
 * Values and softmax weights are rounded to bfloat16. Queries and keys are two bfloat16 each, the second what the first
 * has lost: scores may be large, and an error in them is one of the exponent. Keys lie one after the other, as they are
 * in the cache, and are the first operand, so that scores come out with query rows side by side, where the softmax
 * wants them. Its weights are then turned, and values go two keys side by side. A key tile is converted once for
 * ROW_BLOCKS blocks of query rows. */

#define TILED_KEYS 128 /* in a key tile: four blocks of 32 */
#define KEY_BLOCKS (TILED_KEYS / 32)
#define HALVES (ATTENTION_ROWS / 16)      /* tiles of query rows in a block of them */
#define Q_BYTES (2 * HALVES * TILE_BYTES) /* of a block's queries, for 32 dimensions: both terms of each half */

_Static_assert(HALVES == 2, "two tiles of query rows by two of the others: four sums");

/* One block of ATTENTION_ROWS query rows. */
typedef struct tiled_block {
    attention_state state; /* k, v are not used */
    uint8_t *q;            /* (dim/32, 2 terms, HALVES, 16 pairs of dimensions, 16 rows, 2), in the order of keys */
} tiled_block;

/* A key tile; dim is head_dim in whole blocks of 32. */
typedef struct key_tile {
    int64_t dim;
    uint16_t *keys;   /* (TILED_KEYS, 2 terms, dim): of k, then of v those dimensions that stand in for the others */
    uint32_t *values; /* (TILED_KEYS/2, dim) pairs of keys */
    uint8_t *weights; /* (KEY_BLOCKS, HALVES, 16 rows, 32 keys) */
    float *rows;      /* (3, dim) two rows of values and one of keys as floats, zero beyond head_dim */
} key_tile;

static int64_t whole_blocks(int32_t head_dim) { return (head_dim + 31) / 32 * 32; }

static int64_t tiles_scratch(int32_t head_dim) {
    const int64_t dim = whole_blocks(head_dim), q = dim / 32 * Q_BYTES / (int64_t)sizeof(float);
    return ROW_BLOCKS * (q + dim * ATTENTION_ROWS) + TILED_KEYS * ATTENTION_ROWS + TILED_KEYS * ATTENTION_ROWS / 2 +
           TILED_KEYS * dim * 3 / 2 + 3 * dim;
}

/* x (n_dims, ATTENTION_ROWS), zeros beyond n_dims, to tiles of both terms. */
static void split_queries(tiled_block *b, const float *x, int32_t n_dims) {
    const int64_t dim = whole_blocks(n_dims);
    const vi upper = vi_set((int32_t)0xffff0000);
    for (int64_t d = 0; d < dim; d += 2)
        for (int half = 0; half < HALVES; half++) {
            const float *at = x + d * ATTENTION_ROWS + half * LANES;
            const vf a = d < n_dims ? vf_load(at) : vf_set(0),
                     c = d + 1 < n_dims ? vf_load(at + ATTENTION_ROWS) : vf_set(0);
            const vi a_high = vi_and(_mm512_castps_si512(a), upper), c_high = vi_and(_mm512_castps_si512(c), upper);
            const vf a_low = vf_sub(a, vf_from_bits(a_high)), c_low = vf_sub(c, vf_from_bits(c_high));
            uint8_t *to = b->q + d / 32 * Q_BYTES + half * TILE_BYTES + d % 32 / 2 * 64;
            vi_store(to, vi_or(vi_shift_right(a_high, 16), c_high));
            vi_store(to + HALVES * TILE_BYTES,
                     vi_or(vi_shift_right(_mm512_castps_si512(a_low), 16), vi_and(_mm512_castps_si512(c_low), upper)));
        }
}

/* n floats, a multiple of 32, to both terms, (2, n). */
static void split_row(const float *x, int64_t n, uint16_t *out) {
    for (int64_t i = 0; i < n; i += 32) {
        const vf a = vf_load(x + i), b = vf_load(x + i + 16);
        _mm512_storeu_si512(out + i, (__m512i)_mm512_cvtne2ps_pbh(b, a));
        const vf a_low = vf_sub(a, vf_load_bf16(out + i)), b_low = vf_sub(b, vf_load_bf16(out + i + 16));
        _mm512_storeu_si512(out + n + i, (__m512i)_mm512_cvtne2ps_pbh(b_low, a_low));
    }
}

/* Two rows side by side. */
static void interleave_rows(const float *a, const float *b, int64_t n, uint32_t *out) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int64_t i = 0; i < n; i += LANES) {
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(vf_load(b + i), vf_load(a + i));
        _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(order, both));
    }
}

static void convert_keys(key_tile *t, const dg_attention *a, const dg_kv_run *run, int32_t first_key, int32_t n_keys) {
    const int32_t half = a->head_dim / 2, rotated = a->n_rot / 2, rest = half - rotated;
    for (int32_t j = 0; j < TILED_KEYS; j++) {
        float *v = t->rows + j % 2 * t->dim, *key = t->rows + 2 * t->dim;
        if (j < n_keys) {
            load_cache(a->type_v, run->v + (first_key + j) * a->v_row_bytes, a->head_dim, v);
            load_cache(a->type_k, run->k + (first_key + j) * a->k_row_bytes, a->n_rot, key);
            memcpy(key + a->n_rot, v + rotated, (size_t)rest * sizeof *v);
            memcpy(key + a->n_rot + rest, v + half + rotated, (size_t)rest * sizeof *v);
            split_row(key, t->dim, t->keys + j * 2 * t->dim);
        } else if (j < (n_keys + 31) / 32 * 32) {
            memset(v, 0, (size_t)t->dim * sizeof *v);
            memset(t->keys + j * 2 * t->dim, 0, (size_t)(2 * t->dim) * sizeof *t->keys);
        } else {
            break;
        }
        if (j % 2 == 1) interleave_rows(t->rows, t->rows + t->dim, t->dim, t->values + j / 2 * t->dim);
    }
}

/* scores (32 keys, ATTENTION_ROWS) of the keys of one block */
static void score_block(const tiled_block *b, const key_tile *t, int block) {
    enum { STRIDE = ATTENTION_ROWS * sizeof(float) };
    const int64_t stride = 2 * t->dim * (int64_t)sizeof *t->keys;
    const uint16_t *keys = t->keys + (int64_t)block * 32 * 2 * t->dim, *second = keys + 16 * 2 * t->dim;
    float *scores = b->state.scores + block * 32 * ATTENTION_ROWS;
    const uint8_t *q = b->q;
    MEMORY_FENCE;
    zero_sums();
    for (int64_t d = 0; d < t->dim; d += 32, q += Q_BYTES) {
        UNROLL
        for (int i = 0; i < 3; i++) { /* the product of both second terms is negligible */
            const int q_term = i == 0, k_term = i == 2;
            if (i != 1) {
                _tile_loadd(4, keys + k_term * t->dim + d, stride);
                _tile_loadd(5, second + k_term * t->dim + d, stride);
            }
            if (i != 2) {
                _tile_loadd(6, q + q_term * HALVES * TILE_BYTES, 64);
                _tile_loadd(7, q + q_term * HALVES * TILE_BYTES + TILE_BYTES, 64);
            }
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, scores, STRIDE);
    _tile_stored(1, scores + 16, STRIDE);
    _tile_stored(2, scores + 16 * ATTENTION_ROWS, STRIDE);
    _tile_stored(3, scores + 16 * ATTENTION_ROWS + 16, STRIDE);
    MEMORY_FENCE;
}

/* out (ATTENTION_ROWS, dim) = out · factor[row] + Σ weights · values over n_blocks blocks of keys */
static void add_tiled_values(const tiled_block *b, const key_tile *t, int n_blocks) {
    const attention_state *s = &b->state;
    const int64_t stride = t->dim * (int64_t)sizeof(float);
    for (int r = 0; r < ATTENTION_ROWS; r++) {
        if (s->factor[r] == 1.0f) continue; /* most often, once the largest score has been seen */
        for (int64_t d = 0; d < t->dim; d += LANES) {
            float *at = s->out + r * t->dim + d;
            vf_store(at, vf_mul(vf_load(at), vf_set(s->factor[r])));
        }
    }
    for (int64_t d = 0; d < t->dim; d += 32) {
        float *out = s->out + d, *second = out + 16 * t->dim;
        MEMORY_FENCE;
        _tile_loadd(0, out, stride);
        _tile_loadd(1, out + 16, stride);
        _tile_loadd(2, second, stride);
        _tile_loadd(3, second + 16, stride);
        for (int i = 0; i < n_blocks; i++) {
            const uint32_t *values = t->values + i * 16 * t->dim + d;
            _tile_loadd(4, t->weights + i * HALVES * TILE_BYTES, 64);
            _tile_loadd(6, values, stride);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, values + 16, stride);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, t->weights + i * HALVES * TILE_BYTES + TILE_BYTES, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, out, stride);
        _tile_stored(1, out + 16, stride);
        _tile_stored(2, second, stride);
        _tile_stored(3, second + 16, stride);
        MEMORY_FENCE;
    }
}

/* One key tile for one block of query rows. */
static void attend_to_keys(tiled_block *b, const key_tile *t, int32_t position, int32_t n_keys, bool masked) {
    const int n_blocks = (n_keys + 31) / 32;
    float *scores = b->state.scores;
    for (int i = 0; i < n_blocks; i++) score_block(b, t, i);
    if (masked) mask_scores(&b->state, position, n_keys);
    exponentiate(&b->state, n_keys);
    memset(scores + n_keys * ATTENTION_ROWS, 0, (size_t)(n_blocks * 32 - n_keys) * ATTENTION_ROWS * sizeof *scores);
    for (int i = 0; i < n_blocks; i++)
        for (int half = 0; half < HALVES; half++)
            turn_weights(scores + i * 32 * ATTENTION_ROWS + half * 16, ATTENTION_ROWS, NULL,
                         t->weights + (i * HALVES + half) * TILE_BYTES);
    add_tiled_values(b, t, n_blocks);
}

static void tiles_attend(const dg_attention *a, int32_t first, int32_t n_rows, float *scratch) {
    tiled_block blocks[ROW_BLOCKS];
    key_tile t = {.dim = whole_blocks(a->head_dim)};
    float *scores = scratch;
    t.weights = (uint8_t *)(scores + TILED_KEYS * ATTENTION_ROWS);
    t.keys = (uint16_t *)(t.weights + KEY_BLOCKS * HALVES * TILE_BYTES);
    t.values = (uint32_t *)(t.keys + TILED_KEYS * 2 * t.dim);
    t.rows = (float *)(t.values + TILED_KEYS / 2 * t.dim);
    float *at = t.rows + 3 * t.dim;
    memset(t.rows, 0, (size_t)(3 * t.dim) * sizeof(float));
    const int n_blocks = (n_rows + ATTENTION_ROWS - 1) / ATTENTION_ROWS;
    for (int i = 0; i < n_blocks; i++) {
        tiled_block *b = &blocks[i];
        const int32_t left = n_rows - i * ATTENTION_ROWS;
        begin_attention(&b->state, a, first + i * ATTENTION_ROWS, left < ATTENTION_ROWS ? left : ATTENTION_ROWS);
        b->q = (uint8_t *)at;
        at += t.dim / 32 * Q_BYTES / (int64_t)sizeof *at;
        b->state.scores = scores;
        b->state.dim = t.dim;
        b->state.q = b->state.out = at;
        at += t.dim * ATTENTION_ROWS;
        load_queries(&b->state);
        split_queries(b, b->state.q, a->head_dim);
        memset(b->state.out, 0, (size_t)(t.dim * ATTENTION_ROWS) * sizeof *at);
    }
    begin_tiles();
    for (int32_t i = 0; i < a->n_runs; i++) {
        const dg_kv_run *run = &a->runs[i];
        for (int32_t j = 0; j < run->n; j += TILED_KEYS) {
            const int32_t n_keys = run->n - j < TILED_KEYS ? run->n - j : TILED_KEYS;
            bool converted = false;
            for (int k = 0; k < n_blocks; k++) {
                const key_visibility visible = visibility(&blocks[k].state, run->position + j, n_keys);
                if (visible == NO_KEYS) continue;
                if (!converted) convert_keys(&t, a, run, j, n_keys);
                converted = true;
                attend_to_keys(&blocks[k], &t, run->position + j, n_keys, visible == SOME_KEYS);
            }
        }
    }
    _tile_release();
    for (int i = 0; i < n_blocks; i++) write_attention(&blocks[i].state);
}
