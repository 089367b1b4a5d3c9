#include "engine/denoise.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"

dg_status dg_sampling_check(const dg_sampling *s, dg_error *error) {
    if (s->max_denoising_steps < 1 || s->max_denoising_steps > DG_MAX_DENOISING_STEPS)
        return dg_fail(error, DG_ERROR_ARGUMENT, "max_denoising_steps is %d; expected 1 to %d", s->max_denoising_steps,
                       DG_MAX_DENOISING_STEPS);
    if (!(s->t_min > 0) || !(s->t_max >= s->t_min) || !isfinite(s->t_max))
        return dg_fail(error, DG_ERROR_ARGUMENT, "t_min is %g and t_max is %g; expected 0 < t_min <= t_max", s->t_min,
                       s->t_max);
    if (!(s->entropy_bound > 0))
        return dg_fail(error, DG_ERROR_ARGUMENT, "entropy_bound is %g; expected more than 0 nats", s->entropy_bound);
    if (s->stability_threshold < 0 || s->stability_threshold > DG_MAX_STABILITY_THRESHOLD)
        return dg_fail(error, DG_ERROR_ARGUMENT, "stability_threshold is %d; expected 0 to %d", s->stability_threshold,
                       DG_MAX_STABILITY_THRESHOLD);
    if (!(s->confidence_threshold > 0))
        return dg_fail(error, DG_ERROR_ARGUMENT, "confidence_threshold is %g; expected more than 0 nats",
                       s->confidence_threshold);
    return DG_OK;
}

dg_status dg_denoiser_create(const dg_model *model, dg_denoiser *d, dg_error *error) {
    size_t n = (size_t)model->canvas_length;
    dg_canvas *c = &d->canvas;
    *d = (dg_denoiser){.canvas.rules = {.n = model->canvas_length, .n_vocab = model->n_vocab}};
    c->pinned = calloc(n, sizeof *c->pinned);
    c->ids = calloc(n, sizeof *c->ids);
    c->draft = calloc(n, sizeof *c->draft);
    c->entropies = calloc(n, sizeof *c->entropies);
    if (c->pinned == NULL || c->ids == NULL || c->draft == NULL || c->entropies == NULL) {
        dg_denoiser_free(d);
        return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory for a canvas of %d tokens", model->canvas_length);
    }
    return DG_OK;
}

void dg_denoiser_free(dg_denoiser *d) {
    free(d->canvas.pinned);
    free(d->canvas.ids);
    free(d->canvas.draft);
    free(d->canvas.entropies);
    *d = (dg_denoiser){0};
}

static dg_status check_tokens(const dg_canvas_rules *rules, const char *name, const int32_t *tokens, int64_t n,
                              int32_t least, dg_error *error) {
    for (int64_t i = 0; tokens != NULL && i < n; i++)
        if (tokens[i] < least || tokens[i] >= rules->n_vocab)
            return dg_fail(error, DG_ERROR_ARGUMENT, "%s: token %d at index %lld is outside the vocabulary of %d", name,
                           tokens[i], (long long)i, rules->n_vocab);
    return DG_OK;
}

static dg_status check_noise(const dg_canvas_rules *rules, const dg_noise *noise, dg_error *error) {
    if (noise->n_steps < 0 || noise->initial == NULL ||
        (noise->n_steps > 0 && (noise->candidates == NULL || noise->renoise == NULL)))
        return dg_fail(error, DG_ERROR_ARGUMENT,
                       "noise: expected an initial canvas, and candidates and renoise tokens for n_steps >= 0");
    const int64_t n_tokens = (int64_t)noise->n_steps * rules->n;
    DG_TRY(check_tokens(rules, "noise.initial", noise->initial, rules->n, 0, error));
    DG_TRY(check_tokens(rules, "noise.candidates", noise->candidates, n_tokens, 0, error));
    return check_tokens(rules, "noise.renoise", noise->renoise, n_tokens, 0, error);
}

dg_status dg_denoiser_begin(dg_denoiser *d, const dg_canvas_params *params, dg_error *error) {
    dg_canvas *c = &d->canvas;
    d->active = false;
    DG_TRY(dg_sampling_check(&params->sampling, error));
    DG_TRY(check_tokens(&c->rules, "start", params->start, c->rules.n, 0, error));
    DG_TRY(check_tokens(&c->rules, "pinned", params->pinned, c->rules.n, -1, error));
    if (params->noise != NULL) DG_TRY(check_noise(&c->rules, params->noise, error));

    c->rules.seed = params->seed;
    c->rules.number = (uint32_t)params->canvas;
    c->rules.recorded = params->noise != NULL;
    c->rules.sampling = params->sampling;
    c->noise = params->noise;
    c->progress = (dg_canvas_progress){.not_finite = -1, .next_temperature = dg_temperature(&params->sampling, 1)};
    for (int32_t i = 0; i < c->rules.n; i++) {
        c->pinned[i] = params->pinned != NULL ? params->pinned[i] : -1;
        c->draft[i] = -1;
        if (c->pinned[i] >= 0)
            c->ids[i] = c->pinned[i];
        else if (params->start != NULL)
            c->ids[i] = params->start[i];
        else if (params->noise != NULL)
            c->ids[i] = params->noise->initial[i];
        else
            c->ids[i] = dg_random_token(dg_random(c->rules.seed, c->rules.number, 0, (uint32_t)i, DG_STREAM_INITIAL),
                                        c->rules.n_vocab);
    }
    d->active = true;
    return DG_OK;
}

/* Decoder, head and decision: what a step is. */
static dg_status pass_through_model(dg_forward *f, const dg_kv_cache *cache, const dg_step *step, dg_error *error) {
    const dg_model *model = f->model;
    const double head_flop = 2.0 * model->canvas_length * (double)model->n_vocab * model->n_embd;
    const double head_bytes = (double)model->token_embd.matrix_bytes;
    const dg_profile before = *f->profile;
    for (;;) {
        dg_profile_start(f->profile);
        const dg_step_kind kind = f->ops->begin_step != NULL ? f->ops->begin_step(f->backend, step) : DG_STEP_PLAIN;
        if (kind == DG_STEP_REPEATED) {
            DG_TRY(f->ops->finish(f->backend, error));
            dg_profile_stop(f->profile, DG_OP_WHOLE_STEP, before.step_flop, before.step_bytes);
            return DG_OK;
        }
        DG_TRY(dg_forward_decode(f, cache, NULL, step->conditioned, error));
        f->ops->denoise(f->backend, f->x, step->soft ? f->soft : NULL);
        if (kind == DG_STEP_RECORDED && !f->ops->end_step(f->backend)) {
            *f->profile = before; /* begin_step will not try again */
            continue;
        }
        DG_TRY(f->ops->finish(f->backend, error));
        dg_profile_stop(f->profile, DG_OP_HEAD, head_flop, head_bytes);
        if (kind == DG_STEP_RECORDED) dg_profile_fold_step(f->profile, &before);
        return DG_OK;
    }
}

static dg_status run_step(dg_canvas *c, dg_forward *forward, const dg_kv_cache *cache, dg_draft *out, dg_error *error) {
    const dg_canvas_progress *p = &c->progress;
    const dg_step step = {.position = cache->n_past,
                          .conditioned = p->step > 0,
                          .soft = p->step + 1 < c->rules.sampling.max_denoising_steps};
    if (c->rules.recorded && p->step >= c->noise->n_steps)
        return dg_fail(error, DG_ERROR_ARGUMENT,
                       "noise holds draws for %d steps, but canvas %u has not settled after them", c->noise->n_steps,
                       c->rules.number);
    if (p->step == 0) forward->ops->begin_canvas(forward->backend, c);
    DG_TRY(pass_through_model(forward, cache, &step, error));
    if (p->not_finite >= 0)
        return dg_fail(error, DG_ERROR_MODEL_FILE,
                       "the logits of canvas position %d are not finite: the model's weights are damaged",
                       p->not_finite);
    *out = (dg_draft){.step = p->step,
                      .n_accepted = p->n_accepted,
                      .temperature = p->temperature,
                      .mean_entropy = p->mean_entropy,
                      .done = p->done != 0,
                      .settled = p->settled != 0,
                      .tokens = c->draft,
                      .canvas = c->ids,
                      .entropies = c->entropies};
    return DG_OK;
}

dg_status dg_denoiser_step(dg_denoiser *d, dg_forward *forward, const dg_kv_cache *cache, dg_draft *draft,
                           dg_error *error) {
    if (!d->active) return dg_fail(error, DG_ERROR_ARGUMENT, "no canvas is under way: call dg_canvas_begin first");
    dg_status status = run_step(&d->canvas, forward, cache, draft, error);
    d->active = status == DG_OK && !draft->done;
    return status;
}
