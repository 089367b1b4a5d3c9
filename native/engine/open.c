/* Opening a model: the file, what stands in it, and the devices that will run it. */
#include <stdio.h>
#include <string.h>

#include "base/error.h"
#include "device/backend.h"
#include "device/placement.h"
#include "engine/cuda_loader.h"
#include "engine/gpu_choice.h"
#include "engine/gpu_plan.h"
#include "gguf/gguf.h"

const char *dg_version(void) { return DGEMMA_VERSION; }

dg_status dg_list_gpus(dg_gpu_info *gpus, int32_t capacity, int32_t *n, dg_error *error) {
    char note[256];
    *n = 0;
    const dg_backend_ops *cuda = dg_cuda_load(note, sizeof note);
    if (cuda == NULL) return dg_fail(error, DG_ERROR_BACKEND, "%s", note);
    return cuda->list_gpus(gpus, capacity, n, error);
}

/* The GPU that would be used where none is named. */
static dg_status check_cuda(dg_backend_info *info, dg_error *error) {
    dg_gpu_info found[DG_MAX_GPUS];
    dg_gpu_choice choice;
    int32_t n;
    DG_TRY(dg_list_gpus(found, DG_MAX_GPUS, &n, error));
    DG_TRY(dg_choose_gpus(found, n, NULL, NULL, &choice, error));
    snprintf(info->name, sizeof info->name, "cuda");
    info->free_bytes = choice.gpus[0]->free_bytes;
    info->total_bytes = choice.gpus[0]->total_bytes;
    return DG_OK;
}

dg_status dg_backend_check(dg_backend_kind kind, dg_backend_info *out, dg_error *error) {
    dg_backend_info found = {.size = out->size};
    if (kind == DG_BACKEND_CPU)
        snprintf(found.name, sizeof found.name, "%s", dg_cpu_backend_name());
    else if (kind == DG_BACKEND_CUDA)
        DG_TRY(check_cuda(&found, error));
    else
        return dg_fail(error, DG_ERROR_ARGUMENT, "backend %d; expected the CPU's or CUDA's number", (int)kind);
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

static void leave_gpus(dg_model *model) {
    const int32_t all = model->n_layers;
    dg_place_layers(model, &all, 1, 0);
    model->n_gpus = 0;
}

/* Plans for the first n of the candidates, and asks each what is free. */
static dg_status plan_for(dg_model *model, const dg_backend_ops *gpu, const dg_model_params *params,
                          const dg_gpu_choice *choice, int32_t n, dg_gpu_plan *plan, dg_error *error) {
    int32_t n_multiprocessors[DG_MAX_GPUS] = {0};
    *plan = (dg_gpu_plan){.n_gpu_layers = params->n_gpu_layers, .n_cpu_moe = params->n_cpu_moe, .n_gpus = n};
    for (int32_t i = 0; i < n; i++) {
        plan->gpus[i].proportion = choice->proportions[i];
        n_multiprocessors[i] = choice->gpus[i]->n_multiprocessors;
        DG_TRY(gpu->gpu_memory(choice->gpus[i]->number, &plan->gpus[i].available, error));
    }
    return dg_gpu_plan_for(model, params->session, n_multiprocessors, plan, error);
}

/* Whether one GPU holds all that was asked for, so that the others would only cost time. */
static bool is_enough(const dg_model *model, const dg_model_params *params, const dg_gpu_plan *plan) {
    const int32_t wanted =
        params->n_gpu_layers >= 0 && params->n_gpu_layers < model->n_layers ? params->n_gpu_layers : model->n_layers;
    const int32_t n_cpu_moe = params->n_cpu_moe < model->n_layers ? params->n_cpu_moe : model->n_layers;
    return plan->n_gpu_layers == wanted && plan->n_cpu_moe == n_cpu_moe && plan->total <= plan->available;
}

static dg_status plan_division(dg_model *model, const dg_backend_ops *gpu, const dg_model_params *params,
                               const dg_gpu_choice *choice, dg_gpu_plan *plan, dg_error *error) {
    if (choice->n == 1) return plan_for(model, gpu, params, choice, 1, plan, error);
    if (!choice->all && plan_for(model, gpu, params, choice, 1, plan, NULL) == DG_OK && is_enough(model, params, plan))
        return DG_OK;
    return plan_for(model, gpu, params, choice, choice->n, plan, error);
}

/* GPUs that got nothing are left out; the first one has at least the embedding. */
static void take_gpus(dg_model *model, const dg_gpu_choice *choice, dg_gpu_plan *plan) {
    model->n_gpus = 0;
    for (int32_t i = 0; i < plan->n_gpus; i++) {
        if (i > 0 && plan->gpus[i].n_layers == 0) continue;
        model->gpus[model->n_gpus] = choice->gpus[i]->number;
        model->gpu_layers[model->n_gpus] = plan->gpus[i].n_layers;
        plan->gpus[model->n_gpus++] = plan->gpus[i];
    }
    plan->n_gpus = model->n_gpus;
    dg_place_layers(model, model->gpu_layers, model->n_gpus, plan->n_cpu_moe);
}

/* Decides what of the model goes to which GPU, and moves it there. On failure the model is whole, and on no device. */
static dg_status use_gpus(dg_model *model, const dg_backend_ops *gpu, const dg_model_params *params, dg_error *error) {
    dg_gpu_info found[DG_MAX_GPUS];
    dg_gpu_choice choice;
    dg_gpu_plan plan;
    int32_t n_found;
    DG_TRY(gpu->list_gpus(found, DG_MAX_GPUS, &n_found, error));
    DG_TRY(dg_choose_gpus(found, n_found, params->device, params->tensor_split, &choice, error));
    DG_TRY(plan_division(model, gpu, params, &choice, &plan, error));
    take_gpus(model, &choice, &plan);
    dg_status status = gpu->load_model(model, params, error);
    if (status != DG_OK) {
        leave_gpus(model);
        return status;
    }
    model->n_gpu_layers = plan.n_gpu_layers;
    model->n_cpu_moe = plan.n_cpu_moe;
    model->backend = gpu;
    model->backend_kind = DG_BACKEND_CUDA;
    model->unload = gpu->unload_model;
    const bool whole = plan.n_gpu_layers == model->n_layers && plan.n_cpu_moe == 0;
    if (whole && model->n_gpus == 1) return DG_OK;
    model->backend = &dg_split_backend;
    model->unload = dg_split_backend.unload_model;
    model->gpu = gpu;
    const size_t length = strlen(model->backend_name);
    if (!whole)
        snprintf(model->backend_name + length, sizeof model->backend_name - length, " + %s", dg_cpu_backend_name());
    dg_gpu_explain(model, &plan, model->backend_note, sizeof model->backend_note);
    return DG_OK;
}

static bool given(const char *text) { return text != NULL && text[0] != '\0'; }

/* Picks the devices that `params` asks for, and moves the weights there. */
static dg_status choose_backend(dg_model *model, const dg_model_params *params, dg_error *error) {
    char note[256];
    dg_error failure = {0};
    const bool none = given(params->device) && strcmp(params->device, "none") == 0;
    const bool insists = params->backend == DG_BACKEND_CUDA || given(params->device);
    if (none && params->backend == DG_BACKEND_CUDA)
        return dg_fail(error, DG_ERROR_ARGUMENT, "device \"none\" is the CPU, but the backend is to be CUDA");
    if (params->backend == DG_BACKEND_CPU || none)
        return use_cpu(model, params->n_gpu_layers > 0 ? "the CPU was asked for: n_gpu_layers is not used" : "");
    if (params->backend == DG_BACKEND_AUTO && params->n_gpu_layers == 0) return use_cpu(model, "");
    const dg_backend_ops *gpu = dg_cuda_load(note, sizeof note);
    if (gpu != NULL) {
        dg_status status = use_gpus(model, gpu, params, &failure);
        if (status == DG_OK) return DG_OK;
        if (status == DG_ERROR_CANCELLED || status == DG_ERROR_ARGUMENT || insists)
            return dg_fail(error, status, "%s", failure.message);
        return use_cpu(model, failure.message);
    }
    if (insists) return dg_fail(error, DG_ERROR_BACKEND, "%s: use the CPU (backend \"cpu\" or \"auto\")", note);
    const bool asked = params->n_gpu_layers > 0 || params->n_cpu_moe > 0 || given(params->tensor_split);
    return use_cpu(model, asked ? note : "");
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
