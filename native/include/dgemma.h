/* dgemma: run DiffusionGemma, a block text-diffusion language model, from a GGUF file.
 *
 *     dg_model_open → dg_session_create → dg_session_prefill → dg_canvas_begin, dg_canvas_step … → dg_session_prefill …
 *
 * Conventions
 *   - Every call that can fail returns a dg_status; DG_OK is zero. The text of the failure is written to the
 *     caller's dg_error, which may be NULL. Nothing is printed, and the process is never ended.
 *   - Parameter structs begin with their own size. Fill them with the matching *_default function, then change
 *     what you need: a program compiled against an older header keeps working.
 *   - A model is read-only after opening and may serve many sessions on many threads. A session belongs to one
 *     thread at a time, except dg_session_cancel, which any thread may call.
 *   - Shapes in comments are rows first, slowest dimension first. Token ids are int32_t.
 *
 * The part between the two `cdef` lines is plain C declarations that binding generators can read as they are.
 */
#ifndef DGEMMA_H
#define DGEMMA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

/* cdef begin */

/* ---- Status and errors -------------------------------------------------------------------------------------- */

typedef enum dg_status {
    DG_OK = 0,
    DG_ERROR_ARGUMENT = 1,       /* an argument is out of its range */
    DG_ERROR_MODEL_FILE = 2,     /* the file is damaged, or not a model that this engine runs */
    DG_ERROR_CONTEXT_LENGTH = 3, /* the tokens do not fit the session's context */
    DG_ERROR_OUT_OF_MEMORY = 4,  /* host or device memory */
    DG_ERROR_BACKEND = 5,        /* the device failed, or is not there */
    DG_ERROR_CANCELLED = 6,      /* dg_session_cancel was called */
    DG_ERROR_IO = 7              /* a file could not be opened, read or written */
} dg_status;

typedef struct dg_error {
    dg_status status;
    char message[1024]; /* UTF-8, one line: what was wrong, what was expected, what to do */
} dg_error;

const char *dg_version(void); /* "major.minor.patch" */

/* Bounds of options, for programs that check before they call. */
enum { DG_MAX_THREADS = 1024, DG_MAX_DENOISING_STEPS = 100000, DG_MAX_STABILITY_THRESHOLD = 64, DG_MAX_GPUS = 16 };

/* ---- Tensor types, encoding and decoding -------------------------------------------------------------------- */

/* The numbers are GGUF's. */
typedef enum dg_type {
    DG_TYPE_F32 = 0,
    DG_TYPE_F16 = 1,
    DG_TYPE_Q4_0 = 2,
    DG_TYPE_Q4_1 = 3,
    DG_TYPE_Q5_0 = 6,
    DG_TYPE_Q5_1 = 7,
    DG_TYPE_Q8_0 = 8,
    DG_TYPE_Q2_K = 10,
    DG_TYPE_Q3_K = 11,
    DG_TYPE_Q4_K = 12,
    DG_TYPE_Q5_K = 13,
    DG_TYPE_Q6_K = 14,
    DG_TYPE_IQ2_XXS = 16,
    DG_TYPE_IQ2_XS = 17,
    DG_TYPE_IQ3_XXS = 18,
    DG_TYPE_IQ4_NL = 20,
    DG_TYPE_IQ3_S = 21,
    DG_TYPE_IQ2_S = 22,
    DG_TYPE_IQ4_XS = 23,
    DG_TYPE_BF16 = 30,
    DG_TYPE_NVFP4 = 40
} dg_type;

typedef struct dg_type_info {
    const char *name;    /* as in the gguf package, lower case: "q4_0" */
    int32_t block_size;  /* elements in a block; a row is a whole number of blocks */
    int32_t block_bytes; /* bytes of a block */
    bool encodes;        /* dg_quantize writes it */
    bool decodes;        /* dg_dequantize and the engine read it */
} dg_type_info;

/* Describes a type. DG_ERROR_ARGUMENT for a number that no type of this engine has. */
dg_status dg_type_describe(int32_t type, dg_type_info *info, dg_error *error);

/* Re-encodes `src` (n_rows, n_cols) of type `src_type` as `dst_type`, on `n_threads` threads (0: one a physical core).
 *
 * importance  weight of each column's squared error, (n_cols), or NULL: all alike.
 * multiplier  NVFP4 only: receives the tensor's float32 multiplier m, to be stored as its `.scale`; a decoded value
 *             is E2M1 · group scale · m. NULL: encode with m = 1 (less accurate: see docs/format.md).
 * n_cols must be a multiple of dst_type's block size. The result depends on neither n_threads nor the machine. */
dg_status dg_quantize(int32_t src_type, const void *src, int32_t dst_type, void *dst, int64_t n_rows, int64_t n_cols,
                      const float *importance, float *multiplier, int32_t n_threads, dg_error *error);

/* Decodes `src` (n_rows, n_cols) into float32. The NVFP4 multiplier is not applied. */
dg_status dg_dequantize(int32_t type, const void *src, float *dst, int64_t n_rows, int64_t n_cols, int32_t n_threads,
                        dg_error *error);

/* ---- GGUF files --------------------------------------------------------------------------------------------- */

typedef struct dg_file dg_file; /* a checked, read-only, memory-mapped GGUF file, or all shards of one */

typedef enum dg_value_type { /* the numbers are GGUF's */
                             DG_VALUE_UINT8 = 0,
                             DG_VALUE_INT8 = 1,
                             DG_VALUE_UINT16 = 2,
                             DG_VALUE_INT16 = 3,
                             DG_VALUE_UINT32 = 4,
                             DG_VALUE_INT32 = 5,
                             DG_VALUE_FLOAT32 = 6,
                             DG_VALUE_BOOL = 7,
                             DG_VALUE_STRING = 8,
                             DG_VALUE_ARRAY = 9,
                             DG_VALUE_UINT64 = 10,
                             DG_VALUE_INT64 = 11,
                             DG_VALUE_FLOAT64 = 12
} dg_value_type;

typedef struct dg_value {
    dg_value_type type;         /* DG_VALUE_ARRAY for arrays */
    dg_value_type element_type; /* of an array's elements; equal to `type` otherwise */
    int64_t n;                  /* elements of an array; 1 otherwise */
    const void *data;           /* as in the file: little endian, unaligned. A string is its bytes, without the length;
                                   an array of strings is a run of (uint64_t length, bytes) */
    size_t n_bytes;             /* length of `data` */
} dg_value;

typedef struct dg_tensor_info {
    const char *name; /* ends with a zero byte */
    int32_t type;     /* a dg_type */
    int32_t n_dims;
    int64_t shape[4]; /* rows first: (…, n_rows, n_cols); unused trailing entries are 1 */
    uint64_t n_bytes;
    const void *data; /* in the mapped file */
} dg_tensor_info;

/* Opens `path` and, where it is the first shard of several, the others beside it. Checks everything before it
 * returns: sizes, offsets, types, text. Memory and time are bounded by the file's length. */
dg_status dg_file_open(const char *path, dg_file **file, dg_error *error);
void dg_file_close(dg_file *file);
int64_t dg_file_n_keys(const dg_file *file);
int64_t dg_file_n_tensors(const dg_file *file);
uint64_t dg_file_n_bytes(const dg_file *file); /* all shards together */
/* 0 ≤ index < n; `name` ends with a zero byte. */
void dg_file_key(const dg_file *file, int64_t index, const char **name, dg_value *value);
bool dg_file_find_key(const dg_file *file, const char *name, dg_value *value);
void dg_file_tensor(const dg_file *file, int64_t index, dg_tensor_info *info);
bool dg_file_find_tensor(const dg_file *file, const char *name, dg_tensor_info *info);
/* Bytes [first, first + n) of a tensor's data, read from the file and not through the mapping: a file that is cut short
 * meanwhile is an error here, where touching the mapping would end the process, and nothing stays in memory. */
dg_status dg_file_read(const dg_file *file, const char *name, uint64_t first, uint64_t n, void *bytes, dg_error *error);
/* DG_ERROR_MODEL_FILE where a mapped file's size or time of change is no longer what it was when it was opened, or
 * where a call found a part of it missing. */
dg_status dg_file_check(const dg_file *file, dg_error *error);

/* ---- Models ------------------------------------------------------------------------------------------------- */

typedef struct dg_model dg_model;

typedef enum dg_backend_kind { DG_BACKEND_AUTO = 0, DG_BACKEND_CPU = 1, DG_BACKEND_CUDA = 2 } dg_backend_kind;

typedef struct dg_backend_info {
    size_t size;                      /* sizeof(dg_backend_info), set by the caller */
    char name[128];                   /* "cpu (avx512-vnni)" */
    uint64_t free_bytes, total_bytes; /* of the GPU that would be used; 0 and 0 for the CPU */
} dg_backend_info;

/* Whether a backend can be used at all, without a model. DG_ERROR_BACKEND with the reason where it cannot. */
dg_status dg_backend_check(dg_backend_kind kind, dg_backend_info *out, dg_error *error);

typedef struct dg_gpu_info {
    int32_t number;     /* as dg_model_params.device takes it: among those that CUDA_VISIBLE_DEVICES shows */
    char name[64];      /* "NVIDIA GeForce RTX 4090" */
    char uuid[48];      /* "GPU-…" */
    int32_t capability; /* compute capability times ten: 89 */
    int32_t n_multiprocessors;
    uint64_t free_bytes, total_bytes;
    char obstacle[160]; /* why it cannot be used; "" where it can */
} dg_gpu_info;

/* The GPUs that CUDA shows, usable or not: fills at most `capacity` and returns in `n` how many. DG_ERROR_BACKEND with
 * the reason where there is no CUDA backend, no driver or no GPU. */
dg_status dg_list_gpus(dg_gpu_info *gpus, int32_t capacity, int32_t *n, dg_error *error);

/* Called while a long call works, with the share done in [0, 1]. Returning false cancels the call. */
typedef bool (*dg_progress_callback)(float done, void *user);

typedef struct dg_model_params {
    size_t size;             /* sizeof(dg_model_params) */
    dg_backend_kind backend; /* AUTO: a GPU where one can serve, the CPU otherwise */
    int32_t n_gpu_layers;    /* the last so many layers are kept on the GPU, the others run on the CPU; more than there
                                are: all; −1: as many as fit, beside a session with the parameters below */
    int32_t n_cpu_moe; /* the experts of the last so many layers stay on the CPU; with n_gpu_layers −1, at least */
    bool use_mmap;     /* false: read the file into memory */
    dg_progress_callback progress;
    void *user;
    const struct dg_session_params *session; /* what sessions will be created with; NULL: the defaults */
    const char *device; /* GPUs, separated by commas, the first of which holds embedding and head: each a number, a
                           uuid, or a part of a name that no other has; "none": the CPU. NULL or "": the one with the
                           most free memory, and where the model does not fit it, all of them */
    const char *tensor_split; /* how layers are divided over several GPUs: proportions separated by commas, "3,1", or
                                 "auto", by what is free. NULL or "": over the fewest, that is one where all fits */
} dg_model_params;

dg_model_params dg_model_params_default(void);

typedef struct dg_sampling {
    int32_t max_denoising_steps; /* ≥ 1, ≤ DG_MAX_DENOISING_STEPS */
    float t_min, t_max;          /* temperature at the last and the first step; 0 < t_min ≤ t_max */
    float entropy_bound;         /* nats; > 0 */
    int32_t stability_threshold; /* steps that the draft must stay the same; ≥ 0, ≤ DG_MAX_STABILITY_THRESHOLD */
    float confidence_threshold;  /* nats; the mean entropy must fall below it; > 0 */
} dg_sampling;

typedef struct dg_model_info {
    size_t size; /* sizeof(dg_model_info), set by the caller */
    int32_t n_layers;
    int32_t n_embd; /* hidden size */
    int32_t n_vocab;
    int32_t n_heads;
    int32_t n_ff; /* width of the dense MLP */
    int32_t n_experts;
    int32_t n_experts_used;
    int32_t n_ff_expert;
    int32_t sliding_window;
    int32_t n_sliding_layers;
    int32_t canvas_length;
    int32_t context_length; /* what the model was trained for */
    int64_t n_parameters;
    uint64_t weight_bytes;
    dg_sampling sampling; /* the file's own, or the released model's */
    int32_t n_end_tokens;
    int32_t end_tokens[16];   /* ids that end an answer */
    dg_backend_kind backend;  /* the one in use */
    const char *backend_name; /* "cpu (avx512-vnni)", lives as long as the model */
    const char *backend_note; /* why a wanted GPU is not used, or how the model is divided; "" otherwise */
    int32_t n_gpu_layers;     /* the division in use; 0 and 0 on the CPU */
    int32_t n_cpu_moe;
    const char *file_note;           /* what the file leaves open, and how it was understood; "" otherwise */
    int32_t n_gpus;                  /* that the model is divided over, 0 on the CPU; */
    int32_t gpus[DG_MAX_GPUS];       /* their numbers, */
    int32_t gpu_layers[DG_MAX_GPUS]; /* and how many layers each has */
} dg_model_info;

/* Whether dg_model_open would open the file for the CPU: reads all its keys, norms and scales, and no other weights.
 * For whoever writes such files. */
dg_status dg_model_check(const char *path, dg_error *error);

dg_status dg_model_open(const char *path, const dg_model_params *params, dg_model **model, dg_error *error);
/* Sessions keep the model alive: it goes when the last of them is freed. */
void dg_model_close(dg_model *model);
void dg_model_describe(const dg_model *model, dg_model_info *info);
const dg_file *dg_model_file(const dg_model *model);

/* ---- Sessions ----------------------------------------------------------------------------------------------- */

typedef struct dg_session dg_session; /* one conversation: cache, scratch, random state */

typedef struct dg_session_params {
    size_t size;       /* sizeof(dg_session_params) */
    int32_t n_ctx;     /* tokens of context, the canvas included; 0: the model's own */
    int32_t n_batch;   /* prompt tokens encoded at a time */
    int32_t n_threads; /* 0: one a physical core */
    int32_t type_k;    /* of the cache: DG_TYPE_F32, F16, BF16 or Q8_0 */
    int32_t type_v;
    float soft_embedding_bound; /* probability mass that the soft embedding may drop per position; 0: none */
    int32_t n_rewind; /* tokens that dg_session_truncate can always take back: an answer, where the next turn begins
                         before it. The sliding layers keep so many beyond their window. 0 to n_ctx */
} dg_session_params;

dg_session_params dg_session_params_default(void);

typedef struct dg_memory {
    uint64_t weights; /* bytes of the mapped file */
    uint64_t cache;   /* bytes of keys and values at n_ctx */
    uint64_t scratch; /* bytes of working memory */
} dg_memory;

/* What a session with these parameters takes, without creating it. */
dg_status dg_session_memory(const dg_model *model, const dg_session_params *params, dg_memory *memory, dg_error *error);

/* What one of several GPUs holds of a model and of one session of it. */
typedef struct dg_gpu_share {
    uint64_t available; /* given: bytes free on it */
    float proportion;   /* given: of the layers; 0 for all GPUs: by what is free */
    int32_t n_layers;   /* returned, as all that follows; the layers follow each other from GPU to GPU */
    uint64_t weights, cache, scratch, reserve, total; /* as in dg_gpu_plan */
} dg_gpu_share;

/* What a model and one session of it take on a GPU, or on several together. */
typedef struct dg_gpu_plan {
    size_t size;          /* sizeof(dg_gpu_plan) */
    uint64_t available;   /* given: bytes free on the GPU; only looked at for n_gpu_layers −1, and with n_gpus 0 */
    int32_t n_gpu_layers; /* given and returned, as in dg_model_params */
    int32_t n_cpu_moe;
    uint64_t weights; /* returned: bytes of the weights on the GPU */
    uint64_t cache;   /* keys and values of the layers on the GPU */
    uint64_t scratch; /* a session's working memory */
    uint64_t reserve; /* left to captured steps, the kernels' code, and rounding */
    uint64_t total;
    int32_t n_gpus; /* given: how many of the following; 0: one, with `available` */
    dg_gpu_share gpus[DG_MAX_GPUS];
} dg_gpu_plan;

/* Plans without a GPU at hand. DG_ERROR_OUT_OF_MEMORY where not even the embedding would fit. */
dg_status dg_model_plan_gpu(const dg_model *model, const dg_session_params *session, dg_gpu_plan *plan,
                            dg_error *error);

dg_status dg_session_create(dg_model *model, const dg_session_params *params, dg_session **session, dg_error *error);
void dg_session_free(dg_session *session);

/* Makes the call that is running in the session, or the next one, return DG_ERROR_CANCELLED; at the latest after one
 * denoising step. Any thread may call it. The session stays usable: its cache holds what was encoded before. */
void dg_session_cancel(dg_session *session);
/* Takes back a cancellation that no call has seen yet. */
void dg_session_resume(dg_session *session);

int32_t dg_session_n_ctx(const dg_session *session);
int32_t dg_session_n_threads(const dg_session *session);     /* that it works with on the CPU */
int32_t dg_session_n_past(const dg_session *session);        /* tokens in the cache */
const int32_t *dg_session_tokens(const dg_session *session); /* (n_past) their ids */

/* Encodes `tokens` (n) causally and appends them to the cache. DG_ERROR_CONTEXT_LENGTH, and nothing is changed, where
 * they would not leave room for a canvas. `progress` may be NULL. When cancelled the chunks already encoded stay. */
dg_status dg_session_prefill(dg_session *session, const int32_t *tokens, int32_t n, dg_progress_callback progress,
                             void *user, dg_error *error);

/* Forgets all tokens from position `n` on. The sliding layers keep only their window, n_rewind tokens and one batch:
 * where they no longer hold what position `n` needs, everything is forgotten and n_past becomes 0. Ask
 * dg_session_n_past. */
dg_status dg_session_truncate(dg_session *session, int32_t n, dg_error *error);

/* Writes or reads the cache. A file from another model or with other cache types is refused. */
dg_status dg_session_save(dg_session *session, const char *path, dg_error *error);
dg_status dg_session_load(dg_session *session, const char *path, dg_error *error);

/* One decoder pass: soft-capped float32 logits (canvas_length, n_vocab) at temperature 1 of the canvas `tokens`
 * (canvas_length) behind the cache. `self_conditioning_logits` (canvas_length, n_vocab): the previous step's logits
 * divided by its temperature, or NULL on a first step. For research and tests; generation never makes this buffer. */
dg_status dg_session_canvas_logits(dg_session *session, const int32_t *tokens, const float *self_conditioning_logits,
                                   float *logits, dg_error *error);

/* ---- Denoising a canvas ------------------------------------------------------------------------------------- */

/* Draws made elsewhere, replayed in place of the session's own: to compare with another implementation, and in tests.
 */
typedef struct dg_noise {
    const int32_t *initial;    /* (canvas_length) the first canvas */
    const int32_t *candidates; /* (n_steps, canvas_length) the tokens drawn from softmax(z) */
    const int32_t *renoise;    /* (n_steps, canvas_length) the fresh tokens where nothing was accepted */
    int32_t n_steps;           /* a step beyond it is DG_ERROR_ARGUMENT */
} dg_noise;

typedef struct dg_canvas_params {
    size_t size; /* sizeof(dg_canvas_params) */
    dg_sampling sampling;
    uint64_t seed;
    int32_t canvas;        /* number of the canvas in this answer, from 0: part of the random counter */
    const int32_t *start;  /* (canvas_length) canvas to start from, or NULL: random tokens */
    const int32_t *pinned; /* (canvas_length) tokens that stay as they are, −1 where free; or NULL */
    const dg_noise *noise; /* or NULL; must live until the last step */
} dg_canvas_params;

dg_canvas_params dg_canvas_params_default(const dg_model *model);

typedef struct dg_draft {
    int32_t step;       /* from 1 */
    int32_t n_accepted; /* positions whose candidate was accepted in this step */
    float temperature;
    float mean_entropy;     /* nats, of softmax(z), over the free positions */
    bool done;              /* settled, or the last step: `tokens` is the canvas to commit */
    bool settled;           /* stable and confident, not merely out of steps */
    const int32_t *tokens;  /* (canvas_length) the most probable tokens */
    const int32_t *canvas;  /* (canvas_length) the working canvas of the next step */
    const float *entropies; /* (canvas_length) nats */
} dg_draft;                 /* pointers are valid until the session's next call */

/* Begins a canvas at n_past. Reads the cache, never writes it: commit the canvas with dg_session_prefill. */
dg_status dg_canvas_begin(dg_session *session, const dg_canvas_params *params, dg_error *error);
/* Runs one denoising step. DG_ERROR_ARGUMENT without a canvas under way (before begin, or after `done`). */
dg_status dg_canvas_step(dg_session *session, dg_draft *draft, dg_error *error);

/* ---- A whole answer, for programs without a loop of their own ------------------------------------------------ */

typedef enum dg_finish { DG_FINISH_END_TOKEN = 0, DG_FINISH_LENGTH = 1, DG_FINISH_CALLBACK = 2 } dg_finish;

/* Return false to stop. */
typedef bool (*dg_draft_callback)(int32_t canvas, const dg_draft *draft, void *user);
typedef bool (*dg_commit_callback)(int32_t canvas, const int32_t *tokens, int32_t n, void *user);

typedef struct dg_generate_params {
    size_t size; /* sizeof(dg_generate_params) */
    dg_sampling sampling;
    uint64_t seed;
    int32_t max_tokens;           /* ≥ 1; the capacity of `tokens` */
    dg_draft_callback on_draft;   /* after every step, or NULL */
    dg_commit_callback on_commit; /* with the tokens of each canvas, cut at an end token and max_tokens, or NULL */
    void *user;
} dg_generate_params;

dg_generate_params dg_generate_params_default(const dg_model *model);

typedef struct dg_generated {
    int32_t n_tokens; /* written to `tokens`; the end token itself is left out */
    int32_t n_canvases;
    int32_t n_steps; /* over all canvases */
    dg_finish finish;
} dg_generated;

/* Continues the cache until an end token, max_tokens, a full context or a callback stops it. */
dg_status dg_session_generate(dg_session *session, const dg_generate_params *params, int32_t *tokens,
                              dg_generated *generated, dg_error *error);

/* ---- Measuring ---------------------------------------------------------------------------------------------- */

typedef struct dg_operation {
    const char *name; /* "experts", "attention", "head", … */
    int64_t calls;
    double seconds;
    double flop;  /* counted, not estimated from time: two per multiply-add */
    double bytes; /* weights and cache read */
} dg_operation;

/* Time spent per operation since creation or the last reset; returns how many there are, fills at most `capacity`. */
int32_t dg_session_operations(const dg_session *session, dg_operation *operations, int32_t capacity);
void dg_session_reset_operations(dg_session *session);

/* The activations that met one weight: what an importance matrix is made of. */
typedef struct dg_activations {
    const char *name;      /* of the tensor; as long as the model */
    int64_t n_matrices;    /* 1, or the number of experts */
    int64_t n_cols;        /* input features */
    const double *sums;    /* (n_matrices, n_cols) Σ x² over rows x of activations */
    const int64_t *counts; /* (n_matrices) rows x; an expert's are those that were sent to it */
} dg_activations;

/* From now on every prefill, canvas step and canvas_logits of the session adds the activations that each weight met;
 * those of the embedding table are the head's. Starts at zero, also when called again. DG_ERROR_BACKEND where the
 * device cannot. Costs about a tenth of a step while it is on, and nothing otherwise. */
dg_status dg_session_collect_begin(dg_session *session, dg_error *error);
/* Returns how many weights there are, fills at most `capacity`, in the order of the file. Pointers are valid until the
 * session's next collect_begin, collect_end or free. 0 where it does not collect. */
int32_t dg_session_collected(const dg_session *session, dg_activations *activations, int32_t capacity);
void dg_session_collect_end(dg_session *session);

/* Puts `n` tokens behind the cache whose keys and values are random rather than encoded: a step takes as long behind
 * them as behind a prompt of that length, which may take minutes to encode. What it predicts means nothing. */
dg_status dg_session_append_random(dg_session *session, int32_t n, dg_error *error);

typedef struct dg_limits {
    double read_gb_per_s;    /* reading a buffer far larger than the caches */
    double int8_gop_per_s;   /* int8 multiply-adds, two operations each; 0 where the machine has no such unit */
    double bf16_gflop_per_s; /* likewise */
    double f32_gflop_per_s;
} dg_limits;

/* Measures this machine's limits with `n_threads` threads (0: one a physical core); takes about a second. */
dg_status dg_measure_limits(int32_t n_threads, dg_limits *limits, dg_error *error);

/* cdef end */

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

#ifdef __cplusplus
}
#endif

#endif
