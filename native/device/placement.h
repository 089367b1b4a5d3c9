/* Which part of a model is on which device. */
#ifndef DG_PLACEMENT_H
#define DG_PLACEMENT_H

#include "model/model.h"

/* Marks the place of each layer: the last ones are on the GPUs, of which each takes gpu_layers[its number] (n_gpus)
 * that follow each other; those before them, and the experts of the last n_cpu_moe, on the CPU. */
void dg_place_layers(dg_model *model, const int32_t *gpu_layers, int32_t n_gpus, int32_t n_cpu_moe);

/* The same for one layer; its experts go along unless it is one of the last n_cpu_moe. */
void dg_place_layer(dg_model *model, int32_t index, int32_t place, int32_t n_cpu_moe);

#endif
