/* Operations on one row at a time. */
#include "cpu/cpu.h"

#include <math.h>

#include "quant/quant.h"

typedef struct row_job {
    dg_backend *backend;
    const dg_layer *layer;
    const int32_t *ids;
    float *x;
    const float *d, *e;
    float factor;
} row_job;

static void embed_row(void *context, int64_t row, int thread) {
    const row_job *job = context;
    const dg_weight *table = &job->backend->model->token_embd;
    const int64_t n_embd = table->n_cols;
    const uint8_t *src = (const uint8_t *)table->data + (uint64_t)job->ids[row] * dg_row_bytes(table->type, n_embd);
    float *x = job->x + row * n_embd;
    dg_type_traits_of(table->type)->decode(src, x, n_embd);
    job->backend->kernels->scale(x, job->factor, n_embd, x);
}

void dg_cpu_embed(dg_backend *backend, const int32_t *host_ids, int32_t n, float *x) {
    const dg_weight *table = &backend->model->token_embd;
    row_job job = {.backend = backend, .ids = host_ids, .x = x, .factor = sqrtf((float)table->n_cols)};
    if (host_ids == NULL) job.ids = backend->canvas->ids;
    if (table->scale != NULL) job.factor *= table->scale[0];
    dg_pool_run(backend->pool, n, embed_row, &job);
}

static void add_norm_row(void *context, int64_t row, int thread) {
    const row_job *job = context;
    const dg_model *model = job->backend->model;
    const int64_t n_embd = model->n_embd;
    float *x = job->x + row * n_embd;
    if (job->d != NULL) job->backend->kernels->add(x, job->d + row * n_embd, n_embd, x);
    job->backend->kernels->rms_norm(x, NULL, n_embd, model->rms_eps, x);
}

void dg_cpu_add_norm(dg_backend *backend, float *x, const float *d, int32_t n) {
    row_job job = {.backend = backend, .x = x, .d = d};
    dg_pool_run(backend->pool, n, add_norm_row, &job);
}

static void combine_row(void *context, int64_t row, int thread) {
    const row_job *job = context;
    const dg_cpu_kernels *kernels = job->backend->kernels;
    const int64_t n_embd = job->backend->model->n_embd;
    const float eps = job->backend->model->rms_eps;
    float *x = job->x + row * n_embd, *d = job->backend->threads[thread].row, *e = d + n_embd;
    kernels->rms_norm(job->d + row * n_embd, job->layer->post_mlp_norm, n_embd, eps, d);
    kernels->rms_norm(job->e + row * n_embd, job->layer->post_moe_norm, n_embd, eps, e);
    kernels->add(d, e, n_embd, d);
    kernels->rms_norm(d, job->layer->post_ffn_norm, n_embd, eps, d);
    kernels->add(x, d, n_embd, x);
    kernels->scale(x, job->factor, n_embd, x);
}

void dg_cpu_combine(dg_backend *backend, const dg_layer *layer, float *x, const float *d, const float *e, int32_t n,
                    float scalar) {
    row_job job = {.backend = backend, .layer = layer, .x = x, .d = d, .e = e, .factor = scalar};
    dg_pool_run(backend->pool, n, combine_row, &job);
}
