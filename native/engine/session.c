#define _POSIX_C_SOURCE 199309L /* nanosleep */
#include "engine/session.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/error.h"
#include "base/guard.h"
#include "base/machine.h"
#include "gguf/gguf.h"
#include "quant/quant.h"

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
    if (params->n_threads < 0)
        return dg_fail(error, DG_ERROR_ARGUMENT, "n_threads is %d; expected 0 (one a physical core) or more",
                       params->n_threads);
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
    memory->cache = dg_kv_cache_bytes(model, &plan.kv, DG_PLACE_DEVICE) +
                    dg_kv_cache_bytes(model, &plan.kv, DG_PLACE_CPU) + (uint64_t)plan.params.n_ctx * sizeof(int32_t);
    memory->scratch = dg_forward_bytes(model, plan.backend.max_rows) + model->backend->scratch_bytes(&plan.backend);
    return DG_OK;
}

dg_status dg_session_create(dg_model *model, const dg_session_params *given, dg_session **out, dg_error *error) {
    dg_session_plan plan;
    *out = NULL;
    DG_TRY(dg_session_plan_of(model, given, &plan, error));
    dg_session *session = calloc(1, sizeof *session);
    if (session == NULL) return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory for a session");
    session->model = model;
    session->process = getpid();
    atomic_fetch_add(&model->n_references, 1);
    session->params = plan.params;
    atomic_init(&session->cancel, false);
    dg_profile_reset(&session->profile);

    dg_status status = model->backend->create(&plan.backend, &session->backend, error);
    if (status == DG_OK) status = dg_kv_cache_create(model, session->backend, &plan.kv, &session->cache, error);
    if (status == DG_OK)
        status = dg_forward_create(model, session->backend, plan.backend.max_rows, &session->cancel, &session->profile,
                                   &session->forward, error);
    if (status == DG_OK) status = dg_denoiser_create(model, &session->denoiser, error);
    if (status != DG_OK) {
        dg_session_free(session);
        return status;
    }
    if (model->backend == &dg_cpu_backend) dg_file_prefetch(model->file);
    *out = session;
    return DG_OK;
}

void dg_session_free(dg_session *session) {
    if (session == NULL) return;
    dg_denoiser_free(&session->denoiser);
    dg_forward_free(&session->forward);
    dg_kv_cache_free(&session->cache);
    if (session->backend != NULL) session->model->backend->free(session->backend);
    dg_collector_free(session->collector);
    dg_model_release(session->model);
    free(session);
}

void dg_session_cancel(dg_session *session) { atomic_store(&session->cancel, true); }
void dg_session_resume(dg_session *session) { atomic_store(&session->cancel, false); }

int32_t dg_session_n_ctx(const dg_session *session) { return session->params.n_ctx; }
int32_t dg_session_n_threads(const dg_session *session) { return session->params.n_threads; }
int32_t dg_session_n_past(const dg_session *session) { return session->cache.n_past; }
const int32_t *dg_session_tokens(const dg_session *session) { return session->cache.tokens; }

/* ---- Calls that read the weights stand between enter and leave ----------------------------------------------- */

static dg_status enter(dg_session *session, const dg_file **outer, dg_error *error) {
    const dg_file *file = session->model->file;
    const struct timespec a_while = {.tv_nsec = 2000000};
    if (session->process != getpid())
        return dg_fail(
            error, DG_ERROR_ARGUMENT,
            "this session was created before fork(), which its threads do not survive: create one in the new "
            "process");
    while (dg_file_prefetching(file) && !atomic_load(&session->cancel)) nanosleep(&a_while, NULL);
    DG_TRY(dg_file_check(file, error));
    if (atomic_exchange(&session->cancel, false)) return dg_fail(error, DG_ERROR_CANCELLED, "cancelled");
    *outer = dg_guard_enter(file);
    return DG_OK;
}

/* What was made of a file that changed meanwhile is worth nothing, and neither is the complaint that it led to. A
 * cancellation is used up by the call that reports it. */
static dg_status leave(dg_session *session, const dg_file *outer, dg_status status, dg_error *error) {
    dg_guard_leave(outer);
    if (status == DG_ERROR_CANCELLED) atomic_store(&session->cancel, false);
    if (status == DG_OK || status == DG_ERROR_MODEL_FILE) {
        dg_status changed = dg_file_check(session->model->file, error);
        if (changed != DG_OK) status = changed;
    }
    return status;
}

static dg_status encode(dg_session *session, const int32_t *tokens, int32_t n, dg_error *error) {
    const int32_t n_past = session->cache.n_past;
    const dg_file *outer;
    DG_TRY(enter(session, &outer, error));
    dg_status status = dg_forward_encode(&session->forward, &session->cache, tokens, n, error);
    status = leave(session, outer, status, error);
    if (status != DG_OK) dg_kv_cache_truncate(&session->cache, n_past);
    return status;
}

dg_status dg_session_prefill(dg_session *session, const int32_t *tokens, int32_t n, dg_progress_callback progress,
                             void *user, dg_error *error) {
    const dg_model *model = session->model;
    const int32_t n_past = session->cache.n_past, n_ctx = session->params.n_ctx;
    if (n < 0 || (n > 0 && tokens == NULL))
        return dg_fail(error, DG_ERROR_ARGUMENT, "prefill: %d tokens; expected 0 or more", n);
    for (int32_t i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= model->n_vocab)
            return dg_fail(error, DG_ERROR_ARGUMENT, "prefill: token %d at index %d is outside the vocabulary of %d",
                           tokens[i], i, model->n_vocab);
    if (n > n_ctx - model->canvas_length - n_past)
        return dg_fail(error, DG_ERROR_CONTEXT_LENGTH,
                       "%d tokens behind the %d already encoded leave no room for a canvas of %d in a context of %d: "
                       "shorten the prompt or raise n_ctx (at most %d)",
                       n, n_past, model->canvas_length, n_ctx, model->context_length);
    session->denoiser.active = false;
    for (int32_t done = 0; done < n;) {
        int32_t chunk = n - done < session->params.n_batch ? n - done : session->params.n_batch;
        DG_TRY(encode(session, tokens + done, chunk, error));
        done += chunk;
        if (progress != NULL && !progress((float)done / (float)n, user))
            return dg_fail(error, DG_ERROR_CANCELLED, "cancelled by the progress callback");
    }
    return DG_OK;
}

dg_status dg_session_truncate(dg_session *session, int32_t n, dg_error *error) {
    if (n < 0 || n > session->cache.n_past)
        return dg_fail(error, DG_ERROR_ARGUMENT, "truncate to %d; expected 0 to the %d tokens encoded", n,
                       session->cache.n_past);
    session->denoiser.active = false;
    dg_kv_cache_truncate(&session->cache, n);
    return DG_OK;
}

dg_status dg_session_canvas_logits(dg_session *session, const int32_t *tokens, const float *self_conditioning_logits,
                                   float *logits, dg_error *error) {
    const dg_model *model = session->model;
    dg_forward *forward = &session->forward;
    for (int32_t i = 0; i < model->canvas_length; i++)
        if (tokens[i] < 0 || tokens[i] >= model->n_vocab)
            return dg_fail(error, DG_ERROR_ARGUMENT, "canvas: token %d at index %d is outside the vocabulary of %d",
                           tokens[i], i, model->n_vocab);
    const dg_file *outer;
    DG_TRY(enter(session, &outer, error));
    session->denoiser.active = false; /* forward->soft is overwritten */
    bool conditioned = self_conditioning_logits != NULL;
    if (conditioned)
        forward->ops->soft_embedding(forward->backend, self_conditioning_logits, model->canvas_length, forward->soft);
    dg_status status = dg_forward_decode(forward, &session->cache, tokens, conditioned, error);
    if (status == DG_OK) {
        forward->ops->logits(forward->backend, forward->x, model->canvas_length, logits);
        status = forward->ops->finish(forward->backend, error);
    }
    return leave(session, outer, status, error);
}

dg_canvas_params dg_canvas_params_default(const dg_model *model) {
    return (dg_canvas_params){.size = sizeof(dg_canvas_params), .sampling = model->sampling};
}

dg_status dg_canvas_begin(dg_session *session, const dg_canvas_params *given, dg_error *error) {
    dg_canvas_params params = dg_canvas_params_default(session->model);
    if (given != NULL) memcpy(&params, given, given->size < sizeof params ? given->size : sizeof params);
    params.size = sizeof params;
    if (params.canvas < 0)
        return dg_fail(error, DG_ERROR_ARGUMENT, "canvas is %d; expected its number, 0 or more", params.canvas);
    return dg_denoiser_begin(&session->denoiser, &params, error);
}

dg_status dg_canvas_step(dg_session *session, dg_draft *draft, dg_error *error) {
    *draft = (dg_draft){0};
    const dg_file *outer;
    DG_TRY(enter(session, &outer, error));
    dg_status status = dg_denoiser_step(&session->denoiser, &session->forward, &session->cache, draft, error);
    status = leave(session, outer, status, error);
    if (status != DG_OK) session->denoiser.active = false;
    return status;
}

int32_t dg_session_operations(const dg_session *session, dg_operation *operations, int32_t capacity) {
    for (int32_t i = 0; i < DG_OP_COUNT && i < capacity; i++) operations[i] = session->profile.operations[i];
    return DG_OP_COUNT;
}

void dg_session_reset_operations(dg_session *session) { dg_profile_reset(&session->profile); }

void dg_session_collect_end(dg_session *session) {
    if (session->collector == NULL) return;
    session->model->backend->collect(session->backend, NULL);
    dg_collector_free(session->collector);
    session->collector = NULL;
}

dg_status dg_session_collect_begin(dg_session *session, dg_error *error) {
    const dg_model *model = session->model;
    if (model->backend->collect == NULL)
        return dg_fail(error, DG_ERROR_BACKEND, "%s cannot collect activations: open the model for the CPU",
                       model->backend_name);
    dg_session_collect_end(session);
    DG_TRY(dg_collector_create(model, &session->collector, error));
    model->backend->collect(session->backend, session->collector);
    return DG_OK;
}

int32_t dg_session_collected(const dg_session *session, dg_activations *activations, int32_t capacity) {
    int32_t n = 0;
    if (session->collector == NULL) return 0;
    const dg_squares *squares = dg_collector_squares(session->collector, &n);
    for (int32_t i = 0; i < n && i < capacity; i++)
        activations[i] = (dg_activations){.name = squares[i].name,
                                          .n_matrices = squares[i].weight->n_matrices,
                                          .n_cols = squares[i].weight->n_cols,
                                          .sums = squares[i].sums,
                                          .counts = squares[i].counts};
    return n;
}
