/* One denoising step on a device: decoder, head and decision, which a device may capture as one graph and launch. */
#ifndef DG_STEP_H
#define DG_STEP_H

#include "engine/forward.h"

/* Runs `step` of the canvas under way behind `cache`. */
dg_status dg_step_run(dg_forward *forward, const dg_kv_cache *cache, const dg_step *step, dg_error *error);

#endif
