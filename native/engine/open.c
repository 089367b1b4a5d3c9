/* Opening a model: the file, what stands in it, and the device that will run it. */
#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "device/backend.h"
#include "device/placement.h"
#include "engine/cuda_loader.h"
#include "engine/gpu_plan.h"
#include "gguf/gguf.h"

const char *dg_version(void) { return DGEMMA_VERSION; }

dg_status dg_backend_check(dg_backend_kind kind, dg_backend_info *out, dg_error *error) {
    char note[256];
    dg_device device = {0};
    dg_backend_info found = {.size = out->size};
    if (kind == DG_BACKEND_CPU) {
        snprintf(found.name, sizeof found.name, "%s", dg_cpu_backend_name());
    } else if (kind == DG_BACKEND_CUDA) {
        const dg_backend_ops *gpu = dg_cuda_load(note, sizeof note);
        if (gpu == NULL) return dg_fail(error, DG_ERROR_BACKEND, "%s", note);
        DG_TRY(gpu->describe_device(&device, error));
        snprintf(found.name, sizeof found.name, "cuda");
    } else {
        return dg_fail(error, DG_ERROR_ARGUMENT, "backend %d; expected the CPU's or CUDA's number", (int)kind);
    }
    found.free_bytes = device.free_bytes;
    found.total_bytes = device.total_bytes;
    memcpy(out, &found, found.size < sizeof found ? found.size : sizeof found);
    return DG_OK;
}

dg_model_params dg_model_params_default(void) {
    return (dg_model_params){
        .size = sizeof(dg_model_params), .backend = DG_BACKEND_AUTO, .n_gpu_layers = -1, .use_mmap = true};
}

static dg_status use_cpu(dg_model *model, const char *note) {
    model->backend = &dg_cpu_backend;
    model->backend_kind = DG_BACKEND_CPU;
    snprintf(model->backend_name, sizeof model->backend_name, "%s", dg_cpu_backend_name());
    /* cut where it is too long */
    snprintf(model->backend_note, sizeof model->backend_note, "%.*s", (int)sizeof model->backend_note - 1, note);
    return DG_OK;
}

/* Decides what of the model goes to the GPU, and moves it there. On failure the model is whole, and on no device. */
static dg_status use_gpu(dg_model *model, const dg_backend_ops *gpu, const dg_model_params *params, dg_error *error) {
    dg_device device;
    dg_gpu_plan plan = {.n_gpu_layers = params->n_gpu_layers, .n_cpu_moe = params->n_cpu_moe};
    DG_TRY(gpu->describe_device(&device, error));
    plan.available = device.free_bytes;
    DG_TRY(dg_gpu_plan_for(model, params->session, device.n_multiprocessors, &plan, error));
    dg_place_layers(model, plan.n_gpu_layers, plan.n_cpu_moe);
    dg_status status = gpu->load_model(model, params, error);
    if (status != DG_OK) {
        dg_place_layers(model, model->n_layers, 0);
        return status;
    }
    model->n_gpu_layers = plan.n_gpu_layers;
    model->n_cpu_moe = plan.n_cpu_moe;
    model->backend = gpu;
    model->backend_kind = DG_BACKEND_CUDA;
    model->unload = gpu->unload_model;
    if (plan.n_gpu_layers == model->n_layers && plan.n_cpu_moe == 0) return DG_OK;
    model->backend = &dg_split_backend;
    model->unload = dg_split_backend.unload_model;
    model->gpu = gpu;
    size_t length = strlen(model->backend_name);
    snprintf(model->backend_name + length, sizeof model->backend_name - length, " + %s", dg_cpu_backend_name());
    dg_gpu_explain(model, &plan, model->backend_note, sizeof model->backend_note);
    return DG_OK;
}

/* Picks the device that `params` asks for, and moves the weights there. */
static dg_status choose_backend(dg_model *model, const dg_model_params *params, dg_error *error) {
    char note[256];
    dg_error failure = {0};
    if (params->backend == DG_BACKEND_CPU)
        return use_cpu(model, params->n_gpu_layers > 0 ? "the CPU was asked for: n_gpu_layers is not used" : "");
    if (params->backend == DG_BACKEND_AUTO && params->n_gpu_layers == 0) return use_cpu(model, "");
    const dg_backend_ops *gpu = dg_cuda_load(note, sizeof note);
    if (gpu != NULL) {
        dg_status status = use_gpu(model, gpu, params, &failure);
        if (status == DG_OK) return DG_OK;
        if (status == DG_ERROR_CANCELLED || params->backend == DG_BACKEND_CUDA)
            return dg_fail(error, status, "%s", failure.message);
        return use_cpu(model, failure.message);
    }
    if (params->backend == DG_BACKEND_CUDA)
        return dg_fail(error, DG_ERROR_BACKEND, "%s: use the CPU (backend \"cpu\" or \"auto\")", note);
    return use_cpu(model, params->n_gpu_layers > 0 || params->n_cpu_moe > 0 ? note : "");
}

dg_status dg_model_check(const char *path, dg_error *error) {
    dg_model_params params = dg_model_params_default();
    dg_model *model;
    params.backend = DG_BACKEND_CPU;
    DG_TRY(dg_model_open(path, &params, &model, error));
    dg_model_close(model);
    return DG_OK;
}

dg_status dg_model_open(const char *path, const dg_model_params *given, dg_model **out, dg_error *error) {
    dg_model_params params = dg_model_params_default();
    dg_file *file = NULL;
    dg_model *model = NULL;
    *out = NULL;
    if (path == NULL) return dg_fail(error, DG_ERROR_ARGUMENT, "no path; expected the path of a GGUF file");
    if (given != NULL) memcpy(&params, given, given->size < sizeof params ? given->size : sizeof params);
    if (params.n_cpu_moe < 0)
        return dg_fail(error, DG_ERROR_ARGUMENT, "n_cpu_moe is %d; expected a number of layers, 0 or more",
                       params.n_cpu_moe);
    if (params.n_gpu_layers < -1)
        return dg_fail(error, DG_ERROR_ARGUMENT,
                       "n_gpu_layers is %d; expected a number of layers, or -1 for as many as fit",
                       params.n_gpu_layers);
    DG_TRY(dg_file_open_with(path, params.use_mmap, params.progress, params.user, &file, error));
    const dg_guard *outer = dg_guard_enter(dg_file_guard(file));
    dg_status status = dg_model_bind(file, &model, error);
    if (status == DG_OK) status = choose_backend(model, &params, error);
    dg_guard_leave(outer);
    if (status == DG_OK) status = dg_file_check(file, error); /* norms and scales were read from it */
    if (status == DG_OK)
        *out = model;
    else if (model != NULL)
        dg_model_release(model);
    else
        dg_file_close(file);
    return status;
}
