/* Reads the input as a canvas's parameters, which are checked, or as what the head of a model said of it, which settles
 * a step: entropies of any value, and nothing but tokens of the vocabulary comes out. */
#include <math.h>
#include <string.h>

#include "engine/canvas_params.h"
#include "take.h"
#include "target.h"

enum { N_CANVAS = 4, N_SETTLED = 24, N_VOCAB = 64 };

/* The parameters, checked; what is accepted lies within bounds. */
static void check_params(const uint8_t *input, size_t n_left) {
    const dg_canvas_rules rules = {.n = N_CANVAS, .n_vocab = N_VOCAB};
    int32_t start[N_CANVAS], pinned[N_CANVAS], drawn[2 * N_CANVAS];
    dg_canvas_params params = {.size = sizeof params};
    dg_noise noise = {.initial = start, .candidates = drawn, .renoise = drawn};
    dg_error error = {0};
    uint8_t which;
    take(&input, &n_left, &which, 1);
    take(&input, &n_left, &params.sampling, sizeof params.sampling);
    take(&input, &n_left, &params.canvas, sizeof params.canvas);
    take(&input, &n_left, start, sizeof start);
    take(&input, &n_left, pinned, sizeof pinned);
    take(&input, &n_left, drawn, sizeof drawn);
    take(&input, &n_left, &noise.n_steps, sizeof noise.n_steps);
    if (noise.n_steps > 2) noise.n_steps = 2; /* a caller's promise that cannot be checked */
    if (which & 1) params.start = start;
    if (which & 2) params.pinned = pinned;
    if (which & 4) params.noise = &noise;
    if (which & 8) noise.renoise = NULL;
    const dg_status status = dg_canvas_params_check(&params, &rules, &error);
    if (status != DG_OK) {
        PROMISE(status == DG_ERROR_ARGUMENT && error.message[0] != '\0');
        return;
    }
    const dg_sampling *s = &params.sampling;
    PROMISE(s->max_denoising_steps >= 1 && s->max_denoising_steps <= DG_MAX_DENOISING_STEPS);
    PROMISE(s->t_min > 0 && s->t_min <= s->t_max && isfinite(s->t_max) && s->entropy_bound > 0);
    PROMISE(s->confidence_threshold > 0 && s->stability_threshold >= 0);
    PROMISE(params.canvas >= 0 && s->stability_threshold <= DG_MAX_STABILITY_THRESHOLD);
    for (int i = 0; i < N_CANVAS && params.start != NULL; i++) PROMISE(start[i] >= 0 && start[i] < N_VOCAB);
    for (int i = 0; i < N_CANVAS && params.pinned != NULL; i++) PROMISE(pinned[i] >= -1 && pinned[i] < N_VOCAB);
}

static void settle(const uint8_t *input, size_t n_left) {
    int32_t pinned[N_SETTLED], ids[N_SETTLED], draft[N_SETTLED], argmax[N_SETTLED], candidates[N_SETTLED],
        order[N_SETTLED];
    float entropies[N_SETTLED], before[N_SETTLED];
    dg_canvas canvas = {.pinned = pinned, .ids = ids, .draft = draft, .entropies = entropies};
    uint8_t n;
    int8_t pins[N_SETTLED];
    take(&input, &n_left, &n, 1);
    take(&input, &n_left, &canvas.rules.seed, sizeof canvas.rules.seed);
    take(&input, &n_left, &canvas.rules.sampling, sizeof canvas.rules.sampling);
    take(&input, &n_left, &canvas.progress.step, sizeof canvas.progress.step);
    take(&input, &n_left, pins, sizeof pins);
    take(&input, &n_left, entropies, sizeof entropies);
    canvas.rules.n = 1 + n % N_SETTLED;
    canvas.rules.n_vocab = N_VOCAB;
    if (dg_sampling_check(&canvas.rules.sampling, NULL) != DG_OK) return;
    canvas.progress.step =
        (int32_t)((uint32_t)canvas.progress.step % (uint32_t)canvas.rules.sampling.max_denoising_steps);
    int32_t n_free = 0, not_finite = -1;
    for (int32_t i = 0; i < N_SETTLED; i++) {
        pinned[i] = pins[i] % N_VOCAB < 0 ? -1 : pins[i] % N_VOCAB;
        argmax[i] = draft[i] = ids[i] = i % N_VOCAB;
        candidates[i] = (i + 1) % N_VOCAB;
    }
    for (int32_t i = canvas.rules.n; i-- > 0;) {
        n_free += pinned[i] < 0;
        if (!isfinite(entropies[i])) not_finite = i;
    }
    memcpy(before, entropies, sizeof before);
    const int32_t step = canvas.progress.step;
    canvas.progress.not_finite = -1;
    dg_canvas_settle(&canvas, argmax, candidates, order);
    PROMISE(canvas.progress.not_finite == not_finite);
    if (not_finite >= 0) return;
    PROMISE(canvas.progress.step == step + 1 && canvas.progress.n_accepted >= 0);
    PROMISE(canvas.progress.n_accepted <= n_free && (n_free == 0 || canvas.progress.n_accepted >= 1));
    if (canvas.progress.step == canvas.rules.sampling.max_denoising_steps) PROMISE(canvas.progress.done);
    for (int32_t i = 0; i < canvas.rules.n; i++) {
        PROMISE(ids[i] >= 0 && ids[i] < N_VOCAB && draft[i] == (pinned[i] >= 0 ? pinned[i] : argmax[i]));
        PROMISE(pinned[i] >= 0 ? entropies[i] == 0 : entropies[i] == before[i]);
    }
    for (int32_t i = 1; i < n_free; i++) PROMISE(before[order[i - 1]] <= before[order[i]]);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t n_bytes) {
    if (n_bytes < 1) return 0;
    (input[0] % 2 == 0 ? check_params : settle)(input + 1, n_bytes - 1);
    return 0;
}
