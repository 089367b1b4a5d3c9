/* Parameters of a canvas, checked before it begins. */
#ifndef DG_CANVAS_PARAMS_H
#define DG_CANVAS_PARAMS_H

#include "device/canvas.h"

dg_status dg_sampling_check(const dg_sampling *sampling, dg_error *error);
/* Sampling, and that all given tokens lie in the vocabulary. */
dg_status dg_canvas_params_check(const dg_canvas_params *params, const dg_canvas_rules *rules, dg_error *error);

#endif
