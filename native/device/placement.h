/* Which part of a model is on which device. */
#ifndef DG_PLACEMENT_H
#define DG_PLACEMENT_H

#include "model/model.h"

/* Marks what stays on the CPU (on_cpu): all but the last n_gpu_layers layers, and the experts of the last n_cpu_moe. */
void dg_place_layers(dg_model *model, int32_t n_gpu_layers, int32_t n_cpu_moe);

#endif
