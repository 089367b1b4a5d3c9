/* What a denoising step decides about a canvas: acceptance, fresh tokens, adaptive stop. Each device keeps the canvas
 * that is under way in its own memory and decides there; what stands here in `static inline` is the same code on all of
 * them, and the rest of it (canvas.c, cuda/settle.cu) agrees bit for bit.
 *
 * The sampler is that of DiffusionGemma's reference (`EntropyBoundSampler` and `StableAndConfidentStoppingCriteria` in
 * transformers' generation_diffusion_gemma.py), after Ben-Hamu et al., "Accelerated sampling from masked diffusion
 * models via entropy bounded unmasking", arXiv 2505.24857. */
#ifndef DG_CANVAS_H
#define DG_CANVAS_H

#include "base/philox.h"
#include "dgemma.h"

/* The same for all steps of a canvas. */
typedef struct dg_canvas_rules {
    uint64_t seed;
    uint32_t number; /* of the canvas in its answer */
    int32_t n;       /* canvas_length */
    int32_t n_vocab;
    int32_t replayed; /* not 0: candidates and fresh tokens are replayed (dg_noise) */
    dg_sampling sampling;
} dg_canvas_rules;

/* What its steps have come to. */
typedef struct dg_canvas_progress {
    int32_t step;        /* steps done */
    int32_t n_unchanged; /* steps for which the draft has stayed the same */
    int32_t n_accepted;  /* in the last step */
    int32_t
        not_finite; /* the first position whose entropy was not finite, or −1. Where there is one, only this holds */
    int32_t settled, done;  /* as in dg_draft */
    float temperature;      /* of the last step */
    float next_temperature; /* of the one to come */
    float mean_entropy;     /* nats, over the free positions */
} dg_canvas_progress;

/* A canvas on the host. `ids`, `draft`, `entropies` and `progress` follow what a backend does with it: dg_backend_ops.
 */
typedef struct dg_canvas {
    dg_canvas_rules rules;
    dg_canvas_progress progress;
    const dg_noise *noise; /* where rules.replayed */
    int32_t *pinned;       /* (n) −1 where free */
    int32_t *ids;          /* (n) what the decoder sees next */
    int32_t *draft; /* (n) most probable tokens of the last step; −1 before the first, which so counts as a change */
    float *entropies; /* (n) of the last step, nats; 0 where pinned */
} dg_canvas;

/* Of step `step`, from 1. */
static inline DG_ANYWHERE float dg_temperature(const dg_sampling *s, int32_t step) {
    const int32_t n_steps = s->max_denoising_steps;
    return s->t_min + (s->t_max - s->t_min) * (float)(n_steps - step + 1) / (float)n_steps;
}

/* What a position's candidate is drawn with. */
static inline DG_ANYWHERE float dg_candidate_uniform(const dg_canvas_rules *rules, int32_t step, int32_t position) {
    return dg_random_uniform(
        dg_random(rules->seed, rules->number, (uint32_t)step, (uint32_t)position, DG_STREAM_CANDIDATE));
}

static inline DG_ANYWHERE int32_t dg_fresh_token(const dg_canvas_rules *rules, int32_t step, int32_t position) {
    return dg_random_token(dg_random(rules->seed, rules->number, (uint32_t)step, (uint32_t)position, DG_STREAM_RENOISE),
                           rules->n_vocab);
}

/* A step ends. `changed`: whether the draft is another than before; `entropy_sum` over the n_free free positions, added
 * up in their order. */
static inline DG_ANYWHERE void dg_canvas_advance(dg_canvas_progress *p, const dg_sampling *s, bool changed,
                                                 double entropy_sum, int32_t n_free, int32_t n_accepted) {
    p->step++;
    p->temperature = dg_temperature(s, p->step);
    p->next_temperature = dg_temperature(s, p->step + 1);
    p->n_unchanged = changed ? 0 : p->n_unchanged + 1;
    p->n_accepted = n_accepted;
    p->not_finite = -1;
    p->mean_entropy = n_free > 0 ? (float)(entropy_sum / n_free) : 0.0f;
    p->settled = p->n_unchanged >= s->stability_threshold && p->mean_entropy < s->confidence_threshold;
    p->done = p->settled || p->step == s->max_denoising_steps;
}

/* The step whose head has filled canvas->entropies, `argmax` and `candidates` (n). `order` (n) is scratch. */
void dg_canvas_settle(dg_canvas *canvas, const int32_t *argmax, const int32_t *candidates, int32_t *order);

#endif
