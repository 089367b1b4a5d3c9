#include "device/placement.h"

void dg_place_layer(dg_model *model, int32_t index, int32_t place, int32_t n_cpu_moe) {
    dg_layer *layer = &model->layers[index];
    layer->place = layer->mlp.place = place;
    layer->moe.place = index >= model->n_layers - n_cpu_moe ? DG_PLACE_CPU : place;
}

void dg_place_layers(dg_model *model, const int32_t *gpu_layers, int32_t n_gpus, int32_t n_cpu_moe) {
    int32_t n_on_cpu = model->n_layers, index = 0;
    for (int32_t gpu = 0; gpu < n_gpus; gpu++) n_on_cpu -= gpu_layers[gpu];
    while (index < n_on_cpu) dg_place_layer(model, index++, DG_PLACE_CPU, n_cpu_moe);
    for (int32_t gpu = 0; gpu < n_gpus; gpu++)
        for (int32_t i = 0; i < gpu_layers[gpu]; i++) dg_place_layer(model, index++, gpu, n_cpu_moe);
}
