#define _POSIX_C_SOURCE 199309L /* nanosleep */
#include "engine/session.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/error.h"
#include "base/guard.h"
#include "gguf/gguf.h"

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

static dg_status enter(dg_session *session, const dg_guard **outer, dg_error *error) {
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
    *outer = dg_guard_enter(dg_file_guard(file));
    return DG_OK;
}

/* What was made of a file that changed meanwhile is worth nothing, and neither is the complaint that it led to. A
 * cancellation is used up by the call that reports it. */
static dg_status leave(dg_session *session, const dg_guard *outer, dg_status status, dg_error *error) {
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
    const dg_guard *outer;
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
    const dg_guard *outer;
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
    return dg_denoiser_begin(&session->denoiser, &params, error);
}

dg_status dg_canvas_step(dg_session *session, dg_draft *draft, dg_error *error) {
    *draft = (dg_draft){0};
    const dg_guard *outer;
    DG_TRY(enter(session, &outer, error));
    dg_status status = dg_denoiser_step(&session->denoiser, &session->forward, &session->cache, draft, error);
    status = leave(session, outer, status, error);
    if (status != DG_OK) session->denoiser.active = false;
    return status;
}
