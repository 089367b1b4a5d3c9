/* The operations of backend.h on the rows of one forward pass, each timed and its cost counted: what forward.c is
 * written in. */
#ifndef DG_OPERATIONS_H
#define DG_OPERATIONS_H

#include <stdatomic.h>

#include "base/profile.h"
#include "engine/kv_cache.h"

typedef struct dg_forward {
    const dg_model *model;
    const dg_backend_ops *ops;
    dg_backend *backend;
    void *memory;              /* the one allocation behind the fields below */
    float *x;                  /* (max_rows, n_embd) the residual stream */
    float *q;                  /* (max_rows, n_heads, largest head_dim) queries */
    float *attended;           /* (max_rows, n_heads, largest head_dim) what attention returns */
    float *dense;              /* (max_rows, n_embd) what the dense MLP returns; in the place of q */
    float *experts;            /* (max_rows, n_embd) what the experts return; likewise */
    float *soft;               /* (canvas_length, n_embd) soft embedding of the previous denoising step */
    const atomic_bool *cancel; /* looked at between layers */
    dg_profile *profile;
} dg_forward;

uint64_t dg_forward_bytes(const dg_model *model, int32_t max_rows);
dg_status dg_forward_create(const dg_model *model, dg_backend *backend, int32_t max_rows, const atomic_bool *cancel,
                            dg_profile *profile, dg_forward *forward, dg_error *error);
void dg_forward_free(dg_forward *forward);

/* The tokens of one pass over the layers, and how they attend. */
typedef struct dg_pass {
    dg_kv_cache *cache; /* written when encoding, read in both modes */
    int32_t n;          /* tokens */
    int32_t position;   /* of the first of them */
    bool encoding;      /* causal, keys and values go to the cache; otherwise bidirectional over the canvas */
} dg_pass;

/* x = E[tokens] · √d; the tokens of the canvas under way where they are NULL */
void dg_embed(dg_forward *f, const dg_pass *p, const int32_t *tokens);
/* x = rms(x + mlp(soft)), or rms(x) on a first step */
void dg_self_condition(dg_forward *f, const dg_pass *p, bool conditioned);
/* q of x, and its keys and values into the cache (encoding) or the canvas's own store */
void dg_project_qkv(dg_forward *f, const dg_pass *p, const dg_layer *layer);
/* keys and values alone */
void dg_project_kv(dg_forward *f, const dg_pass *p, const dg_layer *layer);
/* attended = softmax(q kᵀ) v over what the tokens see: the cache, and the canvas itself when decoding */
void dg_attend(dg_forward *f, const dg_pass *p, const dg_layer *layer);
/* x = x + rms(attended Wo) */
void dg_project_output(dg_forward *f, const dg_pass *p, const dg_layer *layer);
/* dense = mlp(x) */
void dg_dense(dg_forward *f, const dg_pass *p, const dg_layer *layer);
/* experts = moe(x) */
void dg_experts(dg_forward *f, const dg_pass *p, const dg_layer *layer);
/* x = (x + rms(rms(dense) + rms(experts))) · scalar */
void dg_combine(dg_forward *f, const dg_pass *p, const dg_layer *layer);
/* the head's statistics, draws and decisions on the canvas under way; soft = softmax(z) E · √d where it is wanted */
void dg_denoise(dg_forward *f, bool soft);
/* waits for all of them */
dg_status dg_wait(dg_forward *f, dg_error *error);

#endif
