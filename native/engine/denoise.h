/* The denoising loop of one canvas: how it begins, and a pass through the model after another until its steps
 * (canvas.h) say that it is done. */
#ifndef DG_DENOISE_H
#define DG_DENOISE_H

#include "engine/forward.h"

typedef struct dg_denoiser {
    dg_canvas canvas;
    bool active; /* begun and not done */
} dg_denoiser;

dg_status dg_denoiser_create(const dg_model *model, dg_denoiser *denoiser, dg_error *error);
void dg_denoiser_free(dg_denoiser *denoiser);

/* Copies what `params` points to, but for its noise. */
dg_status dg_denoiser_begin(dg_denoiser *denoiser, const dg_canvas_params *params, dg_error *error);
/* One decoder pass over `cache` and one decision. On failure, or when cancelled, the canvas is over. */
dg_status dg_denoiser_step(dg_denoiser *denoiser, dg_forward *forward, const dg_kv_cache *cache, dg_draft *draft,
                           dg_error *error);

#endif
