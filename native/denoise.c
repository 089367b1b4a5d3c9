#include "denoise.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "philox.h"

#define MAX_DENOISING_STEPS 100000
#define MAX_STABILITY_THRESHOLD 64

dg_status dg_sampling_check(const dg_sampling *s, dg_error *error) {
    if (s->max_denoising_steps < 1 || s->max_denoising_steps > MAX_DENOISING_STEPS)
        return dg_fail(error, DG_ERROR_ARGUMENT, "max_denoising_steps is %d; expected 1 to %d", s->max_denoising_steps,
                       MAX_DENOISING_STEPS);
    if (!(s->t_min > 0) || !(s->t_max >= s->t_min) || !isfinite(s->t_max))
        return dg_fail(error, DG_ERROR_ARGUMENT, "t_min is %g and t_max is %g; expected 0 < t_min <= t_max", s->t_min,
                       s->t_max);
    if (!(s->entropy_bound > 0))
        return dg_fail(error, DG_ERROR_ARGUMENT, "entropy_bound is %g; expected more than 0 nats", s->entropy_bound);
    if (s->stability_threshold < 0 || s->stability_threshold > MAX_STABILITY_THRESHOLD)
        return dg_fail(error, DG_ERROR_ARGUMENT, "stability_threshold is %d; expected 0 to %d", s->stability_threshold,
                       MAX_STABILITY_THRESHOLD);
    if (!(s->confidence_threshold > 0))
        return dg_fail(error, DG_ERROR_ARGUMENT, "confidence_threshold is %g; expected more than 0 nats",
                       s->confidence_threshold);
    return DG_OK;
}

dg_status dg_denoiser_create(const dg_model *model, dg_denoiser *d, dg_error *error) {
    size_t n = (size_t)model->canvas_length;
    *d = (dg_denoiser){.n = model->canvas_length, .n_vocab = model->n_vocab};
    d->canvas = calloc(n, sizeof *d->canvas);
    d->draft = calloc(n, sizeof *d->draft);
    d->pinned = calloc(n, sizeof *d->pinned);
    d->candidates = calloc(n, sizeof *d->candidates);
    d->entropies = calloc(n, sizeof *d->entropies);
    d->uniforms = calloc(n, sizeof *d->uniforms);
    d->order = calloc(n, sizeof *d->order);
    if (d->canvas == NULL || d->draft == NULL || d->pinned == NULL || d->candidates == NULL || d->entropies == NULL ||
        d->uniforms == NULL || d->order == NULL) {
        dg_denoiser_free(d);
        return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory for a canvas of %d tokens", model->canvas_length);
    }
    return DG_OK;
}

void dg_denoiser_free(dg_denoiser *d) {
    free(d->canvas);
    free(d->draft);
    free(d->pinned);
    free(d->candidates);
    free(d->entropies);
    free(d->uniforms);
    free(d->order);
    *d = (dg_denoiser){0};
}

static dg_status check_tokens(const dg_denoiser *d, const char *name, const int32_t *tokens, int64_t n, int32_t least,
                              dg_error *error) {
    for (int64_t i = 0; tokens != NULL && i < n; i++)
        if (tokens[i] < least || tokens[i] >= d->n_vocab)
            return dg_fail(error, DG_ERROR_ARGUMENT, "%s: token %d at index %lld is outside the vocabulary of %d", name,
                           tokens[i], (long long)i, d->n_vocab);
    return DG_OK;
}

dg_status dg_denoiser_begin(dg_denoiser *d, const dg_canvas_params *params, dg_error *error) {
    const dg_noise *noise = params->noise;
    d->active = false;
    DG_TRY(dg_sampling_check(&params->sampling, error));
    DG_TRY(check_tokens(d, "start", params->start, d->n, 0, error));
    DG_TRY(check_tokens(d, "pinned", params->pinned, d->n, -1, error));
    if (noise != NULL) {
        if (noise->n_steps < 0 || noise->initial == NULL ||
            (noise->n_steps > 0 && (noise->candidates == NULL || noise->renoise == NULL)))
            return dg_fail(error, DG_ERROR_ARGUMENT,
                           "noise: expected an initial canvas, and candidates and renoise tokens for n_steps >= 0");
        DG_TRY(check_tokens(d, "noise.initial", noise->initial, d->n, 0, error));
        DG_TRY(check_tokens(d, "noise.candidates", noise->candidates, (int64_t)noise->n_steps * d->n, 0, error));
        DG_TRY(check_tokens(d, "noise.renoise", noise->renoise, (int64_t)noise->n_steps * d->n, 0, error));
    }

    d->params = *params;
    d->step = 0;
    d->n_unchanged = 0;
    for (int32_t i = 0; i < d->n; i++) {
        d->pinned[i] = params->pinned != NULL ? params->pinned[i] : -1;
        d->draft[i] = -1; /* equal to no draft, so that the first step counts as a change */
        if (d->pinned[i] >= 0)
            d->canvas[i] = d->pinned[i];
        else if (params->start != NULL)
            d->canvas[i] = params->start[i];
        else if (noise != NULL)
            d->canvas[i] = noise->initial[i];
        else
            d->canvas[i] = dg_random_token(
                dg_random(params->seed, (uint32_t)params->canvas, 0, (uint32_t)i, DG_STREAM_INITIAL), d->n_vocab);
    }
    d->params.start = d->params.pinned = NULL;
    d->active = true;
    return DG_OK;
}

/* Sorts `order` by ascending (entropy, position): the position makes it independent of the sorting algorithm. */
static void sort_by_entropy(int32_t *order, int32_t n, const float *entropies) {
    for (int32_t gap = n / 2; gap > 0; gap = gap == 2 ? 1 : (int32_t)(gap / 2.2)) /* Shell's sort: n is a canvas */
        for (int32_t i = gap; i < n; i++) {
            int32_t moved = order[i], j = i;
            for (; j >= gap; j -= gap) {
                int32_t other = order[j - gap];
                bool after = entropies[other] > entropies[moved] ||
                             (entropies[other] == entropies[moved] && other > moved);
                if (!after) break;
                order[j] = other;
            }
            order[j] = moved;
        }
}

/* Accepts positions in ascending order of entropy while the entropies before them sum to at most the bound; the others
 * get fresh tokens. Returns how many were accepted. */
static int32_t accept_and_renoise(dg_denoiser *d, const int32_t *candidates) {
    const dg_canvas_params *p = &d->params;
    int32_t n_free = 0, n_accepted = 0;
    double sum = 0;
    for (int32_t i = 0; i < d->n; i++)
        if (d->pinned[i] < 0) d->order[n_free++] = i;
    sort_by_entropy(d->order, n_free, d->entropies);
    while (n_accepted < n_free && sum <= p->sampling.entropy_bound) {
        int32_t i = d->order[n_accepted++];
        d->canvas[i] = candidates[i];
        sum += d->entropies[i];
    }
    for (int32_t k = n_accepted; k < n_free; k++) {
        int32_t i = d->order[k];
        d->canvas[i] = p->noise != NULL
                           ? p->noise->renoise[(int64_t)(d->step - 1) * d->n + i]
                           : dg_random_token(dg_random(p->seed, (uint32_t)p->canvas, (uint32_t)d->step, (uint32_t)i,
                                                       DG_STREAM_RENOISE),
                                             d->n_vocab);
    }
    return n_accepted;
}

/* Decoder and head, from the canvas to `step->result`. */
static dg_status pass_through_model(dg_forward *f, const dg_kv_cache *cache, const dg_step *step, dg_error *error) {
    const double head_flop = 2.0 * step->n * (double)f->model->n_vocab * f->model->n_embd;
    const double head_bytes = (double)f->model->token_embd.matrix_bytes;
    const dg_profile before = *f->profile;
    for (;;) {
        dg_profile_start(f->profile);
        const dg_step_kind kind = f->ops->begin_step != NULL ? f->ops->begin_step(f->backend, step) : DG_STEP_PLAIN;
        if (kind == DG_STEP_REPEATED) {
            DG_TRY(f->ops->finish(f->backend, error));
            dg_profile_stop(f->profile, DG_OP_WHOLE_STEP, before.step_flop, before.step_bytes);
            return DG_OK;
        }
        DG_TRY(dg_forward_decode(f, cache, step->host_ids, step->conditioned, error));
        f->ops->sample(f->backend, f->x, step->n, step->temperature, step->host_uniforms, step->result,
                       step->soft ? f->soft : NULL);
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

static dg_status run_step(dg_denoiser *d, dg_forward *forward, const dg_kv_cache *cache, dg_draft *out,
                          dg_error *error) {
    const dg_canvas_params *p = &d->params;
    const dg_sampling *s = &p->sampling;
    const int32_t n_steps = s->max_denoising_steps;

    if (p->noise != NULL && d->step >= p->noise->n_steps)
        return dg_fail(error, DG_ERROR_ARGUMENT,
                       "noise holds draws for %d steps, but canvas %d has not settled after them", p->noise->n_steps,
                       p->canvas);
    const bool last = d->step + 1 == n_steps;
    const float temperature = s->t_min + (s->t_max - s->t_min) * (float)(n_steps - d->step) / (float)n_steps;

    int32_t *argmax = d->order; /* not needed for sorting before the acceptance below */
    const dg_head_result head = {argmax, d->candidates, d->entropies};
    const bool conditioned = d->step > 0;
    d->step++;
    for (int32_t i = 0; i < d->n; i++)
        d->uniforms[i] = dg_random_uniform(
            dg_random(p->seed, (uint32_t)p->canvas, (uint32_t)d->step, (uint32_t)i, DG_STREAM_CANDIDATE));
    const dg_step step = {d->canvas, d->uniforms, temperature, &head, d->n, cache->n_past, conditioned, !last};
    DG_TRY(pass_through_model(forward, cache, &step, error));

    bool changed = false;
    double entropy_sum = 0;
    int32_t n_free = 0;
    for (int32_t i = 0; i < d->n; i++) {
        if (!isfinite(d->entropies[i]))
            return dg_fail(error, DG_ERROR_MODEL_FILE,
                           "the logits of canvas position %d are not finite: the model's weights are damaged", i);
        int32_t token = d->pinned[i] >= 0 ? d->pinned[i] : argmax[i];
        changed |= token != d->draft[i];
        d->draft[i] = token;
        if (d->pinned[i] >= 0) {
            d->entropies[i] = 0;
        } else {
            entropy_sum += d->entropies[i];
            n_free++;
        }
    }
    d->n_unchanged = changed ? 0 : d->n_unchanged + 1;

    out->n_accepted = accept_and_renoise(
        d, p->noise != NULL ? p->noise->candidates + (int64_t)(d->step - 1) * d->n : d->candidates);
    out->step = d->step;
    out->temperature = temperature;
    out->mean_entropy = n_free > 0 ? (float)(entropy_sum / n_free) : 0.0f;
    out->settled = d->n_unchanged >= s->stability_threshold && out->mean_entropy < s->confidence_threshold;
    out->done = out->settled || last;
    out->tokens = d->draft;
    out->canvas = d->canvas;
    out->entropies = d->entropies;
    dg_profile_stop(forward->profile, DG_OP_SAMPLER, 0, 0);
    return DG_OK;
}

dg_status dg_denoiser_step(dg_denoiser *d, dg_forward *forward, const dg_kv_cache *cache, dg_draft *draft,
                           dg_error *error) {
    if (!d->active)
        return dg_fail(error, DG_ERROR_ARGUMENT, "no canvas is under way: call dg_canvas_begin first");
    dg_status status = run_step(d, forward, cache, draft, error);
    d->active = status == DG_OK && !draft->done;
    return status;
}
