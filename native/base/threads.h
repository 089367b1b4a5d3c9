/* A pool of worker threads that share out numbered pieces of work. */
#ifndef DG_THREADS_H
#define DG_THREADS_H

#include <pthread.h>

#include "dgemma.h"

/* Starts a thread that no signal is delivered to, so that a program's handlers run where it expects them; only what the
 * thread itself does wrong still reaches it. False where the system has no thread left. */
bool dg_thread_start(pthread_t *thread, void *(*run)(void *), void *argument);

typedef struct dg_pool dg_pool;

/* One piece of work. `thread` is in [0, dg_pool_size): which scratch to use. What a piece computes must not depend
 * on it. */
typedef void (*dg_work)(void *context, int64_t item, int thread);

/* `n_threads` counts the calling thread; 0: one a physical core. */
dg_status dg_pool_create(int n_threads, dg_pool **pool, dg_error *error);
void dg_pool_free(dg_pool *pool);
int dg_pool_size(const dg_pool *pool);

/* Runs work(context, 0 … n_items − 1), n_items < 2³², each once, and returns when all are done. Pieces are handed out
 * in ascending order, so put the largest first. Not reentrant: one call at a time per pool. */
void dg_pool_run(dg_pool *pool, int64_t n_items, dg_work work, void *context);

#endif
