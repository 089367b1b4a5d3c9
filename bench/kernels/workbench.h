/* What the kernel benches share: time, random weights, and a table of figures.
 *
 * Everything runs on one thread and is measured in that thread's processor time, so that other programs on the machine
 * disturb it little. Each figure is the best of several rounds, and stands beside the machine's limit measured in the
 * same run. */
#ifndef DG_WORKBENCH_H
#define DG_WORKBENCH_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/pages.h"
#include "cpu/kernels/kernels.h"
#include "device/backend.h"
#include "quant/float.h"
#include "quant/quant.h"

static inline double bench_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Seconds of one call of `work`, the best of `rounds`. */
static inline double bench_best(int rounds, void (*work)(void *context), void *context) {
    double best = INFINITY;
    for (int i = 0; i < rounds; i++) {
        double start = bench_now();
        work(context);
        double seconds = bench_now() - start;
        if (seconds < best) best = seconds;
    }
    return best;
}

/* Operations a second that one thread reaches from registers alone. */
static inline double bench_peak(double (*peak)(int64_t n_rounds, float *sink)) {
    float sink[DG_MAX_LANES] = {0};
    double best = 0;
    for (int i = 0; i < 20; i++) {
        double start = bench_now(), done = peak(1 << 16, sink);
        double rate = done / (bench_now() - start);
        if (rate > best) best = rate;
    }
    return best;
}

static inline void *bench_memory(uint64_t n_bytes) {
    void *memory = dg_pages_allocate(n_bytes);
    if (memory == NULL) {
        fprintf(stderr, "no memory for %.0f MiB\n", (double)n_bytes / (1 << 20));
        exit(1);
    }
    return memory;
}

static inline uint32_t bench_random(uint64_t *state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 32);
}

/* Roughly normal, from the sum of four uniform numbers. */
static inline float *bench_floats(int64_t n, float size, uint64_t seed) {
    float *x = bench_memory((uint64_t)n * sizeof *x);
    uint64_t state = seed;
    for (int64_t i = 0; i < n; i++) {
        float sum = -2.0f;
        for (int k = 0; k < 4; k++) sum += (float)bench_random(&state) * 0x1p-32f;
        x[i] = sum * 1.73f * size;
    }
    return x;
}

/* Encoded from normal numbers; a type that is only read gets a pattern instead, whose values are as good as any. Rows
 * repeat after a while, since encoding is slow and the kernels do not care. */
static inline dg_weight bench_weight(int32_t type, int32_t n_matrices, int64_t n_rows, int64_t n_cols) {
    const uint64_t row_bytes = dg_row_bytes(type, n_cols);
    uint8_t *data = bench_memory((uint64_t)n_matrices * (uint64_t)n_rows * row_bytes);
    const int64_t n_distinct = 64;
    float *values = bench_floats(n_distinct * n_cols, 0.02f, 7);
    if (dg_quantize(DG_TYPE_F32, values, type, data, n_distinct, n_cols, NULL, NULL, 1, NULL) != DG_OK)
        memset(data, 0x11, (size_t)n_distinct * row_bytes);
    for (int64_t r = n_distinct; r < n_matrices * n_rows; r++)
        memcpy(data + (uint64_t)r * row_bytes, data + (uint64_t)(r % n_distinct) * row_bytes, row_bytes);
    free(values);
    return (dg_weight){data, NULL, type, n_matrices, n_rows, n_cols, (uint64_t)n_rows * row_bytes};
}

/* A model of the released sizes, but for its weights: one layer of each kind. */
static inline dg_model bench_model(dg_layer layers[2]) {
    layers[0] = (dg_layer){.sliding = true, .head_dim = 256, .n_kv_heads = 8, .n_rot = 256, .rope_base = 1e4f};
    layers[1] = (dg_layer){.head_dim = 512, .n_kv_heads = 2, .n_rot = 128, .rope_base = 1e6f};
    return (dg_model){.n_layers = 2,
                      .n_embd = 2816,
                      .n_vocab = 262144,
                      .n_heads = 16,
                      .n_ff = 2112,
                      .n_experts = 128,
                      .n_experts_used = 8,
                      .n_ff_expert = 704,
                      .sliding_window = 1024,
                      .canvas_length = 256,
                      .rms_eps = 1e-6f,
                      .logit_softcap = 30.0f,
                      .layers = layers};
}

static inline dg_backend *bench_backend(const dg_model *model, int32_t max_rows, int32_t type_kv, float bound) {
    dg_backend_params params = {model, 1, max_rows, type_kv, type_kv, bound};
    dg_backend *backend;
    dg_error error = {0};
    if (dg_cpu_backend.create(&params, &backend, &error) != DG_OK) {
        fprintf(stderr, "%s\n", error.message);
        exit(1);
    }
    return backend;
}

/* Root-mean-square difference over root-mean-square value. */
static inline double bench_error(const float *a, const float *b, int64_t n) {
    double difference = 0, size = 0;
    for (int64_t i = 0; i < n; i++) {
        difference += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        size += (double)b[i] * (double)b[i];
    }
    return sqrt(difference / (size > 0 ? size : 1));
}

static inline void bench_check(const char *what, double error, double tolerance) {
    if (error <= tolerance) return;
    fprintf(stderr, "%s: relative error %.2e, at most %.0e expected\n", what, error, tolerance);
    exit(1);
}

#endif
