/* What this machine can do at most, measured: the figures that a kernel's speed is a share of. */
#define _POSIX_C_SOURCE 199309L
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/error.h"
#include "base/threads.h"
#include "cpu/kernels/kernels.h"

#define SECONDS_EACH 0.2
#define READ_BYTES ((int64_t)512 << 20) /* far larger than the caches */
#define READ_PIECE ((int64_t)1 << 20)

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef struct load {
    double (*peak)(int64_t n_rounds, float *sink);
    int64_t n_rounds;
    double done; /* operations of one piece, the same for each */
    const uint64_t *memory;
    uint64_t sum;
} load;

static void multiply(void *context, int64_t item, int thread) {
    load *l = context;
    float sink[DG_MAX_LANES] = {0};
    double done = l->peak(l->n_rounds, sink);
    if (item == 0) l->done = done;
}

/* Operations a second of all threads together. */
static double rate(dg_pool *pool, double (*peak)(int64_t, float *)) {
    load l = {.peak = peak, .n_rounds = 1 << 12};
    const int n_threads = dg_pool_size(pool);
    for (;;) { /* twice as long until it takes long enough */
        double start = now();
        dg_pool_run(pool, n_threads, multiply, &l);
        double seconds = now() - start;
        if (l.done == 0) return 0;
        if (seconds >= SECONDS_EACH) return l.done * n_threads / seconds;
        l.n_rounds *= 2;
    }
}

static void read_piece(void *context, int64_t item, int thread) {
    load *l = context;
    const uint64_t *words = l->memory + item * (READ_PIECE / 8);
    uint64_t sums[8] = {0};
    for (int64_t i = 0; i < READ_PIECE / 8; i += 8)
        for (int j = 0; j < 8; j++) sums[j] += words[i + j];
    uint64_t sum = 0;
    for (int j = 0; j < 8; j++) sum += sums[j];
    __atomic_fetch_add(&l->sum, sum, __ATOMIC_RELAXED);
}

static dg_status read_rate(dg_pool *pool, double *bytes_per_s, dg_error *error) {
    load l = {.memory = NULL};
    uint64_t *memory = malloc((size_t)READ_BYTES);
    if (memory == NULL)
        return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory for the %d MiB that are read to measure the memory",
                       (int)(READ_BYTES >> 20));
    memset(memory, 1, (size_t)READ_BYTES);
    l.memory = memory;
    double best = 0, begin = now();
    do {
        double start = now();
        dg_pool_run(pool, READ_BYTES / READ_PIECE, read_piece, &l);
        double seconds = now() - start;
        if ((double)READ_BYTES / seconds > best) best = (double)READ_BYTES / seconds;
    } while (now() - begin < SECONDS_EACH);
    free(memory);
    *bytes_per_s = best;
    return DG_OK;
}

dg_status dg_measure_limits(int32_t n_threads, dg_limits *limits, dg_error *error) {
    const dg_cpu_kernels *kernels = dg_cpu_kernels_choose();
    dg_pool *pool;
    if (limits == NULL) return dg_fail(error, DG_ERROR_ARGUMENT, "limits is NULL; expected where to write them");
    DG_TRY(dg_pool_create(n_threads, &pool, error));
    limits->int8_gop_per_s = rate(pool, kernels->peak_int8) * 1e-9;
    limits->bf16_gflop_per_s = rate(pool, kernels->peak_bf16) * 1e-9;
    limits->f32_gflop_per_s = rate(pool, kernels->peak_f32) * 1e-9;
    double bytes_per_s = 0;
    dg_status status = read_rate(pool, &bytes_per_s, error);
    limits->read_gb_per_s = bytes_per_s * 1e-9;
    dg_pool_free(pool);
    return status;
}
