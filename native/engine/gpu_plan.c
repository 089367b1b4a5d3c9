#include "engine/gpu_plan.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "cuda/layout.h"
#include "device/placement.h"
#include "engine/operations.h"

/* Where no device is asked: as many multiprocessors as the largest have. More would only matter to tiny models. */
#define MULTIPROCESSORS 192

static uint64_t max_u64(uint64_t a, uint64_t b) { return a > b ? a : b; }
static double gib(uint64_t n_bytes) { return (double)n_bytes / (1 << 30); }

/* Fills in what the division named by `plan` takes. `scratchpad` is a copy of the model, to be marked. */
static void measure(dg_model *scratchpad, const dg_session_plan *session, int32_t n_multiprocessors,
                    dg_gpu_plan *plan) {
    dg_backend_params backend = session->backend;
    dg_cuda_scratch unused;
    dg_place_layers(scratchpad, plan->n_gpu_layers, plan->n_cpu_moe);
    backend.model = scratchpad;
    plan->weights = dg_cuda_weight_bytes(scratchpad);
    plan->cache = dg_kv_cache_bytes(scratchpad, &session->kv, DG_PLACE_DEVICE);
    plan->scratch = dg_forward_bytes(scratchpad, backend.max_rows) +
                    dg_cuda_lay_out_scratch(&backend, n_multiprocessors, NULL, &unused);
    plan->reserve = DG_GPU_RESERVE;
    plan->total = plan->weights + max_u64(plan->cache + plan->scratch, 2 * DG_CUDA_STAGING_BYTES) + plan->reserve;
}

/* Experts are most of a model and the part that suffers least from the CPU, so they leave the GPU first, layer by
 * layer; whole layers only when all experts have. */
static bool fit(dg_model *scratchpad, const dg_session_plan *session, int32_t n_multiprocessors, dg_gpu_plan *plan) {
    const int32_t n_layers = scratchpad->n_layers;
    plan->n_gpu_layers = n_layers;
    for (;;) {
        measure(scratchpad, session, n_multiprocessors, plan);
        if (plan->total <= plan->available) return true;
        if (plan->n_cpu_moe < n_layers)
            plan->n_cpu_moe++;
        else if (plan->n_gpu_layers > 0)
            plan->n_gpu_layers--;
        else
            return false;
    }
}

dg_status dg_gpu_plan_for(const dg_model *model, const dg_session_params *given, int32_t n_multiprocessors,
                          dg_gpu_plan *plan, dg_error *error) {
    dg_session_params params = dg_session_params_default();
    dg_session_plan session;
    if (given != NULL) memcpy(&params, given, given->size < sizeof params ? given->size : sizeof params);
    if (params.n_ctx > model->context_length) params.n_ctx = model->context_length;
    DG_TRY(dg_session_plan_of(model, &params, &session, error));
    if (plan->n_gpu_layers < -1 || plan->n_cpu_moe < 0)
        return dg_fail(
            error, DG_ERROR_ARGUMENT,
            "n_gpu_layers is %d and n_cpu_moe %d; expected a number of layers each, or -1 for as many layers "
            "on the GPU as fit",
            plan->n_gpu_layers, plan->n_cpu_moe);
    if (plan->n_gpu_layers > model->n_layers) plan->n_gpu_layers = model->n_layers;
    if (plan->n_cpu_moe > model->n_layers) plan->n_cpu_moe = model->n_layers;

    dg_model *scratchpad = malloc(sizeof *scratchpad);
    dg_layer *layers = malloc((size_t)model->n_layers * sizeof *layers);
    dg_status status = DG_OK;
    if (scratchpad == NULL || layers == NULL) {
        status = dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory to plan the model on the GPU");
        goto out;
    }
    memcpy(scratchpad, model, sizeof *scratchpad);
    memcpy(layers, model->layers, (size_t)model->n_layers * sizeof *layers);
    scratchpad->layers = layers;
    if (plan->n_gpu_layers >= 0)
        measure(scratchpad, &session, n_multiprocessors, plan);
    else if (!fit(scratchpad, &session, n_multiprocessors, plan))
        status =
            dg_fail(error, DG_ERROR_OUT_OF_MEMORY,
                    "%.2f GiB are free on the GPU, and embedding, head and scratch alone need %.2f GiB: close other "
                    "programs, use a smaller batch, or the CPU",
                    gib(plan->available), gib(plan->total));
out:
    free(scratchpad);
    free(layers);
    return status;
}

dg_status dg_model_plan_gpu(const dg_model *model, const dg_session_params *session, dg_gpu_plan *out,
                            dg_error *error) {
    dg_gpu_plan plan = {.n_gpu_layers = -1};
    const size_t size = out->size < sizeof plan ? out->size : sizeof plan;
    memcpy(&plan, out, size);
    DG_TRY(dg_gpu_plan_for(model, session, MULTIPROCESSORS, &plan, error));
    memcpy(out, &plan, size);
    return DG_OK;
}

void dg_gpu_explain(const dg_model *model, const dg_gpu_plan *plan, char *text, size_t size) {
    char experts[96] = "";
    if (plan->n_cpu_moe > 0) snprintf(experts, sizeof experts, " but for the experts of the last %d", plan->n_cpu_moe);
    snprintf(
        text, size,
        "on the GPU: the embedding and the last %d of %d layers%s; %.2f GiB of weights, %.2f GiB of cache and %.2f GiB "
        "of scratch, of %.2f GiB free",
        plan->n_gpu_layers, model->n_layers, experts, gib(plan->weights), gib(plan->cache), gib(plan->scratch),
        gib(plan->available));
}
