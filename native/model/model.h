/* Hyperparameters and weights of one model, bound once from a GGUF file: hparams.c reads the keys, bind.c finds the
 * tensors, and engine/open.c chooses the device.
 *
 * After dg_model_open nobody looks a tensor up by name: the structs below are the model. */
#ifndef DG_MODEL_H
#define DG_MODEL_H

#ifdef __cplusplus /* the CUDA backend */
#include <atomic>
using std::atomic_int;
#else
#include <stdatomic.h>
#endif

#include "dgemma.h"

/* A matrix, or a stack of matrices of one shape (the experts), in whatever type the file has. */
typedef struct dg_weight {
    const void *data;      /* (n_matrices, n_rows, n_cols), encoded; NULL where the model has no such weight */
    const float *scale;    /* NULL, or the multiplier of each matrix, (n_matrices): NVFP4 */
    int32_t type;          /* a dg_type */
    int32_t n_matrices;    /* 1, or the number of experts */
    int64_t n_rows;        /* output features */
    int64_t n_cols;        /* input features */
    uint64_t matrix_bytes; /* of one matrix */
    int32_t index;         /* of its tensor in the file: a backend finds what it has made of the weight by it */
} dg_weight;

/* A place that is no GPU: weights stay in the mapped file, and operations run on the CPU. */
enum { DG_PLACE_CPU = -1 };

/* Gate, up and down of a gated MLP: (gelu_tanh(x gateᵀ) ∘ x upᵀ) downᵀ. */
typedef struct dg_mlp {
    const float *norm; /* (n_embd) applied to x first */
    dg_weight gate;    /* (n_ff, n_embd) */
    dg_weight up;      /* (n_ff, n_embd) */
    dg_weight down;    /* (n_embd, n_ff) */
    int32_t place;     /* see dg_layer */
    int32_t index;     /* of the layer; n_layers: the self-conditioning's */
} dg_mlp;

typedef struct dg_moe {
    const float *router;       /* (n_experts, n_embd) */
    const float *router_scale; /* (n_embd) */
    const float *norm;         /* (n_embd) before the experts; the router sees its own, unweighted norm */
    dg_weight gate_up;         /* (n_experts, 2·n_ff_expert, n_embd), gate rows first; or NULL data and … */
    dg_weight gate, up;        /* (n_experts, n_ff_expert, n_embd) each */
    dg_weight down;            /* (n_experts, n_embd, n_ff_expert) */
    const float *expert_scale; /* (n_experts) factor of each expert's share */
    int32_t place;             /* see dg_layer; the experts may be on the CPU alone */
    int32_t index;             /* of the layer */
} dg_moe;

typedef struct dg_layer {
    int32_t index;
    bool sliding; /* sees the last `sliding_window` tokens; otherwise everything */
    int32_t head_dim;
    int32_t n_kv_heads;
    int32_t n_rot;   /* rotated dimensions of a head: pairs (i, i + head_dim/2) for i < n_rot/2 */
    float rope_base; /* frequency i is rope_base^(−2i/head_dim) */
    int32_t place;   /* where it lies and runs: the GPU of that number in dg_model.gpus, or DG_PLACE_CPU. 0 in a model
                        that is not divided */

    const float *attn_norm;           /* (n_embd) */
    dg_weight attn_q;                 /* (n_heads·head_dim, n_embd) */
    dg_weight attn_k;                 /* (n_kv_heads·head_dim, n_embd) */
    dg_weight attn_v;                 /* likewise; absent in full layers: v is the projection of attn_k */
    const float *attn_q_norm;         /* (head_dim) */
    const float *attn_k_norm;         /* (head_dim) */
    dg_weight attn_output;            /* (n_embd, n_heads·head_dim) */
    const float *post_attention_norm; /* (n_embd) */

    dg_mlp mlp;
    dg_moe moe;
    const float *post_mlp_norm; /* (n_embd) post_ffw_norm_1 */
    const float *post_moe_norm; /* (n_embd) post_ffw_norm_2 */
    const float *post_ffn_norm; /* (n_embd) of their sum */

    float encoder_scalar; /* the layer's output is multiplied by it */
    float decoder_scalar;
} dg_layer;

typedef struct dg_backend_ops dg_backend_ops;

struct dg_model {
    /* hyperparameters */
    int32_t n_layers;
    int32_t n_embd;
    int32_t n_vocab;
    int32_t n_heads;
    int32_t n_ff;
    int32_t n_experts;
    int32_t n_experts_used;
    int32_t n_ff_expert;
    int32_t sliding_window;
    int32_t canvas_length;
    int32_t context_length;
    float rms_eps;
    float logit_softcap;
    dg_sampling sampling;
    int32_t n_end_tokens;
    int32_t end_tokens[16];

    /* weights */
    dg_weight token_embd;     /* (n_vocab, n_embd), also the head */
    const float *output_norm; /* (n_embd) */
    dg_mlp self_conditioning;
    dg_layer *layers; /* (n_layers) */

    int64_t n_parameters;
    uint64_t weight_bytes;
    dg_file *file;
    const dg_backend_ops *backend;
    const dg_backend_ops *gpu;  /* the GPUs' share of a split backend; NULL elsewhere */
    void *backend_data;         /* what ops->load_model keeps; NULL on the CPU */
    void (*unload)(dg_model *); /* frees what the device holds; NULL where it holds nothing */
    dg_backend_kind backend_kind;
    int32_t n_gpu_layers;      /* the last so many layers are on the GPU, … */
    int32_t n_cpu_moe;         /* … but for the experts of the last so many */
    int32_t n_gpus;            /* that the model is divided over; 0 on the CPU */
    int32_t gpus[DG_MAX_GPUS]; /* their numbers, as dg_list_gpus counts; the first holds embedding, head and canvas */
    int32_t gpu_layers[DG_MAX_GPUS]; /* layers of each, in this order */
    char backend_name[256];
    char backend_note[512];
    char file_note[256];     /* what the file left open, and how it was understood; "" otherwise */
    atomic_int n_references; /* the opener and each session */
};

/* Reads the hyperparameters and binds every tensor of `file` (strictly: a missing, extra or misshapen one is an error
 * that names it). Takes ownership of `file` on success. */
dg_status dg_model_bind(dg_file *file, dg_model **model, dg_error *error);
/* Drops one reference; with the last one the model goes. */
void dg_model_release(dg_model *model);

/* Keys and values a head and token keeps: in layers without attn_v the keys are a function of the values, except for
 * the rotated dimensions (docs/model.md). */
static inline int32_t dg_layer_k_dim(const dg_layer *layer) {
    return layer->attn_v.data != NULL ? layer->head_dim : layer->n_rot;
}

#endif
