#include "device/canvas.h"

#include <math.h>

/* Sorts `order` by ascending (entropy, position): the position makes it independent of the sorting algorithm. */
static void sort_by_entropy(int32_t *order, int32_t n, const float *entropies) {
    for (int32_t gap = n / 2; gap > 0; gap = gap == 2 ? 1 : (int32_t)(gap / 2.2)) /* Shell's sort: n is a canvas */
        for (int32_t i = gap; i < n; i++) {
            int32_t moved = order[i], j = i;
            for (; j >= gap; j -= gap) {
                int32_t other = order[j - gap];
                bool after =
                    entropies[other] > entropies[moved] || (entropies[other] == entropies[moved] && other > moved);
                if (!after) break;
                order[j] = other;
            }
            order[j] = moved;
        }
}

/* Accepts positions in ascending order of entropy while the entropies before them sum to at most the bound; the others
 * get fresh tokens. Returns how many were accepted. */
static int32_t accept_and_renoise(dg_canvas *c, const int32_t *candidates, const int32_t *order, int32_t n_free) {
    const int32_t step = c->progress.step + 1;
    const int64_t replayed = (int64_t)(step - 1) * c->rules.n;
    int32_t n_accepted = 0;
    double sum = 0;
    if (c->rules.replayed) candidates = c->noise->candidates + replayed;
    while (n_accepted < n_free && sum <= (double)c->rules.sampling.entropy_bound) {
        int32_t i = order[n_accepted++];
        c->ids[i] = candidates[i];
        sum += (double)c->entropies[i];
    }
    for (int32_t k = n_accepted; k < n_free; k++) {
        int32_t i = order[k];
        c->ids[i] = c->rules.replayed ? c->noise->renoise[replayed + i] : dg_fresh_token(&c->rules, step, i);
    }
    return n_accepted;
}

void dg_canvas_settle(dg_canvas *c, const int32_t *argmax, const int32_t *candidates, int32_t *order) {
    bool changed = false;
    double entropy_sum = 0;
    int32_t n_free = 0;
    for (int32_t i = 0; i < c->rules.n; i++) {
        const bool pinned = c->pinned[i] >= 0;
        const int32_t token = pinned ? c->pinned[i] : argmax[i];
        if (!isfinite(c->entropies[i])) {
            c->progress.not_finite = i;
            return;
        }
        changed |= token != c->draft[i];
        c->draft[i] = token;
        if (pinned) {
            c->entropies[i] = 0;
        } else {
            entropy_sum += (double)c->entropies[i];
            order[n_free++] = i;
        }
    }
    sort_by_entropy(order, n_free, c->entropies);
    const int32_t n_accepted = accept_and_renoise(c, candidates, order, n_free);
    dg_canvas_advance(&c->progress, &c->rules.sampling, changed, entropy_sum, n_free, n_accepted);
}
