/* Squares of activations, for importance matrices. Added up on the calling thread, row by row, so that the sums do not
 * depend on the number of threads. */
#include "cpu/cpu.h"

void dg_cpu_collect(dg_backend *backend, dg_collector *collector) { backend->collector = collector; }

/* Row `row` of x, normed where there is a `norm`. */
static const float *input_row(dg_backend *backend, const float *x, int64_t row, int64_t n_cols, const float *norm) {
    x += row * n_cols;
    if (norm == NULL) return x;
    float *normed = backend->threads[0].row;
    backend->kernels->rms_norm(x, norm, n_cols, backend->model->rms_eps, normed);
    return normed;
}

void dg_collect_rows(dg_backend *backend, const dg_weight *w, const float *x, int32_t n, const float *norm) {
    dg_squares *squares = dg_collector_of(backend->collector, w);
    if (squares == NULL) return;
    for (int32_t r = 0; r < n; r++) dg_squares_add(squares, 0, 0, input_row(backend, x, r, w->n_cols, norm), w->n_cols);
}

void dg_collect_chosen(dg_backend *backend, const dg_weight *w, const float *x, int32_t n, const float *norm) {
    dg_squares *squares = dg_collector_of(backend->collector, w);
    if (squares == NULL) return;
    const int32_t n_used = backend->model->n_experts_used;
    for (int32_t r = 0; r < n; r++) {
        const float *row = input_row(backend, x, r, w->n_cols, norm);
        for (int32_t i = 0; i < n_used; i++)
            dg_squares_add(squares, backend->chosen[(int64_t)r * n_used + i], 0, row, w->n_cols);
    }
}
