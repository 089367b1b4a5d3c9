/* How long cores wait for each other, simulated: a piece of work sleeps for as long as its core would need, so that a
 * machine of many cores, fast and slow, fits on any. Compared are pieces as they are handed out, the same split evenly
 * beforehand, and what is possible at best: all cores busy until the end.
 *
 * Pieces are those of a step at the released sizes on AVX2: a dense product of 2,816 features, the experts of a layer,
 * and one round of the soft embedding. */
#include "workbench.h"

#include "base/threads.h"

typedef struct machine {
    const char *name;
    int n_fast, n_slow;
    double slowness; /* of the slow ones */
} machine;

typedef struct stage {
    const char *name;
    int n_items;
    double ms; /* of a piece on a fast core, stretched so that sleeping is exact enough */
} stage;

typedef struct work {
    const machine *m;
    const stage *s;
    bool evenly;
    int n_threads;
} work;

static void sleep_ms(double ms) {
    const struct timespec t = {(time_t)(ms / 1000), (long)(fmod(ms, 1000) * 1e6)};
    nanosleep(&t, NULL);
}

static void do_piece(void *context, int64_t item, int thread) {
    const work *w = context;
    const double ms = w->s->ms * (thread < w->m->n_fast ? 1 : w->m->slowness);
    if (!w->evenly) {
        sleep_ms(ms);
        return;
    }
    /* item is a thread here, and its share what it would have been given; whichever thread it runs on */
    const int64_t n = w->s->n_items, share = n * (item + 1) / w->n_threads - n * item / w->n_threads;
    sleep_ms((double)share * w->s->ms * (item < w->m->n_fast ? 1 : w->m->slowness));
}

static double seconds_of(dg_pool *pool, const work *w) {
    double best = INFINITY;
    for (int i = 0; i < 3; i++) {
        struct timespec a, b;
        clock_gettime(CLOCK_MONOTONIC, &a);
        dg_pool_run(pool, w->evenly ? w->n_threads : w->s->n_items, do_piece, (void *)w);
        clock_gettime(CLOCK_MONOTONIC, &b);
        const double seconds = (double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec);
        if (seconds < best) best = seconds;
    }
    return best;
}

int main(void) {
    const machine machines[] = {{"6 alike", 6, 0, 1},
                                {"6, one at a third", 5, 1, 3},
                                {"6 fast, 8 at half", 6, 8, 2},
                                {"8 fast, 16 at half", 8, 16, 2}};
    const stage stages[] = {
        {"dense product", 2816 / 16, 2}, {"experts", 128 * 11, 1}, {"soft embedding", 2816 / 32, 4}};
    printf("%-20s %-15s %7s %12s %12s\n", "cores", "work", "pieces", "busy, by one", "busy, evenly");
    for (size_t i = 0; i < sizeof machines / sizeof *machines; i++) {
        const machine *m = &machines[i];
        dg_pool *pool;
        dg_error error;
        if (dg_pool_create(m->n_fast + m->n_slow, &pool, &error) != DG_OK)
            return fprintf(stderr, "%s\n", error.message), 1;
        for (size_t k = 0; k < sizeof stages / sizeof *stages; k++) {
            const stage *s = &stages[k];
            const double ideal = 1e-3 * s->ms * s->n_items / (m->n_fast + m->n_slow / m->slowness);
            work w = {m, s, false, m->n_fast + m->n_slow};
            const double by_one = seconds_of(pool, &w);
            w.evenly = true;
            const double evenly = seconds_of(pool, &w);
            printf("%-20s %-15s %7d %11.0f%% %11.0f%%\n", m->name, s->name, s->n_items, 100 * ideal / by_one,
                   100 * ideal / evenly);
            fflush(stdout);
        }
        dg_pool_free(pool);
    }
    return 0;
}
