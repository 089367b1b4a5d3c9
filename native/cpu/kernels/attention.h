/* Attention of a few query rows on one KV head, by key tiles with an online softmax. Included by body.h, once for
 * each instruction set.
 *
 * Scores are kept transposed, (keys, query rows), with query rows in the vector lanes: then neither keys nor values
 * have to be transposed, the softmax needs no sums across lanes, and the weights of a key are read as broadcasts. */

#define ATTENTION_ROWS (2 * LANES) /* query rows side by side */
#if defined(HAS_TILES)
#define ROW_BLOCKS 8 /* as many blocks of them share what is done once for a key tile */
#else
#define ROW_BLOCKS 4
#endif
#define ATTENTION_KEYS 64 /* keys in a tile */
#define KEYS_AT_ONCE 4    /* keys whose scores are summed side by side in registers */
#define ROWS_AT_ONCE 4    /* query rows whose values are summed side by side in registers */

static int64_t floats_scratch(int32_t head_dim) {
    int64_t dim = (head_dim + LANES - 1) / LANES * LANES;
    /* queries, keys, values, output, scores */
    return dim * ATTENTION_ROWS + 2 * dim * ATTENTION_KEYS + dim * ATTENTION_ROWS + ATTENTION_KEYS * ATTENTION_ROWS +
           64;
}

/* scores (keys, ATTENTION_ROWS) += Σ_d q[d] · k[key][d]; q (n_dims, ATTENTION_ROWS), n_keys a compile-time constant */
static inline __attribute__((always_inline)) void add_scores_of(const int n_keys, const float *q, const float *k,
                                                                int64_t k_stride, int32_t n_dims, float *scores) {
    vf acc[KEYS_AT_ONCE][2];
    UNROLL
    for (int j = 0; j < n_keys; j++) {
        acc[j][0] = vf_load(scores + j * ATTENTION_ROWS);
        acc[j][1] = vf_load(scores + j * ATTENTION_ROWS + LANES);
    }
    for (int32_t d = 0; d < n_dims; d++, q += ATTENTION_ROWS) {
        vf q0 = vf_load(q), q1 = vf_load(q + LANES);
        UNROLL
        for (int j = 0; j < n_keys; j++) {
            vf key = vf_set(k[j * k_stride + d]);
            acc[j][0] = vf_fma(q0, key, acc[j][0]);
            acc[j][1] = vf_fma(q1, key, acc[j][1]);
        }
    }
    UNROLL
    for (int j = 0; j < n_keys; j++) {
        vf_store(scores + j * ATTENTION_ROWS, acc[j][0]);
        vf_store(scores + j * ATTENTION_ROWS + LANES, acc[j][1]);
    }
}

static void add_scores(const float *q, const float *k, int64_t k_stride, int32_t n_dims, int32_t n_keys,
                       float *scores) {
    int32_t j = 0;
    for (; j + KEYS_AT_ONCE <= n_keys; j += KEYS_AT_ONCE)
        add_scores_of(KEYS_AT_ONCE, q, k + j * k_stride, k_stride, n_dims, scores + j * ATTENTION_ROWS);
    for (; j < n_keys; j++) add_scores_of(1, q, k + j * k_stride, k_stride, n_dims, scores + j * ATTENTION_ROWS);
}

/* out (rows, v_stride) = out · factor[row] + Σ_key p[key][row] · v[key] for ROWS_AT_ONCE rows, all of v's columns */
static void add_values(const float *p, const float *factor, const float *v, int64_t v_stride, int32_t n_keys,
                       float *out) {
    for (int64_t d = 0; d < v_stride; d += 2 * LANES) {
        const bool pair = d + LANES < v_stride;
        const int64_t second = pair ? d + LANES : d; /* without a pair the first is done twice, with equal results */
        vf acc[ROWS_AT_ONCE][2];
        UNROLL
        for (int r = 0; r < ROWS_AT_ONCE; r++) {
            acc[r][0] = vf_mul(vf_load(out + r * v_stride + d), vf_set(factor[r]));
            acc[r][1] = vf_mul(vf_load(out + r * v_stride + second), vf_set(factor[r]));
        }
        for (int32_t j = 0; j < n_keys; j++) {
            vf v0 = vf_load(v + j * v_stride + d), v1 = vf_load(v + j * v_stride + second);
            UNROLL
            for (int r = 0; r < ROWS_AT_ONCE; r++) {
                vf weight = vf_set(p[j * ATTENTION_ROWS + r]);
                acc[r][0] = vf_fma(weight, v0, acc[r][0]);
                acc[r][1] = vf_fma(weight, v1, acc[r][1]);
            }
        }
        UNROLL
        for (int r = 0; r < ROWS_AT_ONCE; r++) {
            vf_store(out + r * v_stride + d, acc[r][0]);
            vf_store(out + r * v_stride + second, acc[r][1]);
        }
    }
}

/* The mutable state of a piece of work. */
typedef struct attention_state {
    const dg_attention *a;
    int32_t first, n_rows;
    int64_t dim;   /* head_dim in whole vectors */
    float *q;      /* (head_dim, ATTENTION_ROWS), in the order in which keys are stored: rotated dimensions first */
    float *k;      /* (ATTENTION_KEYS, dim) */
    float *v;      /* (ATTENTION_KEYS, dim) */
    float *out;    /* (ATTENTION_ROWS, dim) */
    float *scores; /* (ATTENTION_KEYS, ATTENTION_ROWS), then their exponentials */
    float max[ATTENTION_ROWS];
    float denominator[ATTENTION_ROWS];
    float factor[ATTENTION_ROWS]; /* by which what was summed before this tile shrinks */
    float row_position[ATTENTION_ROWS];
} attention_state;

static const float *query_row(const attention_state *s, int32_t r) {
    int32_t row = s->first + (r < s->n_rows ? r : 0); /* unused rows repeat the first */
    return s->a->q + row / s->a->group * s->a->token_stride + row % s->a->group * s->a->head_dim;
}

static void load_queries(attention_state *s) {
    const int32_t half = s->a->head_dim / 2, rotated = s->a->n_rot / 2, rest = half - rotated;
    for (int32_t r = 0; r < ATTENTION_ROWS; r++) {
        const float *q = query_row(s, r);
        float *dst = s->q + r;
        for (int32_t i = 0; i < rotated; i++) {
            dst[i * ATTENTION_ROWS] = q[i];
            dst[(rotated + i) * ATTENTION_ROWS] = q[half + i];
        }
        for (int32_t i = 0; i < rest; i++) {
            dst[(2 * rotated + i) * ATTENTION_ROWS] = q[rotated + i];
            dst[(2 * rotated + rest + i) * ATTENTION_ROWS] = q[half + rotated + i];
        }
        s->row_position[r] = (float)(s->a->position + (s->first + (r < s->n_rows ? r : 0)) / s->a->group);
    }
}

/* Scores of n_keys consecutive keys, loaded into s->k and s->v on the way. */
static void score_keys(attention_state *s, const dg_kv_run *run, int32_t first_key, int32_t n_keys) {
    const dg_attention *a = s->a;
    const int32_t half = a->head_dim / 2, rotated = a->n_rot / 2, rest = half - rotated;
    for (int32_t j = 0; j < n_keys; j++) {
        load_cache(a->type_k, run->k + (first_key + j) * a->k_row_bytes, a->n_rot, s->k + j * s->dim);
        load_cache(a->type_v, run->v + (first_key + j) * a->v_row_bytes, a->head_dim, s->v + j * s->dim);
    }
    memset(s->scores, 0, (size_t)n_keys * ATTENTION_ROWS * sizeof(float));
    add_scores(s->q, s->k, s->dim, a->n_rot, n_keys, s->scores);
    if (rest > 0) {
        const float *q = s->q + a->n_rot * ATTENTION_ROWS;
        add_scores(q, s->v + rotated, s->dim, rest, n_keys, s->scores);
        add_scores(q + rest * ATTENTION_ROWS, s->v + half + rotated, s->dim, rest, n_keys, s->scores);
    }
}

/* Positions as floats are exact below 2^24. A key that a row does not see gets a score that no other can be below. */
static const float MASKED = -1e30f;

static void mask_scores(attention_state *s, int32_t first_position, int32_t n_keys) {
    for (int32_t j = 0; j < n_keys; j++)
        for (int i = 0; i < ATTENTION_ROWS; i += LANES) {
            vf row = vf_load(s->row_position + i), key = vf_set((float)(first_position + j));
            vf score = vf_load(s->scores + j * ATTENTION_ROWS + i);
            score = vf_where_less(row, key, vf_set(MASKED), score);
            if (s->a->window > 0) {
                vf last_hidden = vf_sub(row, vf_set((float)(s->a->window - 1)));
                score = vf_where_less(key, last_hidden, vf_set(MASKED), score);
            }
            vf_store(s->scores + j * ATTENTION_ROWS + i, score);
        }
}

/* Scores to exponentials; maximum and denominator of the online softmax move on. */
static void exponentiate(attention_state *s, int32_t n_keys) {
    const vf hidden = vf_set(0.5f * MASKED);
    for (int i = 0; i < ATTENTION_ROWS; i += LANES) {
        vf before = vf_load(s->max + i), max = before, sum = vf_set(0);
        for (int32_t j = 0; j < n_keys; j++) max = vf_max(max, vf_load(s->scores + j * ATTENTION_ROWS + i));
        for (int32_t j = 0; j < n_keys; j++) {
            float *at = s->scores + j * ATTENTION_ROWS + i;
            vf score = vf_load(at);
            vf e = vf_where_less(score, hidden, vf_set(0), vf_exp(vf_sub(score, max)));
            sum = vf_add(sum, e);
            vf_store(at, e);
        }
        vf factor = vf_exp(vf_sub(before, max));
        vf_store(s->factor + i, factor);
        vf_store(s->denominator + i, vf_fma(vf_load(s->denominator + i), factor, sum));
        vf_store(s->max + i, max);
    }
}

static void begin_attention(attention_state *s, const dg_attention *a, int32_t first, int32_t n_rows) {
    *s = (attention_state){.a = a, .first = first, .n_rows = n_rows, .dim = (a->head_dim + LANES - 1) / LANES * LANES};
    for (int r = 0; r < ATTENTION_ROWS; r++) s->max[r] = MASKED;
}

typedef enum key_visibility { NO_KEYS, SOME_KEYS, ALL_KEYS } key_visibility;

/* Which of n_keys keys from `position` on the rows of `s` see. */
static key_visibility visibility(const attention_state *s, int32_t position, int32_t n_keys) {
    const dg_attention *a = s->a;
    if (!a->causal) return ALL_KEYS;
    const int32_t first = a->position + s->first / a->group;
    const int32_t last = a->position + (s->first + s->n_rows - 1) / a->group, last_key = position + n_keys - 1;
    const bool in_future = position > last, forgotten = a->window > 0 && last_key <= first - a->window;
    if (in_future || forgotten) return NO_KEYS;
    return last_key > first || (a->window > 0 && position <= last - a->window) ? SOME_KEYS : ALL_KEYS;
}

static void write_attention(const attention_state *s) {
    const dg_attention *a = s->a;
    for (int32_t r = 0; r < s->n_rows; r++) {
        const int32_t row = s->first + r;
        float *out = a->out + row / a->group * a->token_stride + row % a->group * a->head_dim;
        for (int32_t d = 0; d < a->head_dim; d++) out[d] = s->out[r * s->dim + d] / s->denominator[r];
    }
}

/* One block of query rows, in float32. */
static void attend_floats(const dg_attention *a, int32_t first, int32_t n_rows, float *scratch) {
    attention_state s;
    begin_attention(&s, a, first, n_rows);
    s.q = scratch;
    s.k = s.q + s.dim * ATTENTION_ROWS;
    s.v = s.k + s.dim * ATTENTION_KEYS;
    s.out = s.v + s.dim * ATTENTION_KEYS;
    s.scores = s.out + s.dim * ATTENTION_ROWS;
    memset(s.out, 0, (size_t)s.dim * ATTENTION_ROWS * sizeof(float));
    memset(s.v, 0, (size_t)s.dim * ATTENTION_KEYS * sizeof(float)); /* the columns beyond head_dim stay zero */
    load_queries(&s);
    for (int32_t i = 0; i < a->n_runs; i++) {
        const dg_kv_run *run = &a->runs[i];
        for (int32_t j = 0; j < run->n; j += ATTENTION_KEYS) {
            const int32_t n_keys = run->n - j < ATTENTION_KEYS ? run->n - j : ATTENTION_KEYS;
            const key_visibility visible = visibility(&s, run->position + j, n_keys);
            if (visible == NO_KEYS) continue;
            score_keys(&s, run, j, n_keys);
            if (visible == SOME_KEYS) mask_scores(&s, run->position + j, n_keys);
            exponentiate(&s, n_keys);
            for (int r = 0; r < ATTENTION_ROWS; r += ROWS_AT_ONCE)
                add_values(s.scores + r, s.factor + r, s.v, s.dim, n_keys, s.out + r * s.dim);
        }
    }
    write_attention(&s);
}

/* Another form for caches of 16 bits or fewer. */
#if defined(HAS_TILES)
#include "cpu/kernels/amx/attention.h"
#define COMPACT(function) tiles_##function
#elif HAS_PAIRS
#include "cpu/kernels/attention_pairs.h"
#define COMPACT(function) pairs_##function
#endif

static int64_t attend_scratch(int32_t head_dim) {
    int64_t most = floats_scratch(head_dim);
#if defined(COMPACT)
    if (COMPACT(scratch)(head_dim) > most) most = COMPACT(scratch)(head_dim);
#endif
    return most;
}

static void attend(const dg_attention *a, int32_t first, int32_t n_rows, float *scratch) {
#if defined(COMPACT)
    if (a->type_k != DG_TYPE_F32 && a->type_v != DG_TYPE_F32) {
        COMPACT(attend)(a, first, n_rows, scratch);
        return;
    }
#endif
    for (int32_t done = 0; done < n_rows; done += ATTENTION_ROWS)
        attend_floats(a, first + done, n_rows - done < ATTENTION_ROWS ? n_rows - done : ATTENTION_ROWS, scratch);
}
