#include "model/model.h"

#include <stdlib.h>
#include <string.h>

void dg_model_release(dg_model *model) {
    if (atomic_fetch_sub(&model->n_references, 1) != 1) return;
    if (model->unload != NULL) model->unload(model);
    dg_file_close(model->file);
    free(model->layers);
    free(model);
}

void dg_model_close(dg_model *model) {
    if (model != NULL) dg_model_release(model);
}

const dg_file *dg_model_file(const dg_model *model) { return model->file; }

void dg_model_describe(const dg_model *model, dg_model_info *out) {
    dg_model_info info = {
        .size = out->size,
        .n_layers = model->n_layers,
        .n_embd = model->n_embd,
        .n_vocab = model->n_vocab,
        .n_heads = model->n_heads,
        .n_ff = model->n_ff,
        .n_experts = model->n_experts,
        .n_experts_used = model->n_experts_used,
        .n_ff_expert = model->n_ff_expert,
        .sliding_window = model->sliding_window,
        .canvas_length = model->canvas_length,
        .context_length = model->context_length,
        .n_parameters = model->n_parameters,
        .weight_bytes = model->weight_bytes,
        .sampling = model->sampling,
        .n_end_tokens = model->n_end_tokens,
        .backend = model->backend_kind,
        .backend_name = model->backend_name,
        .backend_note = model->backend_note,
        .n_gpu_layers = model->n_gpu_layers,
        .n_cpu_moe = model->n_cpu_moe,
        .file_note = model->file_note,
    };
    memcpy(info.end_tokens, model->end_tokens, sizeof info.end_tokens);
    info.n_gpus = model->n_gpus;
    memcpy(info.gpus, model->gpus, sizeof info.gpus);
    memcpy(info.gpu_layers, model->gpu_layers, sizeof info.gpu_layers);
    for (int32_t i = 0; i < model->n_layers; i++) info.n_sliding_layers += model->layers[i].sliding;
    memcpy(out, &info, out->size < sizeof info ? out->size : sizeof info);
}
