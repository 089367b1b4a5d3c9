/* Workers spin for a while after each piece of work, since the next one follows within microseconds during a forward
 * pass, then sleep on a condition variable, so that an idle session costs nothing. The caller waits for the last pieces
 * in the same way.
 *
 * A call waits for its pieces, not for its workers: a worker that the machine has no time for is done without.
 * `ticket` holds the call's number and its next piece, and a worker takes a piece by advancing it. A worker that wakes
 * up late finds another number, so it cannot take a piece of a call that it has not read. */
#define _GNU_SOURCE
#include "base/threads.h"

#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "base/error.h"
#include "base/guard.h"
#include "base/machine.h"

#define SPIN_NS 100000 /* longer than the gaps within a forward pass; a wake-up takes about half of it */

struct dg_pool {
    int n_threads;
    pid_t process;      /* that the threads belong to */
    pthread_t *threads; /* (n_threads − 1) */
    pthread_mutex_t mutex;
    pthread_cond_t wake;     /* for workers: a new call */
    pthread_cond_t finished; /* for the caller: the last piece is done */
    atomic_uint generation;  /* counts calls of dg_pool_run; a worker that sees a new one starts */
    atomic_bool quit;
    atomic_int n_sleeping;
    atomic_bool caller_sleeps;
    atomic_uint_least64_t ticket; /* generation in the upper half, next piece in the lower one */
    atomic_uint n_done;           /* pieces finished */
    atomic_uint n_items;          /* these four are read while they may be replaced; `ticket` tells */
    _Atomic(dg_work) work;
    _Atomic(void *) context;
    _Atomic(const dg_guard *) guarded; /* see guard.h */
    bool spin; /* false with more threads than cores: spinning would steal time from the threads that work */
};

typedef struct worker {
    dg_pool *pool;
    int thread;
} worker;

static inline void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* By the clock: a pause takes ten times as long on some processors as on others. */
typedef struct spinning {
    int64_t end; /* 0: not begun */
    int n;
} spinning;

static bool keep_spinning(const dg_pool *pool, spinning *s) {
    struct timespec t;
    if (!pool->spin) return false;
    pause_briefly();
    if (s->n++ % 32 != 0) return true;
    clock_gettime(CLOCK_MONOTONIC, &t);
    int64_t now = (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
    if (s->end == 0) s->end = now + SPIN_NS;
    return now < s->end;
}

#define NO_PIECE UINT32_MAX /* in the lower half of a ticket: closed, the call is being replaced */

static void take_items(dg_pool *pool, int thread) {
    for (;;) {
        uint64_t ticket = atomic_load(&pool->ticket);
        uint32_t item = (uint32_t)ticket;
        dg_work work = atomic_load_explicit(&pool->work, memory_order_relaxed);
        void *context = atomic_load_explicit(&pool->context, memory_order_relaxed);
        const dg_guard *guarded = atomic_load_explicit(&pool->guarded, memory_order_relaxed);
        const uint32_t n_items = atomic_load_explicit(&pool->n_items, memory_order_relaxed);
        if (item == NO_PIECE || item >= n_items) return;
        if (!atomic_compare_exchange_strong(&pool->ticket, &ticket, ticket + 1)) continue;
        /* The ticket had not changed since before the fields were read, so they belong to it. */
        if (thread > 0) dg_guard_adopt(guarded);
        work(context, item, thread);
        if (atomic_fetch_add(&pool->n_done, 1) + 1 == n_items && atomic_load(&pool->caller_sleeps)) {
            pthread_mutex_lock(&pool->mutex);
            pthread_cond_signal(&pool->finished);
            pthread_mutex_unlock(&pool->mutex);
        }
    }
}

static void *run_worker(void *argument) {
    worker *self = argument;
    dg_pool *pool = self->pool;
    unsigned seen = 0;
    for (;;) {
        unsigned generation;
        spinning s = {0};
        while ((generation = atomic_load(&pool->generation)) == seen && keep_spinning(pool, &s)) {
        }
        if (generation == seen) {
            pthread_mutex_lock(&pool->mutex);
            atomic_fetch_add(&pool->n_sleeping, 1);
            while ((generation = atomic_load(&pool->generation)) == seen) pthread_cond_wait(&pool->wake, &pool->mutex);
            atomic_fetch_sub(&pool->n_sleeping, 1);
            pthread_mutex_unlock(&pool->mutex);
        }
        seen = generation;
        if (atomic_load(&pool->quit)) break;
        take_items(pool, self->thread);
    }
    free(self);
    return NULL;
}

/* Publishes a new generation; sleepers are woken only where there are any. */
static void announce(dg_pool *pool) {
    atomic_fetch_add(&pool->generation, 1);
    if (atomic_load(&pool->n_sleeping) > 0) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->mutex);
    }
}

bool dg_thread_start(pthread_t *thread, void *(*run)(void *), void *argument) {
    sigset_t blocked, before;
    sigfillset(&blocked);
    sigdelset(&blocked, SIGBUS);
    sigdelset(&blocked, SIGFPE);
    sigdelset(&blocked, SIGILL);
    sigdelset(&blocked, SIGSEGV);
    sigdelset(&blocked, SIGTRAP);
    pthread_sigmask(SIG_BLOCK, &blocked, &before); /* a new thread begins with its maker's mask */
    int failed = pthread_create(thread, NULL, run, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return failed == 0;
}

dg_status dg_pool_create(int n_threads, dg_pool **out, dg_error *error) {
    *out = NULL;
    if (n_threads < 0 || n_threads > DG_MAX_THREADS)
        return dg_fail(error, DG_ERROR_ARGUMENT, "n_threads is %d; expected 0 (one a physical core) to %d", n_threads,
                       DG_MAX_THREADS);
    if (n_threads == 0) n_threads = dg_physical_cores();
    dg_pool *pool = calloc(1, sizeof *pool);
    pthread_t *threads = calloc((size_t)n_threads, sizeof *threads);
    if (pool == NULL || threads == NULL) {
        free(pool);
        free(threads);
        return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory for a pool of %d threads", n_threads);
    }
    pool->threads = threads;
    pool->process = getpid();
    pool->n_threads = 1;
    pool->spin = n_threads <= dg_logical_processors();
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->finished, NULL);
    while (pool->n_threads < n_threads) {
        worker *self = malloc(sizeof *self);
        if (self != NULL) *self = (worker){pool, pool->n_threads};
        if (self == NULL || !dg_thread_start(&threads[pool->n_threads - 1], run_worker, self)) {
            const int n_started = pool->n_threads;
            free(self);
            dg_pool_free(pool);
            return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "cannot start thread %d of %d", n_started + 1, n_threads);
        }
        pool->n_threads++;
    }
    *out = pool;
    return DG_OK;
}

void dg_pool_free(dg_pool *pool) {
    if (pool == NULL) return;
    /* In the child of a fork there are no threads to wait for, and the mutex may be held by one of them. */
    if (pool->process == getpid()) {
        atomic_store(&pool->quit, true);
        pthread_mutex_lock(&pool->mutex);
        atomic_fetch_add(&pool->generation, 1);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->mutex);
        for (int i = 0; i < pool->n_threads - 1; i++) pthread_join(pool->threads[i], NULL);
        pthread_cond_destroy(&pool->finished);
        pthread_cond_destroy(&pool->wake);
        pthread_mutex_destroy(&pool->mutex);
    }
    free(pool->threads);
    free(pool);
}

int dg_pool_size(const dg_pool *pool) { return pool->n_threads; }

static bool all_done(dg_pool *pool, uint32_t n_items) { return atomic_load(&pool->n_done) >= n_items; }

void dg_pool_run(dg_pool *pool, int64_t n, dg_work work, void *context) {
    const uint32_t n_items = (uint32_t)n;
    uint64_t generation = (atomic_load(&pool->ticket) >> 32) + 1;
    atomic_store(&pool->ticket, generation << 32 | NO_PIECE);
    atomic_store(&pool->work, work);
    atomic_store(&pool->context, context);
    atomic_store(&pool->guarded, dg_guard_current());
    atomic_store(&pool->n_items, n_items);
    atomic_store(&pool->n_done, 0);
    atomic_store(&pool->ticket, generation << 32);
    if (pool->n_threads > 1 && n_items > 1) announce(pool);
    take_items(pool, 0);
    spinning s = {0};
    while (!all_done(pool, n_items) && keep_spinning(pool, &s)) {
    }
    if (all_done(pool, n_items)) return;
    pthread_mutex_lock(&pool->mutex);
    atomic_store(&pool->caller_sleeps, true); /* before the next look: whoever finishes later sees it */
    while (!all_done(pool, n_items)) pthread_cond_wait(&pool->finished, &pool->mutex);
    atomic_store(&pool->caller_sleeps, false);
    pthread_mutex_unlock(&pool->mutex);
}
