#include "device/placement.h"

void dg_place_layers(dg_model *model, int32_t n_gpu_layers, int32_t n_cpu_moe) {
    for (int32_t i = 0; i < model->n_layers; i++) {
        dg_layer *layer = &model->layers[i];
        layer->on_cpu = layer->mlp.on_cpu = i < model->n_layers - n_gpu_layers;
        layer->moe.on_cpu = layer->on_cpu || i >= model->n_layers - n_cpu_moe;
    }
}
