/* The coarse operations that a device offers. forward.c is written against this and nothing else.
 *
 * A dg_backend is one session's view of a device: its threads or stream, and scratch memory sized at creation. Pointers
 * to activations and to the cache are addresses in the device's memory; forward.c only hands them on. Arguments named
 * `host_…` are in ordinary memory.
 *
 * Operations may run asynchronously. They do not fail one by one: a failure is kept, later operations do nothing, and
 * `finish` waits and reports it. `n` is a number of rows (tokens) up to dg_backend_params.max_rows; for what the head
 * does (logits, soft_embedding) up to the model's canvas_length, which max_rows is never below. */
#ifndef DG_BACKEND_H
#define DG_BACKEND_H

#include "device/canvas.h"
#include "device/collector.h"
#include "model/model.h"

typedef struct dg_backend dg_backend;

typedef struct dg_backend_params {
    const dg_model *model;
    int32_t n_threads;
    int32_t max_rows; /* largest n of any call */
    int32_t type_k, type_v;
    float soft_embedding_bound; /* probability mass that `sample` may drop per row of its soft embedding; 0: none */
    int32_t place;              /* the number in model->gpus of the GPU that this is for; 0 elsewhere */
} dg_backend_params;

/* Keys and values of one layer, head by head: k (n_kv_heads, capacity, k_dim), v (n_kv_heads, capacity, head_dim) in
 * the session's cache types; k_dim is dg_layer_k_dim. In layers without attn_v, k holds only the rotated dimensions:
 * n_rot/2 first halves, then n_rot/2 second halves. A row of q8_0 is padded to a whole number of blocks. */
typedef struct dg_kv {
    void *k;
    void *v;
    int64_t capacity; /* slots; the token at `position` is in slot position % capacity */
} dg_kv;

/* Tokens `position … position + n − 1` of a dg_kv; they may wrap around its end. */
typedef struct dg_kv_span {
    const dg_kv *kv;
    int32_t position;
    int32_t n;
} dg_kv_span;

/* Which memory: that of the layers of one place (model.h), or of activations, which go to and fro. A backend that
 * divides a model has several, the others one. */
enum { DG_PLACE_ALL = -2 /* the address is the first GPU's */ };

/* What is not the same for all denoising steps of a session, and not in the device's memory. */
typedef struct dg_step {
    int32_t position; /* of the canvas */
    bool conditioned; /* on the soft embedding of the step before */
    bool soft;        /* `denoise` makes a soft embedding */
} dg_step;

typedef enum dg_step_kind {
    DG_STEP_PLAIN,    /* the operations work as they are called */
    DG_STEP_CAPTURED, /* they are captured, and work at `end_step` */
    DG_STEP_LAUNCHED  /* the captured graph has been launched: they must not be called */
} dg_step_kind;

struct dg_backend_ops {
    /* The GPUs that the driver shows: at most `capacity`, and how many in `n`. What is free is what the driver says
     * without being asked for a context, which takes hundreds of megabytes on each; gpu_memory makes one, and says what
     * is left then. NULL on the CPU, as the next one. */
    dg_status (*list_gpus)(dg_gpu_info *gpus, int32_t capacity, int32_t *n, dg_error *error);
    dg_status (*gpu_memory)(int32_t number, uint64_t *free_bytes, dg_error *error);

    /* Brings every weight and float vector of `model` whose place is a GPU to model->gpus[place]. The model goes on
     * naming the mapped file; what the devices have made of it is found through model->backend_data. On failure the
     * model is as before. NULL where operations read the mapped file. */
    dg_status (*load_model)(dg_model *model, const dg_model_params *params, dg_error *error);
    void (*unload_model)(dg_model *model);

    /* Bytes of scratch that `create` will take. */
    uint64_t (*scratch_bytes)(const dg_backend_params *params);
    dg_status (*create)(const dg_backend_params *params, dg_backend **backend, dg_error *error);
    void (*free)(dg_backend *backend);

    /* Memory, zeroed. */
    dg_status (*allocate)(dg_backend *backend, int32_t place, uint64_t n_bytes, void **memory, dg_error *error);
    void (*release)(dg_backend *backend, void *memory);
    void (*upload)(dg_backend *backend, void *memory, const void *host_data, uint64_t n_bytes);
    void (*download)(dg_backend *backend, void *host_data, const void *memory, uint64_t n_bytes);
    /* From one GPU to another, behind all that `from` has been asked for, and before all that either is asked for from
     * now on. NULL where there are no others. */
    void (*send)(dg_backend *from, const void *memory, dg_backend *to, void *to_memory, uint64_t n_bytes);

    /* x (n, n_embd) = token_embd[ids] · √n_embd; of the canvas under way where host_ids is NULL */
    void (*embed)(dg_backend *backend, const int32_t *host_ids, int32_t n, float *x);

    /* out (n, n_embd) = mlp(rms(x, mlp->norm)) */
    void (*mlp)(dg_backend *backend, const dg_mlp *mlp, const float *x, int32_t n, float *out);

    /* x (n, n_embd) = rms(x + d), unweighted; d may be NULL */
    void (*add_norm)(dg_backend *backend, float *x, const float *d, int32_t n);

    /* With h = rms(x, attn_norm): q (n, n_heads, head_dim) = rope(rms(h Wq, q_norm)), and k and v of tokens
     * position … position + n − 1 into `kv`. In layers without attn_v the dimensions of q that are not rotated are
     * multiplied by attn_k_norm, so that they meet v in place of k. q may be NULL: only k and v are wanted. */
    void (*project_qkv)(dg_backend *backend, const dg_layer *layer, const float *x, int32_t n, int32_t position,
                        float *q, const dg_kv *kv);

    /* a (n, n_heads·head_dim) = softmax(q kᵀ) v over the keys of the spans (at most two: cache and canvas). `causal`:
     * query i is at `position + i` and sees keys at p ≤ position + i, in sliding layers only those with
     * position + i − p < sliding_window. Otherwise every query sees every key of the spans. */
    void (*attend)(dg_backend *backend, const dg_layer *layer, const float *q, int32_t n, int32_t position, bool causal,
                   const dg_kv_span *spans, int32_t n_spans, float *a);

    /* x (n, n_embd) += rms(a Woᵀ, post_attention_norm) */
    void (*project_output)(dg_backend *backend, const dg_layer *layer, const float *a, int32_t n, float *x);

    /* out (n, n_embd) = Σ over the chosen experts; router, choice and norm included (docs/model.md) */
    void (*moe)(dg_backend *backend, const dg_moe *moe, const float *x, int32_t n, float *out);

    /* x = scalar · (x + rms(rms(d, post_mlp_norm) + rms(e, post_moe_norm), post_ffn_norm)), all (n, n_embd) */
    void (*combine)(dg_backend *backend, const dg_layer *layer, float *x, const float *d, const float *e, int32_t n,
                    float scalar);

    /* host_logits (n, n_vocab) = softcap · tanh(rms(x, output_norm) Eᵀ / softcap) */
    void (*logits)(dg_backend *backend, const float *x, int32_t n, float *host_logits);

    /* soft (n, n_embd) = softmax(z) E · √n_embd, z (n, n_vocab) */
    void (*soft_embedding)(dg_backend *backend, const float *host_z, int32_t n, float *soft);

    /* A canvas begins as it stands on the host; from here on it is the device's. After each `denoise` and `finish` the
     * host's shows what has become of it, so it must stay where it is. */
    void (*begin_canvas)(dg_backend *backend, dg_canvas *host_canvas);

    /* The head and the decision of one step of the canvas under way. In vocabulary blocks: z = logits(x) /
     * temperature; per row its argmax, its entropy, the draw (the first token at which the running sum of softmax(z) in
     * token order exceeds dg_candidate_uniform), and soft (n, n_embd) = softmax(z) E · √n_embd unless NULL. Then all
     * that dg_canvas_settle does. x (canvas_length, n_embd) */
    void (*denoise)(dg_backend *backend, const float *x, float *soft);

    /* Frame the operations of one denoising step, dg_forward_decode and `denoise`, so that a device can capture
     * them once as a graph and launch that; NULL where none are. `end_step` belongs to DG_STEP_CAPTURED: false where
     * capturing has failed. Then nothing has been done, and the step must begin again; it will be plain. */
    dg_step_kind (*begin_step)(dg_backend *backend, const dg_step *step);
    bool (*end_step)(dg_backend *backend);

    /* Waits for everything; the first failure since the last `finish`. */
    dg_status (*finish)(dg_backend *backend, dg_error *error);

    /* From now on adds the squares of the activations that meet each weight to `collector`; NULL ends that. NULL where
     * the device cannot. */
    void (*collect)(dg_backend *backend, dg_collector *collector);
};

/* "cpu (avx512)": the kernels chosen for this machine, capped by the environment variable DGEMMA_ISA. */
extern const dg_backend_ops dg_cpu_backend;
/* split.c: the CPU and the GPUs of a model that is divided, each for the layers whose place it is. */
extern const dg_backend_ops dg_split_backend;
const char *dg_cpu_backend_name(void);

#endif
