/* The denoising loop of one canvas: temperature schedule, entropy-bound acceptance, renoising, adaptive stop. All
 * randomness of the engine is drawn here.
 *
 * The sampler is that of DiffusionGemma's reference (`EntropyBoundSampler` and `StableAndConfidentStoppingCriteria` in
 * transformers' generation_diffusion_gemma.py), after Ben-Hamu et al., "Accelerated sampling from masked diffusion
 * models via entropy bounded unmasking", arXiv 2505.24857. */
#ifndef DG_DENOISE_H
#define DG_DENOISE_H

#include "forward.h"

typedef struct dg_denoiser {
    int32_t n;       /* canvas_length */
    int32_t n_vocab;
    dg_canvas_params params; /* its pointers `start` and `pinned` are copied below and not kept */
    int32_t step;    /* steps done */
    bool active;     /* begun and not done */

    int32_t *canvas;     /* (n) what the decoder sees next */
    int32_t *draft;      /* (n) most probable tokens of the last step */
    int32_t *pinned;     /* (n) −1 where free */
    int32_t *candidates; /* (n) */
    float *entropies;    /* (n) */
    float *uniforms;     /* (n) */
    int32_t *order;      /* (n) free positions by ascending entropy */
    int32_t n_unchanged; /* steps for which the draft has stayed the same */
} dg_denoiser;

dg_status dg_sampling_check(const dg_sampling *sampling, dg_error *error);

dg_status dg_denoiser_create(const dg_model *model, dg_denoiser *denoiser, dg_error *error);
void dg_denoiser_free(dg_denoiser *denoiser);

dg_status dg_denoiser_begin(dg_denoiser *denoiser, const dg_canvas_params *params, dg_error *error);
/* One decoder pass over `cache` and one decision. On failure, or when cancelled, the canvas is over. */
dg_status dg_denoiser_step(dg_denoiser *denoiser, dg_forward *forward, const dg_kv_cache *cache, dg_draft *draft,
                           dg_error *error);

#endif
