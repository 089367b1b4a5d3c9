/* How native/base/threads.c shares work out, for tests/engine/test_threads.py. */
#define _POSIX_C_SOURCE 199309L
#include "base/threads.h"

#include <stdatomic.h>
#include <time.h>

#define PATIENCE_MS 20000 /* that a held piece waits for the others before it gives up */

typedef struct shared_work {
    int32_t n_items, n_held;
    atomic_int n_finished;
    atomic_bool gave_up;
    int32_t *taken_by; /* (n_items) */
    atomic_int *times; /* (n_items) */
} shared_work;

static void take(void *context, int64_t item, int thread) {
    shared_work *work = context;
    const struct timespec millisecond = {0, 1000000};
    atomic_fetch_add(&work->times[item], 1);
    work->taken_by[item] = thread;
    if (item >= work->n_held) { /* longer than a thread needs to wake up */
        nanosleep(&millisecond, NULL);
        atomic_fetch_add(&work->n_finished, 1);
        return;
    }
    for (int ms = 0; atomic_load(&work->n_finished) < work->n_items - work->n_held; ms++) {
        if (ms >= PATIENCE_MS) {
            atomic_store(&work->gave_up, true);
            return;
        }
        nanosleep(&millisecond, NULL);
    }
}

/* Runs n_items pieces on n_threads threads. Whoever takes one of the first n_held holds it until all others are
 * finished: a core that is as slow as can be. taken_by, times (n_items): the thread that took each piece, and how often
 * one did. Returns 0, 1 where a held piece waited in vain, 2 without a pool. */
__attribute__((visibility("default"))) int test_pool(int32_t n_threads, int32_t n_items, int32_t n_held,
                                                     int32_t *taken_by, int32_t *times);

int test_pool(int32_t n_threads, int32_t n_items, int32_t n_held, int32_t *taken_by, int32_t *times) {
    enum { MOST = 4096 };
    static atomic_int counts[MOST];
    dg_pool *pool;
    dg_error error;
    if (n_items > MOST || dg_pool_create(n_threads, &pool, &error) != DG_OK) return 2;
    for (int32_t i = 0; i < n_items; i++) atomic_store(&counts[i], 0);
    shared_work work = {.n_items = n_items, .n_held = n_held, .taken_by = taken_by, .times = counts};
    dg_pool_run(pool, n_items, take, &work);
    dg_pool_free(pool);
    for (int32_t i = 0; i < n_items; i++) times[i] = atomic_load(&counts[i]);
    return atomic_load(&work.gave_up) ? 1 : 0;
}
