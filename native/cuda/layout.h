/* How the CUDA backend divides device memory: the arena of a model's weights, and a session's scratch.
 *
 * Plain C without CUDA: the engine holds it as well, so that it can say what a model takes on a machine without a GPU
 * (gpu_plan.h). The kernels' own constants that decide about sizes stand here. */
#ifndef DG_CUDA_LAYOUT_H
#define DG_CUDA_LAYOUT_H

#ifdef __cplusplus
#include <atomic> /* before model.h, which is C inside of the block below */
extern "C" {
#endif

#include "device/backend.h"

enum {
    DG_CUDA_TILE_ROWS = 16,    /* of a weight tile */
    DG_CUDA_PRODUCT_ROWS = 64, /* of a block of a dense product: matmul.cuh */
    DG_CUDA_PRODUCT_TOKENS = 128,
    DG_CUDA_PRODUCT_SPLITS = 8, /* most shares of the columns, of a dense product */
    DG_CUDA_HOPPER_ROWS = 128,  /* of a block of a dense product: hopper/product.cuh */
    DG_CUDA_HOPPER_TOKENS = 256,
    DG_CUDA_ATTENTION_PARTIALS = 2,   /* shares of the keys, of whose results all rows' fit into the scratch */
    DG_CUDA_WORK_TOKENS = 32,         /* of a block of an expert's product */
    DG_CUDA_MAX_LOOKS = 32,           /* vocabulary blocks that a narrow distribution may lie in */
    DG_CUDA_VOCABULARY_BLOCK = 64,    /* tokens */
    DG_CUDA_VOCABULARY_CHUNK = 65536, /* tokens that the dense soft embedding takes at a time */
    DG_CUDA_MAX_ROW_COLUMNS = 8192,   /* of a row that is normed or prepared for a product: rows.cuh */
    DG_CUDA_MAX_CANVAS = 2048,        /* tokens, of which one block settles all */
    DG_CUDA_SOFT_SPLITS = 3,
    DG_CUDA_SOFT_TOKENS = 128, /* of a block of the dense soft embedding */
};

/* ---- Weights -------------------------------------------------------------------------------------------------- */

/* NVFP4 in device memory as the matrix units of sm_120 and sm_121 read it: a type of the backend's own, beside dg_type.
 */
#define DG_CUDA_TYPE_FP4 (1 << 16 | DG_TYPE_NVFP4)

/* X(type, its format in formats.cuh, columns and bytes of a tile, bytes of the header of each four tiles) */
#define DG_CUDA_FORMATS(X)                                                                                             \
    X(DG_TYPE_Q4_0, FormatQ4_0, 64, 576, 0)                                                                            \
    X(DG_TYPE_Q4_1, FormatQ4_1, 64, 640, 0)                                                                            \
    X(DG_TYPE_Q5_0, FormatQ5_0, 64, 704, 0)                                                                            \
    X(DG_TYPE_Q5_1, FormatQ5_1, 64, 768, 0)                                                                            \
    X(DG_TYPE_Q8_0, FormatQ8_0, 64, 1088, 0)                                                                           \
    X(DG_TYPE_Q2_K, FormatQ2K, 64, 320, 64)                                                                            \
    X(DG_TYPE_Q3_K, FormatQ3K, 64, 448, 32)                                                                            \
    X(DG_TYPE_Q4_K, FormatQ4K, 64, 576, 64)                                                                            \
    X(DG_TYPE_Q5_K, FormatQ5K, 64, 704, 64)                                                                            \
    X(DG_TYPE_Q6_K, FormatQ6K, 64, 832, 32)                                                                            \
    X(DG_TYPE_IQ4_NL, FormatIq4Nl, 64, 576, 0)                                                                         \
    X(DG_TYPE_IQ4_XS, FormatIq4Xs, 64, 544, 32)                                                                        \
    X(DG_TYPE_NVFP4, FormatNvfp4, 64, 576, 0)                                                                          \
    X(DG_CUDA_TYPE_FP4, FormatFp4, 64, 576, 0)                                                                         \
    X(DG_TYPE_F16, FormatF16, 16, 512, 0)                                                                              \
    X(DG_TYPE_BF16, FormatBf16, 16, 512, 0)                                                                            \
    X(DG_TYPE_F32, FormatF32, 16, 1024, 0)

/* Whether weights of a type meet activations in floats. */
#define DG_CUDA_IS_FLOAT(type) ((type) == DG_TYPE_F16 || (type) == DG_TYPE_BF16 || (type) == DG_TYPE_F32)

/* A tile of formats.cuh: DG_CUDA_TILE_ROWS × n_cols values. */
typedef struct dg_cuda_tile {
    int32_t n_cols;
    int32_t bytes, header_bytes;
} dg_cuda_tile;

/* How weights of `type` are stored; false where there are no kernels for them. */
bool dg_cuda_tile_of(int32_t type, dg_cuda_tile *tile);

/* Bytes of a matrix in tiles; 0 where there are no kernels for its type. */
uint64_t dg_cuda_matrix_bytes(int32_t type, int64_t n_rows, int64_t n_cols);

/* One thing to be uploaded. */
typedef struct dg_cuda_item {
    const void *source;  /* in the mapped file */
    int32_t type;        /* there */
    int32_t stored_type; /* in device memory: DG_CUDA_TYPE_FP4, or the same */
    int64_t n_matrices, n_rows, n_cols;
    uint64_t row_bytes; /* in the file; 0: a vector of n_cols floats, copied as it is */
    uint64_t matrix_bytes;
    uint64_t offset, bytes; /* in the arena */
    const char *what;
} dg_cuda_item;

typedef struct dg_cuda_weights {
    dg_cuda_item *items; /* (n); to be freed with free() */
    int32_t n, capacity;
    uint64_t frequencies; /* offset in the arena: (n_layers, frequency_stride) floats, of the rotation */
    int32_t frequency_stride;
    uint64_t bytes; /* of the arena */
    bool fp4;       /* the device multiplies FP4 */
} dg_cuda_weights;

/* Plans the arena of everything in `model` whose place is `place`: embedding, self-conditioning and head are at place
 * 0. `fp4`: whether the device multiplies FP4. */
dg_status dg_cuda_plan_weights(const dg_model *model, int32_t place, bool fp4, dg_cuda_weights *plan, dg_error *error);
/* The arena's bytes alone. */
uint64_t dg_cuda_weight_bytes(const dg_model *model, int32_t place);

/* While weights are loaded: two buffers on the device through which they come. Gone before a session is created. */
#define DG_CUDA_STAGING_BYTES (UINT64_C(32) << 20)

/* ---- Scratch of a session ------------------------------------------------------------------------------------- */

/* Rows of activations as the products read them, for one kind of weights or another: formats.cuh. NULL where no weight
 * has the kind. */
typedef struct dg_cuda_activations {
    int8_t *codes;           /* (n, k_tiles, 2, 32) */
    float *scales;           /* (n, k_tiles, 2) */
    float *sums;             /* (n, k_tiles, 2) scale · Σ codes: what a weight's minimum is multiplied by */
    float *values;           /* (n, k_tiles, 16) */
    uint8_t *terms;          /* (n, k_tiles, 2, 32) */
    uint32_t *term_scales;   /* (n, k_tiles, 2) */
    float *term_multipliers; /* (n) what a row's products are to be multiplied by */
    uint16_t *halves;        /* (n, k_tiles, 64) float16, where dg_cuda_hopper_wanted */
    float *half_multipliers; /* (n) as term_multipliers: a power of two */
} dg_cuda_activations;

typedef struct dg_cuda_moe_scratch {
    int32_t *ids;               /* (n, n_used) the chosen experts of each token */
    float *shares;              /* (n, n_used) */
    int32_t *slots;             /* (n, n_used) where in the sorted order a choice stands */
    int32_t *slot_tokens;       /* (n · n_used) whose choice stands there */
    int32_t *work;              /* (max_tiles, 3): expert, first slot, number of slots; then the number of entries */
    dg_cuda_activations hidden; /* (n · n_used, n_ff) */
    float *out;                 /* (n · n_used, n_embd) */
} dg_cuda_moe_scratch;

/* Of one token's distribution softmax(z). */
typedef struct dg_cuda_head_row {
    float maximum;       /* of z */
    float denominator;   /* Σ exp(z − maximum) */
    int32_t vocab_block; /* of the draw */
    float remainder;     /* what of the draw's running sum, in units of the denominator, falls into that block */
    int32_t n_looks;     /* blocks that the soft embedding looks into; −1: all, densely */
    int32_t looks[DG_CUDA_MAX_LOOKS];
} dg_cuda_head_row;

typedef struct dg_cuda_head_scratch {
    float *statistics;      /* (n, n_vocab_blocks, 4): see head.cu. In the place of `chunk` */
    dg_cuda_head_row *rows; /* (n) */
    float *look_weights;    /* (n, DG_CUDA_MAX_LOOKS, DG_CUDA_VOCABULARY_BLOCK) probabilities */
    int32_t *any_dense;     /* (n / DG_CUDA_SOFT_TOKENS) whether a token of the block needs the dense form */
    uint16_t *chunk;        /* (n, DG_CUDA_VOCABULARY_CHUNK) float16; see soften.cu */
    float *soft_sums;       /* (DG_CUDA_SOFT_SPLITS, n, n_embd) */
} dg_cuda_head_scratch;

/* A canvas under way. One copy brings all that begins with it, from `rules` to `entropies`; another fetches what a step
 * has made of it, from `progress` on. On the host these are in pinned memory, laid out in the same way. */
typedef struct dg_cuda_canvas {
    dg_canvas_rules *rules;
    int32_t *pinned; /* (n) fields are those of dg_canvas */
    dg_canvas_progress *progress;
    int32_t *ids;        /* (n) */
    int32_t *draft;      /* (n) */
    float *entropies;    /* (n) */
    int32_t *argmax;     /* (n) of the head */
    int32_t *candidates; /* (n) */
    int32_t *replayed;   /* (2, n) candidates and fresh tokens in place of drawn ones, where rules->replayed */
} dg_cuda_canvas;

typedef struct dg_cuda_scratch {
    int32_t *ids;          /* (max_rows) */
    dg_cuda_activations x; /* (max_rows, widest input of a product) */
    dg_cuda_canvas canvas;
    /* No operation uses two of the following: they lie in the same place. Only the last result of a dense product waits
     * there while the experts are at work, for the sum with theirs. */
    struct {
        float *partials; /* (partials_floats) */
        int64_t partials_floats;
        int64_t kept_floats; /* of them, those whose place the experts' scratch leaves alone */
    } products;
    struct {
        float *partials; /* (partials_floats) */
        int64_t partials_floats;
    } attention;
    struct {                        /* NULL where every expert is on the CPU */
        dg_cuda_activations x;      /* (max_rows, n_embd) of gates and up projections */
        dg_cuda_activations router; /* (max_rows, n_embd) of the router. In the place of `moe.out`, as its logits */
        float *partials;            /* (partials_floats) of its logits */
        int64_t partials_floats;
        dg_cuda_moe_scratch moe;
    } experts;
    dg_cuda_head_scratch head;
} dg_cuda_scratch;

/* Whether the environment variable DGEMMA_CUDA_HOPPER is 1: GPUs of compute capability 9.0 shall use kernels of their
 * own (hopper/), and scratch is laid out for them. */
bool dg_cuda_hopper_wanted(void);

/* Divides the memory at `base` among the fields of `scratch`, as far as params->place needs them; with base NULL it
 * only counts. Returns the bytes in all. More multiprocessors may need more: products are split over more blocks. */
uint64_t dg_cuda_lay_out_scratch(const dg_backend_params *params, int32_t n_multiprocessors, char *base,
                                 dg_cuda_scratch *scratch);

/* Divides the memory at `base`, which must be aligned, among the fields of a canvas of n tokens. Returns the bytes in
 * all. */
uint64_t dg_cuda_lay_out_canvas(int32_t n, char *base, dg_cuda_canvas *canvas);

/* Most entries of the experts' work list. */
int64_t dg_cuda_moe_work_entries(const dg_model *model, int64_t n);

#ifdef __cplusplus
}
#endif
#endif
