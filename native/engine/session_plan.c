#include "engine/session_plan.h"

#include <string.h>

#include "base/error.h"
#include "base/machine.h"
#include "engine/operations.h"

#define MAX_BATCH 65536

dg_session_params dg_session_params_default(void) {
    return (dg_session_params){
        .size = sizeof(dg_session_params),
        .n_ctx = 8192,
        .n_batch = 512,
        .n_threads = 0,
        .type_k = DG_TYPE_F16,
        .type_v = DG_TYPE_F16,
        .soft_embedding_bound = 1e-6f,
        .n_rewind = 1024, /* four canvases of the released model: 200 MiB at 16 bit */
    };
}

static bool is_cache_type(int32_t type) {
    return type == DG_TYPE_F32 || type == DG_TYPE_F16 || type == DG_TYPE_BF16 || type == DG_TYPE_Q8_0;
}

/* Reads the caller's struct, which may be shorter than ours, over the defaults, and checks it. */
static dg_status read_params(const dg_model *model, const dg_session_params *given, dg_session_params *params,
                             dg_error *error) {
    *params = dg_session_params_default();
    if (given != NULL) memcpy(params, given, given->size < sizeof *params ? given->size : sizeof *params);
    params->size = sizeof *params;
    if (params->n_ctx == 0) params->n_ctx = model->context_length;
    if (params->n_ctx <= model->canvas_length || params->n_ctx > model->context_length)
        return dg_fail(error, DG_ERROR_ARGUMENT,
                       "n_ctx is %d; expected more than the canvas (%d tokens) and at most the model's context (%d)",
                       params->n_ctx, model->canvas_length, model->context_length);
    if (params->n_batch < 1 || params->n_batch > MAX_BATCH)
        return dg_fail(error, DG_ERROR_ARGUMENT, "n_batch is %d; expected 1 to %d", params->n_batch, MAX_BATCH);
    if (params->n_batch > params->n_ctx) params->n_batch = params->n_ctx;
    if (params->n_threads < 0 || params->n_threads > DG_MAX_THREADS)
        return dg_fail(error, DG_ERROR_ARGUMENT, "n_threads is %d; expected 0 (one a physical core) to %d",
                       params->n_threads, DG_MAX_THREADS);
    if (params->n_threads == 0) params->n_threads = dg_physical_cores();
    if (params->n_rewind < 0)
        return dg_fail(error, DG_ERROR_ARGUMENT, "n_rewind is %d; expected 0 or more", params->n_rewind);
    if (params->n_rewind > params->n_ctx) params->n_rewind = params->n_ctx;
    if (!is_cache_type(params->type_k) || !is_cache_type(params->type_v))
        return dg_fail(error, DG_ERROR_ARGUMENT, "cache types are %d and %d; expected f32, f16, bf16 or q8_0",
                       params->type_k, params->type_v);
    if (!(params->soft_embedding_bound >= 0) || params->soft_embedding_bound >= 1)
        return dg_fail(error, DG_ERROR_ARGUMENT, "soft_embedding_bound is %g; expected 0 <= bound < 1",
                       params->soft_embedding_bound);
    return DG_OK;
}

dg_status dg_session_plan_of(const dg_model *model, const dg_session_params *given, dg_session_plan *plan,
                             dg_error *error) {
    DG_TRY(read_params(model, given, &plan->params, error));
    const dg_session_params *p = &plan->params;
    plan->kv = (dg_kv_plan){
        .n_ctx = p->n_ctx, .n_batch = p->n_batch, .n_rewind = p->n_rewind, .type_k = p->type_k, .type_v = p->type_v};
    plan->backend = (dg_backend_params){
        .model = model,
        .n_threads = p->n_threads,
        .max_rows = p->n_batch > model->canvas_length ? p->n_batch : model->canvas_length,
        .type_k = p->type_k,
        .type_v = p->type_v,
        .soft_embedding_bound = p->soft_embedding_bound,
    };
    return DG_OK;
}

dg_status dg_session_memory(const dg_model *model, const dg_session_params *given, dg_memory *memory, dg_error *error) {
    dg_session_plan plan;
    DG_TRY(dg_session_plan_of(model, given, &plan, error));
    memory->weights = model->weight_bytes;
    memory->cache = (uint64_t)plan.params.n_ctx * sizeof(int32_t);
    for (int32_t place = DG_PLACE_CPU; place < DG_MAX_GPUS; place++)
        memory->cache += dg_kv_cache_bytes(model, &plan.kv, place);
    memory->scratch = dg_forward_bytes(model, plan.backend.max_rows) + model->backend->scratch_bytes(&plan.backend);
    return DG_OK;
}
