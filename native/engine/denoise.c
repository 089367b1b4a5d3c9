#include "engine/denoise.h"

#include <stdlib.h>

#include "base/error.h"
#include "engine/canvas_params.h"
#include "engine/step.h"

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

/* What a position begins with: a uniformly random token, unless something was given. */
static int32_t first_token(const dg_canvas *c, const dg_canvas_params *params, int32_t i) {
    if (c->pinned[i] >= 0) return c->pinned[i];
    if (params->start != NULL) return params->start[i];
    if (params->noise != NULL) return params->noise->initial[i];
    return dg_random_token(dg_random(c->rules.seed, c->rules.number, 0, (uint32_t)i, DG_STREAM_INITIAL),
                           c->rules.n_vocab);
}

dg_status dg_denoiser_begin(dg_denoiser *d, const dg_canvas_params *params, dg_error *error) {
    dg_canvas *c = &d->canvas;
    d->active = false;
    DG_TRY(dg_canvas_params_check(params, &c->rules, error));

    c->rules.seed = params->seed;
    c->rules.number = (uint32_t)params->canvas;
    c->rules.replayed = params->noise != NULL;
    c->rules.sampling = params->sampling;
    c->noise = params->noise;
    c->progress = (dg_canvas_progress){.not_finite = -1, .next_temperature = dg_temperature(&params->sampling, 1)};
    for (int32_t i = 0; i < c->rules.n; i++) {
        c->pinned[i] = params->pinned != NULL ? params->pinned[i] : -1;
        c->draft[i] = -1;
        c->ids[i] = first_token(c, params, i);
    }
    d->active = true;
    return DG_OK;
}

static dg_status run_step(dg_canvas *c, dg_forward *forward, const dg_kv_cache *cache, dg_draft *out, dg_error *error) {
    const dg_canvas_progress *p = &c->progress;
    const dg_step step = {.position = cache->n_past,
                          .conditioned = p->step > 0,
                          .soft = p->step + 1 < c->rules.sampling.max_denoising_steps};
    if (c->rules.replayed && p->step >= c->noise->n_steps)
        return dg_fail(error, DG_ERROR_ARGUMENT,
                       "noise holds draws for %d steps, but canvas %u has not settled after them", c->noise->n_steps,
                       c->rules.number);
    if (p->step == 0) forward->ops->begin_canvas(forward->backend, c);
    DG_TRY(dg_step_run(forward, cache, &step, error));
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
