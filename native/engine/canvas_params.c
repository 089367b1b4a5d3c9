#include "engine/canvas_params.h"

#include <math.h>

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

dg_status dg_canvas_params_check(const dg_canvas_params *params, const dg_canvas_rules *rules, dg_error *error) {
    if (params->canvas < 0)
        return dg_fail(error, DG_ERROR_ARGUMENT, "canvas is %d; expected its number, 0 or more", params->canvas);
    DG_TRY(dg_sampling_check(&params->sampling, error));
    DG_TRY(check_tokens(rules, "start", params->start, rules->n, 0, error));
    DG_TRY(check_tokens(rules, "pinned", params->pinned, rules->n, -1, error));
    return params->noise != NULL ? check_noise(rules, params->noise, error) : DG_OK;
}
