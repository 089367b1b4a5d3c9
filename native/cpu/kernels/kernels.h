/* The kernels of one instruction set, and the two layouts they work on.
 *
 * A product x Wᵀ is done a *panel* at a time: `lanes` rows of the weight with the rows side by side, one per vector
 * lane. A *strip* of its columns, short enough for the nearest cache, is decoded into a thread's own memory, multiplied
 * with every row of activations, and overwritten by the next. Activations are packed beforehand into *tiles* of
 * `tile_rows` rows, so that a kernel walks through strip and tile from front to back.
 *
 * Quantized types are multiplied as integers: weights as bytes with a float scale per 16 or 32 columns, activations as
 * int8 with a float scale per 32; where the processor has a tile unit, both as bfloat16 instead. The other types are
 * multiplied in float32. */
#ifndef DG_CPU_KERNELS_H
#define DG_CPU_KERNELS_H

#include "model/model.h"

#define DG_BLOCK 32            /* columns that share a scale in packed activations */
#define DG_MAX_LANES 32        /* rows of a panel, of any instruction set */
#define DG_MAX_TILE_ROWS 16    /* rows of a tile of activations, likewise */
#define DG_VOCABULARY_BLOCK 64 /* vocabulary entries whose statistics are kept together */
#define DG_VOCABULARY_SPAN 512 /* vocabulary entries of a span, a multiple of it */
#define DG_TILED_FEATURES 128
#define DG_TILED_SCRATCH (160 << 10)

/* How the weights of one type are multiplied:  w = scale · (code − offset) − min */
typedef struct dg_form {
    bool weight_tiles; /* bfloat16, scales included, in tiles (amx/body.h), and the rest is unused */
    bool integer;      /* neither this nor tiles: float32 throughout, and the rest is unused */
    bool is_signed;    /* codes are signed bytes; otherwise unsigned, and below 128 where offset is not 128 */
    bool is_wide;      /* signed codes in two bytes, those of activations too (wide_codes.h) */
    bool has_mins;
    int32_t group; /* columns that share scale and min: 16 or 32 */
    int32_t offset;
} dg_form;

/* Of one code, in a panel or in packed activations. */
static inline int64_t dg_code_bytes(dg_form form) { return form.is_wide ? 2 : 1; }

static inline bool dg_form_equal(dg_form a, dg_form b) {
    return a.weight_tiles == b.weight_tiles && a.integer == b.integer && a.is_signed == b.is_signed &&
           a.is_wide == b.is_wide && a.has_mins == b.has_mins && a.group == b.group && a.offset == b.offset;
}

/* A strip of a panel: some columns of some rows of a weight, decoded. */
typedef struct dg_panel {
    dg_form form;
    int64_t first_col, n_cols;
    uint8_t *codes;          /* (n_cols/4, lanes, 4), or as layout.h and wide_codes.h say */
    float *values;           /* (n_cols, lanes): in place of codes where the form is float32; for tiles it holds as many
                                bfloat16, (n_cols/32, lanes, 32) */
    float *scales;           /* (n_cols/group, lanes) */
    float *mins;             /* (n_cols/group, lanes) */
    const uint8_t *prefetch; /* the encoded weights that will be wanted after these, or NULL: they are fetched from
                            memory while these are multiplied */
    int64_t prefetch_bytes;
} dg_panel;

/* Activations, packed for the weights of one form. Row r stands in tile r / per_tile at place r % per_tile; rows are
 * spread evenly, so that 7 rows are 4 and 3 rather than 6 and 1. */
typedef struct dg_rows {
    dg_form form;
    int32_t n;
    int32_t n_tiles;
    int32_t per_tile;
    int64_t n_cols;
    int8_t *codes;   /* (n_tiles, n_cols/32, tile_rows, 32), or as layout.h and wide_codes.h say */
    float *scales;   /* (n_tiles, n_cols/32, tile_rows) */
    int32_t *bias;   /* (n_tiles, n_cols/group, tile_rows): −offset · Σ codes of the group */
    float *sums;     /* (n_tiles, n_cols/group, tile_rows): scale · Σ codes of the group; with mins only */
    float *values;   /* (n_tiles, n_cols, tile_rows): in place of all these where the form is float32 */
    uint16_t *pairs; /* (n_tiles, n_cols/32, 16, tile_rows, 2) bfloat16: likewise where it is tiles */
} dg_rows;

/* Some keys and values, consecutive in memory. */
typedef struct dg_kv_run {
    const uint8_t *k; /* (n, k_row_bytes) */
    const uint8_t *v; /* (n, v_row_bytes) */
    int32_t position; /* of the first token */
    int32_t n;
} dg_kv_run;

#define DG_MAX_KV_RUNS 4 /* two spans, each of which may wrap around once */

/* One attention operation on one KV head. Query row r is head r % group of token r / group. */
typedef struct dg_attention {
    const float *q; /* the first query; tokens lie token_stride apart, heads of the group head_dim */
    float *out;     /* likewise */
    int64_t token_stride;
    int32_t group; /* heads that share this KV head */
    int32_t head_dim;
    int32_t n_rot; /* head_dim where keys are complete; otherwise k holds only the rotated dimensions, and v
                      stands in for the others */
    int32_t type_k, type_v;
    int64_t k_row_bytes, v_row_bytes;
    dg_kv_run runs[DG_MAX_KV_RUNS];
    int32_t n_runs;
    bool causal;
    int32_t position; /* of token 0; unless causal unused */
    int32_t window;   /* keys at most window − 1 before a query are seen; 0: all */
} dg_attention;

/* What some tokens add to the soft embeddings of some rows. */
typedef struct dg_soft_block {
    bool narrow;      /* weights and values in 16-bit integers, by pairs of tokens; kernels with has_narrow only */
    int32_t n_tokens; /* where narrow a multiple of lanes */
    int32_t n_rows;
    const int32_t *rows;        /* (n_rows) */
    const float *factors;       /* (n_rows) */
    const void *weights;        /* (n_rows/tile_rows, n_tokens, tile_rows) floats, or (…, n_tokens/2, tile_rows, 2) */
    const float *weight_scales; /* (n_rows) where narrow: what to multiply the integers with */
    const void *values;         /* (n_cols/lanes, values_stride, lanes) floats, or half as many pairs */
    const float *value_scales;  /* (n_cols/lanes, values_stride/lanes): likewise, for `lanes` tokens each */
    int32_t values_stride;      /* a multiple of lanes */
    int64_t n_cols;             /* a multiple of lanes */
    int64_t n_sums;
    float *sums; /* (n_cols/lanes, n_sums, lanes) */
} dg_soft_block;

/* Statistics of the logits z of one row for one vocabulary block. */
typedef struct dg_block_statistics {
    float max;
    float sum;      /* Σ exp(z − max) */
    float weighted; /* Σ exp(z − max) · (z − max) */
    int32_t argmax; /* token of the first largest */
} dg_block_statistics;

/* A row's online softmax after some of the vocabulary. */
typedef struct dg_online_softmax {
    float max;
    double denominator; /* Σ exp(z − max) */
} dg_online_softmax;

/* Some consecutive tokens of the vocabulary. Its rows' logits are z = softcap · tanh(rows tableᵀ / softcap) /
 * temperature. */
typedef struct dg_head_span {
    const dg_weight *table;
    int64_t first;       /* token, a multiple of DG_VOCABULARY_SPAN */
    int32_t n_tokens;    /* at most DG_VOCABULARY_SPAN */
    const dg_rows *rows; /* in the form of tiles, unless z is given */
    const float *z;      /* (rows->n, z_stride) logits made elsewhere, of the whole vocabulary; or NULL */
    int64_t z_stride;
    float softcap, temperature;
    dg_block_statistics *statistics; /* (rows->n, statistics_stride): of each DG_VOCABULARY_BLOCK of them */
    int64_t statistics_stride;
    dg_online_softmax *softmax; /* (rows->n) before these tokens, then after them; NULL: no soft embedding is wanted */
    double negligible; /* share of a row's mass up to which DG_VOCABULARY_BLOCK of them are left out of its sums */
    float *sums; /* (n_cols/lanes, n_sums, lanes), with tile_rows places for each tile of rows: Σ exp(z − max) ·
                    table */
    int64_t n_sums;
    void *scratch; /* head_span_bytes(n_cols, rows->n_tiles) */
} dg_head_span;

typedef struct dg_cpu_kernels {
    const char *name;
    const char *backend_name; /* "cpu (name)" */
    int32_t lanes;
    int32_t tile_rows;
    bool has_narrow;        /* soft embeddings in integers */
    int32_t attention_rows; /* query rows that `attend` takes at a time */

    dg_form (*form_of)(int32_t type);

    /* Decodes columns panel->first_col … first_col + n_cols − 1, whole blocks, of rows first_row … first_row + n_rows −
     * 1 (n_rows ≤ lanes) of one matrix of `weight`, its multiplier included. What the other lanes hold means nothing.
     * panel->form says in which form: that of the type, or floats. */
    void (*decode)(const dg_weight *weight, int64_t matrix, int64_t first_row, int32_t n_rows, dg_panel *panel);

    /* Packs x (n_cols) as columns first_col … of `row`; both multiples of DG_BLOCK in an integer form. */
    void (*pack)(const dg_rows *rows, int32_t row, int64_t first_col, const float *x, int64_t n_cols);

    /* Packs the n rows x[0] … x[n − 1] (rows->n_cols each) as those of one tile, where the form of `rows` is tiles.
     * NULL for sets without tiles. */
    void (*pack_tile)(const dg_rows *rows, int32_t tile, const float *const *x, int32_t n);

    /* out[r · out_stride + i] = Σ_c rows[r][c] · panel[i][c] for every r < rows->n and i < n_lanes, strip after strip
     * in the order of columns: `sums` (rows->n_tiles, tile_rows, lanes) keeps what was reached until the last one. An
     * element depends only on its own row and lane, to the last bit. */
    void (*multiply)(const dg_panel *panel, const dg_rows *rows, float *sums, float *out, int64_t out_stride,
                     int32_t n_lanes);

    /* out[r · out_stride + i] = Σ_c rows[r][c] · weight[first_row + i][c] for i < n ≤ DG_TILED_FEATURES, where the form
     * of `rows` is tiles: decoding and multiplying at the same time, in DG_TILED_SCRATCH bytes. The lines that `panel`
     * names as next are fetched meanwhile. NULL for sets without tiles. */
    void (*multiply_tiled)(const dg_weight *weight, int64_t matrix, int64_t first_row, int32_t n, const dg_panel *panel,
                           const dg_rows *rows, void *scratch, float *out, int64_t out_stride);

    /* The head of one span, where the form of `table` is tiles: a logit is, to the last bit, what `multiply` and
     * `softcap` make. NULL for sets without tiles. */
    void (*head_span)(const dg_head_span *span);
    int64_t (*head_span_bytes)(int64_t n_cols, int32_t n_tiles);

    /* The rows of `panel` one after the other, columns padded with zeros to n_cols in all: lanes rows of
     * (n_cols/lanes, values_stride, lanes) floats, or, where `narrow`, lanes/2 rows of half as many pairs of integers,
     * two rows of the panel side by side, and a scale for each `lanes` columns, values_stride/lanes apart. n_lanes rows
     * of the panel count; what the others become means nothing. */
    void (*spread)(const dg_panel *panel, int32_t n_lanes, bool narrow, int64_t n_cols, int32_t values_stride,
                   void *values, float *value_scales);
    /* The weights of one row, (n_tokens), at least 0, to their place in dg_soft_block.weights; returns their scale. */
    float (*pack_weights)(const float *weights, int32_t n_tokens, bool narrow, int32_t row, void *packed);
    /* sums[rows[i]] = factors[i] · sums[rows[i]] + weights[i] · values */
    void (*add_weighted)(const dg_soft_block *block);

    /* Attention of query rows first … first + n_rows − 1 (n_rows ≤ attention_rows). `scratch` holds
     * attend_scratch(head_dim) floats. */
    void (*attend)(const dg_attention *attention, int32_t first, int32_t n_rows, float *scratch);
    int64_t (*attend_scratch)(int32_t head_dim);

    /* Cache rows of F32, F16, BF16 or Q8_0; the last block of a Q8_0 row is filled with zeros. */
    void (*store_cache)(int32_t type, const float *x, int32_t n, void *row);

    void (*rms_norm)(const float *x, const float *weight, int64_t n, float eps, float *out); /* weight may be NULL */
    void (*gelu_multiply)(const float *gate, const float *up, int64_t n, float *out); /* gelu_tanh(gate) ∘ up */
    void (*add)(const float *a, const float *b, int64_t n, float *out);
    void (*scale)(const float *a, float factor, int64_t n, float *out);
    void (*add_scaled)(const float *a, float factor, int64_t n, float *out); /* out += factor · a */
    /* x[i], x[i + half] turned by the angle whose cosine and sine are given, for i < n */
    void (*rotate)(float *x, int64_t half, const float *cosine, const float *sine, int64_t n);
    float (*softmax)(float *x, int64_t n); /* in place, not divided by the sum, which is returned */
    /* z = softcap · tanh(z / softcap) / temperature, in place */
    void (*softcap)(float *z, int64_t n, float softcap, float temperature);
    void (*head_statistics)(const float *z, int32_t n, int32_t first_token, dg_block_statistics *block);
    /* out = exp(z − max), 0 where that is below the smallest normal number */
    void (*exponentials)(const float *z, int64_t n, float max, float *out);

    /* Multiply for n_rounds from registers alone and return the operations done; 0 without such an instruction. */
    double (*peak_int8)(int64_t n_rounds, float *sink);
    double (*peak_bf16)(int64_t n_rounds, float *sink);
    double (*peak_f32)(int64_t n_rounds, float *sink);
} dg_cpu_kernels;

/* The best set for this machine, or the one that the environment variable DGEMMA_ISA names (scalar, avx2, avxvnni,
 * avx512, amx, neon, dotprod, i8mm); a name that this machine cannot run is ignored. amx is never the best by itself.
 */
const dg_cpu_kernels *dg_cpu_kernels_choose(void);

#endif
