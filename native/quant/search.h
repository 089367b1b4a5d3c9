/* Searches for the scales with the least weighted squared error, for N_LANES groups at a time.
 *
 * In all of them x (n) are the elements of each group and w (n) their weights, which are positive. For a given scale
 * the best integers are the nearest ones; for given integers q the best scale is a linear regression. A search starts
 * from several scales, lets the regression correct each, and keeps the one that explains most of Σ w x², its gain. */
#ifndef DG_QUANT_SEARCH_H
#define DG_QUANT_SEARCH_H

#include "quant/lanes.h"
#include "quant/levels.h"

#define N_TRIALS 8       /* starts of a search */
#define N_REFINEMENTS 2  /* lower the error of affine groups by 0.6 %, with outliers by 4 % */
#define N_PHASES 4       /* where the levels of affine groups may begin */
#define TRIALS_AT_ONCE 4 /* sums of several trials in one pass hide the latency of the additions */

/* The element with the largest magnitude, with its sign. */
LANES_INLINE floats extreme(const floats *x, int n) {
    floats best = x[0];
    for (int j = 1; j < n; j++) best = choose(magnitude(x[j]) > magnitude(best), x[j], best);
    return best;
}

/* ---- x ≈ scale · q -------------------------------------------------------------------------------------------- */

/* Sums over the values q nearest to x · inverse_scale. */
typedef struct scale_sums {
    floats xq, qq; /* Σ w x q and Σ w q² */
} scale_sums;

LANES_INLINE void sum_trials(levels kind, const floats *x, const floats *w, int n, int n_trials,
                             const floats *inverse_scale, scale_sums *sums) {
    for (int i = 0; i < n_trials; i++) sums[i] = (scale_sums){{0}, {0}};
    for (int j = 0; j < n; j++) {
        for (int i = 0; i < n_trials; i++) {
            floats q = nearest(kind, x[j] * inverse_scale[i]), wq = w[j] * q;
            sums[i].xq += wq * x[j];
            sums[i].qq += wq * q;
        }
    }
}

LANES_INLINE floats scale_gain(floats scale, const scale_sums *sums) {
    return scale * (2.0f * sums->xq - scale * sums->qq);
}

/* `targets` (N_TRIALS): the values, in units of the scale, on which the group's extreme
 * element is put in turn. */
LANES_INLINE floats search_scale(levels kind, const floats *x, const floats *w, int n, const float *targets) {
    floats inverse_extreme = inverse(extreme(x, n));
    floats scale = {0}, gain = {0};
    for (int first = 0; first < N_TRIALS; first += TRIALS_AT_ONCE) {
        floats inverse_scale[TRIALS_AT_ONCE];
        scale_sums sums[TRIALS_AT_ONCE];
        for (int i = 0; i < TRIALS_AT_ONCE; i++) inverse_scale[i] = targets[first + i] * inverse_extreme;
        sum_trials(kind, x, w, n, TRIALS_AT_ONCE, inverse_scale, sums);
        for (int i = 0; i < TRIALS_AT_ONCE; i++) {
            floats trial = sums[i].xq * inverse(sums[i].qq), trial_gain = trial * sums[i].xq;
            ints better = trial_gain > gain;
            scale = choose(better, trial, scale);
            gain = choose(better, trial_gain, gain);
        }
    }
    return scale;
}

/* ---- x ≈ scale · q + offset, q in 0 … high --------------------------------------------------------------------- */

typedef struct affine {
    floats scale, offset;
} affine;

typedef struct affine_sums {
    floats q, xq, qq; /* Σ w q, Σ w x q and Σ w q² */
} affine_sums;

/* Of x alone: Σ w and Σ w x. */
typedef struct moment_sums {
    floats w, x;
} moment_sums;

LANES_INLINE moment_sums sum_moments(const floats *x, const floats *w, int n) {
    moment_sums sums = {{0}, {0}};
    for (int j = 0; j < n; j++) {
        sums.w += w[j];
        sums.x += w[j] * x[j];
    }
    return sums;
}

LANES_INLINE void sum_affine_trials(float high, const floats *x, const floats *w, int n, int n_trials,
                                    const floats *inverse_scale, const floats *offset, affine_sums *sums) {
    for (int i = 0; i < n_trials; i++) sums[i] = (affine_sums){{0}, {0}, {0}};
    for (int j = 0; j < n; j++) {
        for (int i = 0; i < n_trials; i++) {
            floats q = clamped(rounded((x[j] - offset[i]) * inverse_scale[i]), 0, high), wq = w[j] * q;
            sums[i].q += wq;
            sums[i].xq += wq * x[j];
            sums[i].qq += wq * q;
        }
    }
}

LANES_INLINE floats affine_gain(const affine *fit, const affine_sums *sums, const moment_sums *moments) {
    floats by_scale = fit->scale * (2.0f * sums->xq - fit->scale * sums->qq - 2.0f * fit->offset * sums->q);
    return by_scale + fit->offset * (2.0f * moments->x - fit->offset * moments->w);
}

/* The regression of x on q; the offset stays at or below zero where `negative` asks for it. */
LANES_INLINE affine solve_affine(bool negative, const affine_sums *sums, const moment_sums *moments) {
    floats determinant = moments->w * sums->qq - sums->q * sums->q;
    floats inverse_determinant = inverse(determinant);
    affine fit = {(moments->w * sums->xq - moments->x * sums->q) * inverse_determinant,
                  (sums->qq * moments->x - sums->q * sums->xq) * inverse_determinant};
    /* With nearly equal q the determinant is rounding noise: only the scale can be known. */
    ints alone = determinant <= 1e-5f * (moments->w * sums->qq);
    if (negative) alone |= fit.offset > 0.0f;
    fit.scale = choose(alone, sums->xq * inverse(sums->qq), fit.scale);
    fit.offset = choose(alone, all(0.0f), fit.offset);
    return fit;
}

/* `spans` (N_TRIALS): the numbers of steps into which the range of x is divided in turn. The lowest level is put on the
 * smallest element, and where the elements are `weighed`, also a part of a step beside it: with one element far from
 * the others the error has many minima, and refining leads only into the nearest. */
LANES_INLINE affine search_affine(float high, bool negative, const floats *x, const floats *w, int n,
                                  const float *spans, bool weighed) {
    static const float phases[N_PHASES] = {0.0f, -0.25f, 0.25f, -0.5f};
    const int n_phases = weighed ? N_PHASES : 1;
    floats low = x[0], top = x[0];
    for (int j = 1; j < n; j++) {
        low = smaller(low, x[j]);
        top = larger(top, x[j]);
    }
    if (negative) low = smaller(low, all(0.0f));
    moment_sums moments = sum_moments(x, w, n);
    floats inverse_range = inverse(top - low);

    affine best = {{0}, moments.x * inverse(moments.w)};
    if (negative) best.offset = smaller(best.offset, all(0.0f));
    floats gain = best.offset * (2.0f * moments.x - best.offset * moments.w);
    for (int first = 0; first < n_phases * N_TRIALS; first += TRIALS_AT_ONCE) {
        floats inverse_scale[TRIALS_AT_ONCE], offset[TRIALS_AT_ONCE];
        affine_sums sums[TRIALS_AT_ONCE];
        for (int i = 0; i < TRIALS_AT_ONCE; i++) {
            float span = spans[(first + i) % N_TRIALS], phase = phases[(first + i) / N_TRIALS];
            inverse_scale[i] = span * inverse_range;
            offset[i] = low + (phase / span) * (top - low);
        }
        sum_affine_trials(high, x, w, n, TRIALS_AT_ONCE, inverse_scale, offset, sums);
        for (int i = 0; i < TRIALS_AT_ONCE; i++) {
            affine trial = solve_affine(negative, &sums[i], &moments);
            floats trial_gain = affine_gain(&trial, &sums[i], &moments);
            ints better = trial_gain > gain;
            best.scale = choose(better, trial.scale, best.scale);
            best.offset = choose(better, trial.offset, best.offset);
            gain = choose(better, trial_gain, gain);
        }
    }
    /* The nearest integers to the corrected scale and offset are others again. */
    for (int i = 0; i < n_phases * N_REFINEMENTS; i++) {
        floats inverse_scale = inverse(best.scale);
        affine_sums sums;
        sum_affine_trials(high, x, w, n, 1, &inverse_scale, &best.offset, &sums);
        affine trial = solve_affine(negative, &sums, &moments);
        floats trial_gain = affine_gain(&trial, &sums, &moments);
        ints better = trial_gain > gain;
        best.scale = choose(better, trial.scale, best.scale);
        best.offset = choose(better, trial.offset, best.offset);
        gain = choose(better, trial_gain, gain);
    }
    return best;
}

#endif
