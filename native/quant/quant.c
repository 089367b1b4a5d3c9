/* The table of types, and encoding and decoding of whole matrices on many threads. */
#include "quant/quant.h"

#include <float.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/threads.h"
#include "quant/decode.h"
#include "quant/encode.h"
#include "quant/float.h"

/* ---- Types --------------------------------------------------------------------------------------------------- */

#define BF16_MAX 0x1.fep127f
#define NVFP4_MAX (6.0f * DG_E4M3_MAX) /* with a multiplier of 1 */

#define PLAIN(NAME, name, bytes, max_magnitude) [DG_TYPE_##NAME] = {#name, 1, bytes, max_magnitude, dg_decode_##name}
#define BLOCKS(NAME, name, block_size, max_magnitude)                                                                  \
    [DG_TYPE_##NAME] = {#name, block_size, sizeof(dg_block_##name), max_magnitude, dg_decode_##name}

/* The float16 scales of blocks would reach further than DG_F16_MAX, but nothing that large is a weight. */
static const dg_type_traits traits_table[DG_N_TYPES] = {
    PLAIN(F32, f32, 4, FLT_MAX),
    PLAIN(F16, f16, 2, DG_F16_MAX),
    PLAIN(BF16, bf16, 2, BF16_MAX),
    BLOCKS(Q4_0, q4_0, 32, DG_F16_MAX),
    BLOCKS(Q4_1, q4_1, 32, DG_F16_MAX),
    BLOCKS(Q5_0, q5_0, 32, DG_F16_MAX),
    BLOCKS(Q5_1, q5_1, 32, DG_F16_MAX),
    BLOCKS(Q8_0, q8_0, 32, DG_F16_MAX),
    BLOCKS(IQ4_NL, iq4_nl, 32, DG_F16_MAX),
    BLOCKS(NVFP4, nvfp4, 64, NVFP4_MAX),
    BLOCKS(Q2_K, q2_k, 256, DG_F16_MAX),
    BLOCKS(Q3_K, q3_k, 256, DG_F16_MAX),
    BLOCKS(Q4_K, q4_k, 256, DG_F16_MAX),
    BLOCKS(Q5_K, q5_k, 256, DG_F16_MAX),
    BLOCKS(Q6_K, q6_k, 256, DG_F16_MAX),
    BLOCKS(IQ4_XS, iq4_xs, 256, DG_F16_MAX),
    BLOCKS(IQ2_XXS, iq2_xxs, 256, 0),
    BLOCKS(IQ2_XS, iq2_xs, 256, DG_F16_MAX),
    BLOCKS(IQ2_S, iq2_s, 256, DG_F16_MAX),
    BLOCKS(IQ3_XXS, iq3_xxs, 256, DG_F16_MAX),
    BLOCKS(IQ3_S, iq3_s, 256, DG_F16_MAX),
};

const dg_type_traits *dg_type_traits_of(int32_t type) {
    if (type < 0 || type >= DG_N_TYPES || traits_table[type].name == NULL) return NULL;
    return &traits_table[type];
}

dg_encode dg_encoder_of(int32_t type) {
    if (type < 0 || type >= DG_N_TYPES) return NULL;
#if defined(__x86_64__) || defined(__i386__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        const bool avx512vl = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        return avx512vl ? dg_encoders_avx512vl[type] : dg_encoders_avx2[type];
    }
#endif
    return dg_encoders_baseline[type];
}

uint64_t dg_row_bytes(int32_t type, int64_t n_cols) {
    const dg_type_traits *traits = &traits_table[type];
    return (uint64_t)(n_cols / traits->block_size) * (uint64_t)traits->block_bytes;
}

static dg_status find_type(int32_t type, const dg_type_traits **traits, dg_error *error) {
    *traits = dg_type_traits_of(type);
    if (*traits == NULL)
        return dg_fail(error, DG_ERROR_ARGUMENT, "there is no tensor type %" PRId32 "; expected a dg_type", type);
    return DG_OK;
}

dg_status dg_type_describe(int32_t type, dg_type_info *info, dg_error *error) {
    const dg_type_traits *traits;
    DG_TRY(find_type(type, &traits, error));
    *info = (dg_type_info){.name = traits->name,
                           .block_size = traits->block_size,
                           .block_bytes = traits->block_bytes,
                           .encodes = dg_encoder_of(type) != NULL,
                           .decodes = true};
    return DG_OK;
}

/* ---- Matrices ------------------------------------------------------------------------------------------------ */

/* Rows are whole numbers of blocks and follow each other without padding, so a matrix is one run of blocks. It is cut
 * into pieces that fit the first-level cache together with their weights; every block size divides a piece. */
#define PIECE 4096

#define MAX_ELEMENTS (INT64_MAX / 8) /* 8: more bytes than an element of any type has */

static dg_status check_shape(const dg_type_traits *traits, int64_t n_rows, int64_t n_cols, dg_error *error) {
    if (n_rows < 0 || n_cols < 0 || (n_cols > 0 && n_rows > MAX_ELEMENTS / n_cols))
        return dg_fail(error, DG_ERROR_ARGUMENT, "a matrix of %" PRId64 " rows and %" PRId64 " columns cannot be",
                       n_rows, n_cols);
    if (n_cols % traits->block_size != 0)
        return dg_fail(error, DG_ERROR_ARGUMENT,
                       "a row of %" PRId64 " elements cannot be %s, whose blocks hold %" PRId32 "; choose another type",
                       n_cols, traits->name, traits->block_size);
    return DG_OK;
}

static inline int64_t piece_size(int64_t n_elements, int64_t start) {
    return n_elements - start < PIECE ? n_elements - start : PIECE;
}

/* Where `element`, the first of its block, starts. */
static inline uint64_t block_offset(const dg_type_traits *traits, int64_t element) {
    return (uint64_t)(element / traits->block_size) * (uint64_t)traits->block_bytes;
}

typedef struct decoding {
    const dg_type_traits *type;
    const void *src;
    float *dst;
    int64_t n_elements;
} decoding;

static void decode_piece(void *context, int64_t item, int thread) {
    const decoding *job = context;
    int64_t start = item * PIECE;
    const uint8_t *src = (const uint8_t *)job->src + block_offset(job->type, start);
    job->type->decode(src, job->dst + start, piece_size(job->n_elements, start));
}

dg_status dg_dequantize(int32_t type, const void *src, float *dst, int64_t n_rows, int64_t n_cols, int32_t n_threads,
                        dg_error *error) {
    const dg_type_traits *traits;
    DG_TRY(find_type(type, &traits, error));
    DG_TRY(check_shape(traits, n_rows, n_cols, error));
    dg_pool *pool;
    DG_TRY(dg_pool_create(n_threads, &pool, error));
    decoding job = {traits, src, dst, n_rows * n_cols};
    dg_pool_run(pool, (job.n_elements + PIECE - 1) / PIECE, decode_piece, &job);
    dg_pool_free(pool);
    return DG_OK;
}

typedef struct encoding {
    const dg_type_traits *src_type, *dst_type;
    const void *src;
    void *dst;
    int64_t n_elements, n_cols;
    const float *weights; /* (n_cols) or NULL */
    dg_encode encode;
    float inverse_multiplier;
    float max_magnitude;        /* the largest that can be encoded */
    atomic_uint largest_bits;   /* of the magnitudes seen by measure_piece */
    atomic_llong first_refused; /* the first piece with an element beyond max_magnitude; LLONG_MAX: none */
} encoding;

/* The bits of magnitudes, as integers, are in their order, with infinity and NaN above all numbers. */
static inline uint32_t magnitude_bits(float x) { return dg_float_bits(x) & 0x7fffffff; }

static uint32_t largest_magnitude_bits(const float *values, int64_t n) {
    int32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t bits = (int32_t)magnitude_bits(values[i]);
        largest = bits > largest ? bits : largest;
    }
    return (uint32_t)largest;
}

/* Decodes a piece into `values`; returns the number of its elements. */
static int64_t read_piece(const encoding *job, int64_t item, float values[PIECE]) {
    int64_t start = item * PIECE, n = piece_size(job->n_elements, start);
    job->src_type->decode((const uint8_t *)job->src + block_offset(job->src_type, start), values, n);
    return n;
}

/* False, and the piece is noted, where an element cannot be encoded. */
static bool accept_piece(encoding *job, int64_t item, uint32_t largest_bits) {
    if (largest_bits <= dg_float_bits(job->max_magnitude)) return true;
    long long first = atomic_load(&job->first_refused);
    while (item < first && !atomic_compare_exchange_weak(&job->first_refused, &first, item)) {
    }
    return false;
}

static void measure_piece(void *context, int64_t item, int thread) {
    encoding *job = context;
    float values[PIECE];
    uint32_t bits = largest_magnitude_bits(values, read_piece(job, item, values));
    if (!accept_piece(job, item, bits)) return;
    unsigned largest = atomic_load(&job->largest_bits);
    while (bits > largest && !atomic_compare_exchange_weak(&job->largest_bits, &largest, bits)) {
    }
}

/* The weights of n elements from `start` on, by their columns; NULL where all are alike. */
static const float *piece_weights(const encoding *job, int64_t start, int64_t n, float weights[PIECE]) {
    if (job->weights == NULL) return NULL;
    int64_t col = start % job->n_cols;
    for (int64_t i = 0; i < n; i++) {
        weights[i] = job->weights[col];
        if (++col == job->n_cols) col = 0;
    }
    return weights;
}

static void encode_piece(void *context, int64_t item, int thread) {
    encoding *job = context;
    float values[PIECE], weights[PIECE];
    int64_t start = item * PIECE, n = read_piece(job, item, values);
    if (!accept_piece(job, item, largest_magnitude_bits(values, n))) return;

    uint64_t offset = block_offset(job->dst_type, start);
    uint8_t *dst = (uint8_t *)job->dst + offset;
    if (job->src_type == job->dst_type) { /* another search could only move away from the source */
        memcpy(dst, (const uint8_t *)job->src + offset, block_offset(job->dst_type, n));
        return;
    }
    job->encode(values, dst, n, piece_weights(job, start, n, weights), job->inverse_multiplier);
}

/* ---- The multiplier of an NVFP4 matrix ----------------------------------------------------------------------- */

/* It decides where the groups' scales lie among the numbers of E4M3, which are 6 to 12 % apart. One octave has all such
 * places. The least multiplier puts the largest group scale on the largest E4M3; those above leave it room for the
 * larger scales that serve some groups better. Small matrices are tried as a whole. Of others N_SAMPLES pieces are, and
 * there another multiplier than the least must be better by N_DEVIATIONS standard deviations of the mean. */
#define N_MULTIPLIERS 16
#define MAX_TRIED_PIECES 16
#define N_SAMPLES 8
#define N_DEVIATIONS 3.0

typedef struct multiplier_search {
    const encoding *job;
    int64_t n_pieces;
    int n_samples;
    float multipliers[N_MULTIPLIERS];
    double errors[N_MULTIPLIERS][MAX_TRIED_PIECES]; /* Σ w (decoded − x)² */
} multiplier_search;

static void try_multiplier(void *context, int64_t item, int thread) {
    multiplier_search *search = context;
    const encoding *job = search->job;
    int64_t trial = item / search->n_samples, sample = item % search->n_samples;
    int64_t piece = sample * search->n_pieces / search->n_samples, start = piece * PIECE;
    float values[PIECE], decoded[PIECE], weights[PIECE], multiplier = search->multipliers[trial];
    dg_block_nvfp4 blocks[PIECE / 64];
    int64_t n = read_piece(job, piece, values);
    const float *w = piece_weights(job, start, n, weights);
    job->encode(values, blocks, n, w, 1.0f / multiplier);
    dg_decode_nvfp4(blocks, decoded, n);
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++) {
        double difference = (double)(decoded[i] * multiplier) - (double)values[i];
        sum += difference * difference * (w != NULL ? (double)w[i] : 1.0);
    }
    search->errors[trial][sample] = sum;
}

/* The multiplier with the least error for elements of at most `largest`, which is not zero. */
static float search_multiplier(const encoding *job, int64_t n_pieces, float largest, dg_pool *pool) {
    multiplier_search search = {.job = job, .n_pieces = n_pieces};
    search.n_samples = n_pieces <= MAX_TRIED_PIECES ? (int)n_pieces : N_SAMPLES;
    /* The bound keeps the inverse finite. */
    float least = fmaxf(largest / NVFP4_MAX, 0x1p-120f);
    for (int i = 0; i < N_MULTIPLIERS; i++) search.multipliers[i] = least * (1.0f + (float)i / N_MULTIPLIERS);
    dg_pool_run(pool, (int64_t)N_MULTIPLIERS * search.n_samples, try_multiplier, &search);
    int best = 0;
    double best_gain = 0.0;
    for (int i = 1; i < N_MULTIPLIERS; i++) {
        double gain = 0.0, squares = 0.0, n = search.n_samples;
        for (int k = 0; k < search.n_samples; k++) {
            double piece_gain = search.errors[0][k] - search.errors[i][k];
            gain += piece_gain;
            squares += piece_gain * piece_gain;
        }
        bool certain = search.n_samples == n_pieces ||
                       gain * gain * (n - 1.0) > N_DEVIATIONS * N_DEVIATIONS * (n * squares - gain * gain);
        if (gain > best_gain && certain) {
            best = i;
            best_gain = gain;
        }
    }
    return search.multipliers[best];
}

static dg_status explain_refusal(const encoding *job, dg_error *error) {
    float values[PIECE];
    int64_t item = (int64_t)job->first_refused, n = read_piece(job, item, values), i = 0;
    while (i < n - 1 && magnitude_bits(values[i]) <= dg_float_bits(job->max_magnitude)) i++;
    int64_t element = item * PIECE + i, row = element / job->n_cols, col = element % job->n_cols;
    if (!isfinite(values[i]))
        return dg_fail(error, DG_ERROR_ARGUMENT,
                       "row %" PRId64 ", column %" PRId64 " is %g; weights must be finite: the checkpoint is damaged",
                       row, col, (double)values[i]);
    return dg_fail(error, DG_ERROR_ARGUMENT,
                   "row %" PRId64 ", column %" PRId64 " is %g; %s takes at most %g: choose f32 or bf16", row, col,
                   (double)values[i], job->dst_type->name, (double)job->max_magnitude);
}

/* Weights of the columns' squared errors: `importance` (n_cols) brought to a mean of one, so that sums of squares stay
 * in float32's range. Columns that were never active keep a little weight: every block needs some. NULL where all
 * are alike. */
static dg_status make_weights(const float *importance, int64_t n_cols, float **weights, dg_error *error) {
    *weights = NULL;
    if (importance == NULL || n_cols == 0) return DG_OK;
    double sum = 0.0;
    bool all_alike = true;
    for (int64_t i = 0; i < n_cols; i++) {
        if (!isfinite(importance[i]) || importance[i] < 0.0f)
            return dg_fail(error, DG_ERROR_ARGUMENT,
                           "the importance of column %" PRId64 " is %g; expected a finite number, at least 0", i,
                           (double)importance[i]);
        sum += importance[i];
        all_alike = all_alike && importance[i] == importance[0];
    }
    if (all_alike) return DG_OK;
    *weights = malloc((size_t)n_cols * sizeof **weights);
    if (*weights == NULL)
        return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory for the weights of %" PRId64 " columns", n_cols);
    double scale = (double)n_cols / sum;
    for (int64_t i = 0; i < n_cols; i++) (*weights)[i] = (float)(importance[i] * scale) + 1e-4f;
    return DG_OK;
}

dg_status dg_quantize(int32_t src_type, const void *src, int32_t dst_type, void *dst, int64_t n_rows, int64_t n_cols,
                      const float *importance, float *multiplier, int32_t n_threads, dg_error *error) {
    encoding job = {.src = src, .dst = dst, .n_cols = n_cols, .inverse_multiplier = 1.0f, .first_refused = LLONG_MAX};
    DG_TRY(find_type(src_type, &job.src_type, error));
    DG_TRY(find_type(dst_type, &job.dst_type, error));
    job.encode = dg_encoder_of(dst_type);
    if (job.encode == NULL)
        return dg_fail(error, DG_ERROR_ARGUMENT, "%s can be read but not written; choose another type",
                       job.dst_type->name);
    DG_TRY(check_shape(job.src_type, n_rows, n_cols, error));
    DG_TRY(check_shape(job.dst_type, n_rows, n_cols, error));
    job.n_elements = n_rows * n_cols;
    int64_t n_pieces = (job.n_elements + PIECE - 1) / PIECE;

    float *weights = NULL;
    dg_pool *pool = NULL;
    dg_status status = make_weights(importance, n_cols, &weights, error);
    if (status == DG_OK) status = dg_pool_create(n_threads, &pool, error);
    if (status != DG_OK) goto done;
    job.weights = weights;

    job.max_magnitude = job.dst_type->max_magnitude;
    if (multiplier != NULL) *multiplier = 1.0f;
    if (dst_type == DG_TYPE_NVFP4 && src_type != dst_type && multiplier != NULL) {
        job.max_magnitude = FLT_MAX;
        dg_pool_run(pool, n_pieces, measure_piece, &job);
        if (job.first_refused == LLONG_MAX && job.largest_bits != 0) {
            *multiplier = search_multiplier(&job, n_pieces, dg_float_from_bits(job.largest_bits), pool);
            job.inverse_multiplier = 1.0f / *multiplier;
        }
    }
    if (job.first_refused == LLONG_MAX) dg_pool_run(pool, n_pieces, encode_piece, &job);
    if (job.first_refused != LLONG_MAX) status = explain_refusal(&job, error);

done:
    dg_pool_free(pool);
    free(weights);
    return status;
}
