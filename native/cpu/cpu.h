/* What the files of the CPU backend share: a session's threads and scratch, and the matrix products. */
#ifndef DG_CPU_H
#define DG_CPU_H

#include "base/threads.h"
#include "cpu/kernels/kernels.h"
#include "device/backend.h"

#define DG_FEATURES 64 /* output features of a gated MLP that are made, and packed again, at a time */

/* One thread's own memory. */
typedef struct dg_thread {
    dg_panel panel;
    float *sums;      /* (max_rows and padding, lanes) of a panel whose last strip is yet to come */
    float *row;       /* (largest n_cols) */
    float *tile_rows; /* (tile_rows, largest n_cols) */
    float *gate, *up; /* (max_rows, DG_FEATURES) */
    float *logits;    /* (canvas_length, DG_VOCABULARY_BLOCK) */
    float *attention;
    void *tile_scratch; /* scratch of multiply_tiled and head_span, where there are such */
} dg_thread;

/* Cosines and sines of the tokens of one call, for the layers of one kind; many layers use them in turn. */
typedef struct dg_rope {
    float base;
    int32_t head_dim, n_rot, position, n;
    float *cosine, *sine; /* (max_rows, n_rot/2) */
} dg_rope;

/* The rows that one expert was chosen for. */
typedef struct dg_expert {
    int32_t expert;
    int32_t n;          /* rows */
    int32_t first;      /* of them, in the order of rows by expert */
    int32_t first_tile; /* of them, in packed activations */
} dg_expert;

#define DG_ROUND_BLOCKS 16 /* vocabulary blocks of a round of soft_embedding.c */

/* What one vocabulary block means to one row. */
typedef struct dg_soft_decision {
    float factor; /* by which what was summed before shrinks */
    float max;    /* that exponentials are relative to */
    bool wanted;
} dg_soft_decision;

/* What threads share while they sum soft embeddings; see dg_soft_block. */
typedef struct dg_soft_round {
    float *logits;               /* (DG_ROUND_BLOCKS, n, DG_VOCABULARY_BLOCK) */
    dg_soft_decision *decisions; /* (n, DG_ROUND_BLOCKS) */
    float *values;        /* (DG_ROUND_BLOCKS, padded n_embd / lanes, DG_VOCABULARY_BLOCK, lanes), or half of it */
    float *value_scales;  /* (DG_ROUND_BLOCKS, padded n_embd / lanes, DG_VOCABULARY_BLOCK / lanes) */
    float *weights;       /* (DG_ROUND_BLOCKS, canvas_length and padding, DG_VOCABULARY_BLOCK) */
    float *weight_scales; /* (DG_ROUND_BLOCKS, canvas_length) */
    float *factors;       /* (DG_ROUND_BLOCKS, canvas_length) */
    int32_t *rows;        /* (DG_ROUND_BLOCKS, canvas_length) to which the block matters */
    int32_t *n_rows;      /* (DG_ROUND_BLOCKS) */
} dg_soft_round;

struct dg_backend {
    dg_backend_params params;
    const dg_model *model;
    const dg_cpu_kernels *kernels;
    dg_pool *pool;
    void *memory; /* the one allocation that all below point into */
    dg_thread *threads;
    dg_collector *collector; /* or NULL */

    void *packed;        /* the activations that enter an operation, (max_rows, largest n_cols) */
    void *packed_hidden; /* a gated MLP's hidden features, (max_rows, n_ff) */
    float *product;      /* (max_rows, n_embd) */
    float *k, *v;        /* (max_rows, n_kv_heads·head_dim) as projected */
    dg_rope rope[2];     /* full, sliding */

    float *router_logits;        /* (max_rows, n_experts) */
    int32_t *chosen;             /* (max_rows, n_experts_used) */
    float *expert_weight;        /* (max_rows, n_experts_used) */
    int32_t *expert_row;         /* (max_rows, n_experts_used) row among the rows ordered by expert */
    int32_t *row_of_expert;      /* (max_rows, n_experts_used) the inverse: the row of x that stands there */
    dg_expert *experts;          /* (n_experts) those with rows, most rows first */
    int32_t *expert_rank;        /* (n_experts) place in `experts`, or −1 */
    void *packed_experts;        /* (max_rows·n_experts_used and padding, n_embd) */
    void *packed_experts_hidden; /* likewise, n_ff_expert columns */
    float *expert_out;           /* (max_rows·n_experts_used, n_embd) */

    dg_block_statistics *block_statistics; /* (canvas_length, n_vocab / DG_VOCABULARY_BLOCK) */
    dg_online_softmax *online_softmax;     /* (canvas_length) */
    dg_soft_round soft_round;              /* unused where the table's form is tiles */
    dg_canvas *canvas;                     /* under way */
    int32_t *argmax;                       /* (canvas_length) */
    int32_t *candidates;                   /* (canvas_length) */
    int32_t *order;                        /* (canvas_length) */
    float *uniforms;                       /* (canvas_length) */
    float *soft_sums; /* (padded n_embd / lanes, canvas_length and padding, lanes) Σ exp(z − max) · embedding */
};

/* ---- matmul.c ---- */

/* Bytes that n_tiles packed tiles of n_cols columns take in any form. */
uint64_t dg_rows_bytes(const dg_cpu_kernels *kernels, int64_t n_tiles, int64_t n_cols);
int32_t dg_rows_n_tiles(const dg_cpu_kernels *kernels, int32_t n);
/* Rows of `form` in `memory`, yet to be packed, from tile `first_tile` of a run of n_tiles_in_all. */
dg_rows dg_rows_in(const dg_cpu_kernels *kernels, void *memory, dg_form form, int32_t n, int64_t n_cols,
                   int64_t first_tile, int64_t n_tiles_in_all);

/* The form in which both weights can be multiplied with the same activations. */
dg_form dg_common_form(const dg_cpu_kernels *kernels, const dg_weight *a, const dg_weight *b);
dg_form dg_form_of(const dg_cpu_kernels *kernels, const dg_weight *weight);

/* Packs rms(x, norm) · factor, x (n, n_cols), into backend->packed; `norm` (n_cols). */
dg_rows dg_pack_normed(dg_backend *backend, dg_form form, const float *x, int32_t n, int64_t n_cols, const float *norm,
                       float factor);
/* Packs x (n, n_cols) into backend->packed. */
dg_rows dg_pack(dg_backend *backend, dg_form form, const float *x, int32_t n, int64_t n_cols);

/* Row from_row of `from` becomes row to_row of `to`, of the same integer form and width: cheaper than to pack it again.
 */
void dg_copy_packed(const dg_cpu_kernels *kernels, const dg_rows *from, int32_t from_row, const dg_rows *to,
                    int32_t to_row);

/* out (n, w->n_rows) = rows wᵀ */
void dg_matmul(dg_backend *backend, const dg_weight *w, const dg_rows *rows, float *out);

/* Columns of a strip of a panel in `form` whose rows have n_cols. */
int64_t dg_strip_cols(const dg_cpu_kernels *kernels, dg_form form, int64_t n_cols);

/* Output features of a matrix of `w`, from `first` on. */
typedef struct dg_features {
    const dg_weight *w;
    int64_t matrix, first;
} dg_features;

/* Sets panel->prefetch to the strip's share of the next panel, whose features begin at `f`: with the last strip of this
 * panel, all of the next one has been fetched. `f` has as many columns as the panel's weight, or no weight: then
 * nothing is fetched. */
void dg_prefetch(dg_panel *panel, const dg_features *f, int32_t lanes);

/* out (rows->n, n; stride out_stride) = rows · (n features)ᵀ, on the calling thread. `next`: what this thread will
 * probably want afterwards; it is fetched from memory meanwhile. */
void dg_multiply_features(const dg_cpu_kernels *kernels, dg_thread *thread, const dg_features *features, int64_t n,
                          const dg_features *next, const dg_rows *rows, float *out, int64_t out_stride);

/* hidden[:, first … first + DG_FEATURES) = gelu_tanh(rows gateᵀ) ∘ rows upᵀ, packed, on the calling thread. The rows of
 * `gate` and `up` that make feature i are gate_first + i and up_first + i. `next`: as above, rows of `gate`. */
typedef struct dg_gated {
    const dg_weight *gate, *up;
    int64_t matrix, gate_first, up_first, n_ff;
    dg_squares *hidden_squares; /* of the hidden features; or NULL */
} dg_gated;
void dg_multiply_gated(dg_backend *backend, int thread, const dg_gated *gated, int64_t first, const dg_features *next,
                       const dg_rows *rows, const dg_rows *hidden);

/* ---- collect.c: nothing happens, at no cost, unless the session collects ---- */

/* The rows of x (n, w->n_cols) meet `w`; with a `norm`, as rms(x, norm). */
void dg_collect_rows(dg_backend *backend, const dg_weight *w, const float *x, int32_t n, const float *norm);
/* Likewise, but each row meets the matrices of its chosen experts. */
void dg_collect_chosen(dg_backend *backend, const dg_weight *w, const float *x, int32_t n, const float *norm);

/* ---- the operations of backend.h, by file ---- */

void dg_cpu_collect(dg_backend *backend, dg_collector *collector);

void dg_cpu_mlp(dg_backend *backend, const dg_mlp *mlp, const float *x, int32_t n, float *out);
void dg_cpu_moe(dg_backend *backend, const dg_moe *moe, const float *x, int32_t n, float *out);

void dg_cpu_project_qkv(dg_backend *backend, const dg_layer *layer, const float *x, int32_t n, int32_t position,
                        float *q, const dg_kv *kv);
void dg_cpu_attend(dg_backend *backend, const dg_layer *layer, const float *q, int32_t n, int32_t position, bool causal,
                   const dg_kv_span *spans, int32_t n_spans, float *a);
void dg_cpu_project_output(dg_backend *backend, const dg_layer *layer, const float *a, int32_t n, float *x);

void dg_cpu_embed(dg_backend *backend, const int32_t *host_ids, int32_t n, float *x);
void dg_cpu_add_norm(dg_backend *backend, float *x, const float *d, int32_t n);
void dg_cpu_combine(dg_backend *backend, const dg_layer *layer, float *x, const float *d, const float *e, int32_t n,
                    float scalar);

void dg_cpu_logits(dg_backend *backend, const float *x, int32_t n, float *host_logits);
void dg_cpu_soft_embedding(dg_backend *backend, const float *host_z, int32_t n, float *soft);
void dg_cpu_begin_canvas(dg_backend *backend, dg_canvas *host_canvas);
void dg_cpu_denoise(dg_backend *backend, const float *x, float *soft);

/* The head's part of `denoise` for n rows, drawn with `uniforms` (n). */
typedef struct dg_head_result {
    int32_t *argmax;     /* (n) */
    int32_t *candidates; /* (n) one draw from softmax(z) */
    float *entropies;    /* (n) nats, of softmax(z) */
} dg_head_result;
void dg_cpu_sample(dg_backend *backend, const float *x, int32_t n, float temperature, const float *uniforms,
                   const dg_head_result *result, float *soft);

#endif
