/* Workers spin for a while after each piece of work, since the next one follows within microseconds during a forward
 * pass, then sleep on a condition variable, so that an idle session costs nothing. */
#define _GNU_SOURCE
#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "error.h"

#define SPINS_BEFORE_SLEEP 20000 /* about 50 µs */
#define MAX_THREADS 1024

struct dg_pool {
    int n_threads;
    pthread_t *threads; /* (n_threads − 1) */
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    atomic_uint generation; /* counts calls of dg_pool_run; a worker that sees a new one starts */
    atomic_bool quit;
    atomic_int n_sleeping;
    atomic_int n_busy; /* workers that have not finished the current generation */
    atomic_int_fast64_t next;
    int64_t n_items;
    dg_work work;
    void *context;
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

static void take_items(dg_pool *pool, int thread) {
    for (;;) {
        int64_t item = atomic_fetch_add_explicit(&pool->next, 1, memory_order_relaxed);
        if (item >= pool->n_items) return;
        pool->work(pool->context, item, thread);
    }
}

static void *run_worker(void *argument) {
    worker *self = argument;
    dg_pool *pool = self->pool;
    unsigned seen = 0;
    for (;;) {
        unsigned generation;
        int spins = pool->spin ? SPINS_BEFORE_SLEEP : 0;
        while ((generation = atomic_load(&pool->generation)) == seen && spins-- > 0) pause_briefly();
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
        atomic_fetch_sub_explicit(&pool->n_busy, 1, memory_order_acq_rel);
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

#if defined(__linux__)
static int read_topology(int cpu, const char *name) {
    char path[128];
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/%s", cpu, name);
    FILE *file = fopen(path, "r");
    int value = -1;
    if (file == NULL) return -1;
    if (fscanf(file, "%d", &value) != 1) value = -1;
    fclose(file);
    return value;
}
#endif

int dg_physical_cores(void) {
#if defined(__linux__)
    /* Hyper-threads of one core share its multipliers: count distinct (package, core) pairs among the allowed. */
    cpu_set_t allowed;
    static const int max_cores = 4096;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
        int n = 0;
        int *seen = malloc((size_t)max_cores * sizeof *seen);
        if (seen == NULL) return 1;
        for (int cpu = 0; cpu < CPU_SETSIZE && n < max_cores; cpu++) {
            if (!CPU_ISSET(cpu, &allowed)) continue;
            int core = read_topology(cpu, "core_id"), package = read_topology(cpu, "physical_package_id");
            int key = core < 0 ? -1 - cpu : (package < 0 ? 0 : package) * 65536 + core;
            int i = 0;
            while (i < n && seen[i] != key) i++;
            if (i == n) seen[n++] = key;
        }
        free(seen);
        if (n > 0) return n;
    }
#endif
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online < 1 ? 1 : (int)online;
}

dg_status dg_pool_create(int n_threads, dg_pool **out, dg_error *error) {
    *out = NULL;
    if (n_threads < 0 || n_threads > MAX_THREADS)
        return dg_fail(error, DG_ERROR_ARGUMENT, "n_threads is %d; expected 0 (one a physical core) to %d", n_threads,
                       MAX_THREADS);
    if (n_threads == 0) n_threads = dg_physical_cores();
    dg_pool *pool = calloc(1, sizeof *pool);
    pthread_t *threads = calloc((size_t)n_threads, sizeof *threads);
    if (pool == NULL || threads == NULL) {
        free(pool);
        free(threads);
        return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory for a pool of %d threads", n_threads);
    }
    pool->threads = threads;
    pool->n_threads = 1;
    pool->spin = n_threads <= sysconf(_SC_NPROCESSORS_ONLN);
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    while (pool->n_threads < n_threads) {
        worker *self = malloc(sizeof *self);
        if (self != NULL) *self = (worker){pool, pool->n_threads};
        if (self == NULL || pthread_create(&threads[pool->n_threads - 1], NULL, run_worker, self) != 0) {
            free(self);
            dg_pool_free(pool);
            return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "cannot start thread %d of %d", pool->n_threads + 1,
                           n_threads);
        }
        pool->n_threads++;
    }
    *out = pool;
    return DG_OK;
}

void dg_pool_free(dg_pool *pool) {
    if (pool == NULL) return;
    atomic_store(&pool->quit, true);
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->generation, 1);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
    for (int i = 0; i < pool->n_threads - 1; i++) pthread_join(pool->threads[i], NULL);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->mutex);
    free(pool->threads);
    free(pool);
}

int dg_pool_size(const dg_pool *pool) { return pool->n_threads; }

void dg_pool_run(dg_pool *pool, int64_t n_items, dg_work work, void *context) {
    pool->work = work;
    pool->context = context;
    pool->n_items = n_items;
    atomic_store(&pool->next, 0);
    if (pool->n_threads == 1 || n_items <= 1) {
        take_items(pool, 0);
        return;
    }
    atomic_store(&pool->n_busy, pool->n_threads - 1);
    announce(pool);
    take_items(pool, 0);
    int spins = 0;
    while (atomic_load_explicit(&pool->n_busy, memory_order_acquire) > 0) {
        if (pool->spin && spins++ < SPINS_BEFORE_SLEEP)
            pause_briefly();
        else
            sched_yield();
    }
}
