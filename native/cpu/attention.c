/* Projections to queries, keys and values with their norms and rotations, attention over the cache, and the output
 * projection. */
#include "cpu/cpu.h"

#include <math.h>
#include <string.h>

#include "quant/quant.h"

/* ---- Rotation ------------------------------------------------------------------------------------------------ */

typedef struct rope_job {
    dg_rope *rope;
    const float *frequencies;
} rope_job;

static void turn_token(void *context, int64_t item, int thread) {
    const rope_job *job = context;
    dg_rope *rope = job->rope;
    const int32_t n = rope->n_rot / 2;
    for (int32_t i = 0; i < n; i++) {
        float angle = (float)(rope->position + item) * job->frequencies[i];
        rope->cosine[item * n + i] = cosf(angle);
        rope->sine[item * n + i] = sinf(angle);
    }
}

/* The table of `layer`'s kind for n tokens from `position`; made anew only where it is not the last one. The reference
 * computes frequencies and angles in float32, so that is what is done here. */
static const dg_rope *rope_of(dg_backend *backend, const dg_layer *layer, int32_t position, int32_t n) {
    dg_rope *rope = &backend->rope[layer->sliding];
    if (rope->base == layer->rope_base && rope->head_dim == layer->head_dim && rope->n_rot == layer->n_rot &&
        rope->position == position && rope->n == n)
        return rope;
    float *frequencies = backend->threads[0].row;
    for (int32_t i = 0; i < layer->n_rot / 2; i++)
        frequencies[i] = 1.0f / powf(layer->rope_base, (float)(2 * i) / (float)layer->head_dim);
    rope->base = layer->rope_base;
    rope->head_dim = layer->head_dim;
    rope->n_rot = layer->n_rot;
    rope->position = position;
    rope->n = n;
    rope_job job = {rope, frequencies};
    dg_pool_run(backend->pool, n, turn_token, &job);
    return rope;
}

/* ---- Queries, keys and values -------------------------------------------------------------------------------- */

typedef struct projection {
    dg_backend *backend;
    const dg_layer *layer;
    const dg_rope *rope;
    float *q; /* NULL where not wanted */
    const dg_kv *kv;
    int32_t position;
    int64_t k_row_bytes, v_row_bytes;
} projection;

static int64_t cache_row_bytes(int32_t type, int32_t n) {
    const dg_type_traits *traits = dg_type_traits_of(type);
    return (int64_t)(n + traits->block_size - 1) / traits->block_size * traits->block_bytes;
}

static void finish_queries(const projection *p, int64_t token, float *q) {
    const dg_cpu_kernels *kernels = p->backend->kernels;
    const dg_layer *layer = p->layer;
    const int32_t half = layer->head_dim / 2, rotated = layer->n_rot / 2;
    const float *cosine = p->rope->cosine + token * rotated, *sine = p->rope->sine + token * rotated;
    for (int32_t h = 0; h < p->backend->model->n_heads; h++, q += layer->head_dim) {
        kernels->rms_norm(q, layer->attn_q_norm, layer->head_dim, p->backend->model->rms_eps, q);
        kernels->rotate(q, half, cosine, sine, rotated);
        if (layer->attn_v.data != NULL) continue;
        for (int32_t i = rotated; i < half; i++) { /* these will meet v in place of k = v ∘ k_norm */
            q[i] *= layer->attn_k_norm[i];
            q[half + i] *= layer->attn_k_norm[half + i];
        }
    }
}

static void store_keys_and_values(const projection *p, int64_t token, float *scratch) {
    const dg_backend *backend = p->backend;
    const dg_cpu_kernels *kernels = backend->kernels;
    const dg_layer *layer = p->layer;
    const int32_t dim = layer->head_dim, half = dim / 2, rotated = layer->n_rot / 2;
    const float *cosine = p->rope->cosine + token * rotated, *sine = p->rope->sine + token * rotated;
    const float eps = backend->model->rms_eps;
    const int64_t slot = (p->position + token) % p->kv->capacity;
    for (int32_t h = 0; h < layer->n_kv_heads; h++) {
        const float *k = backend->k + (token * layer->n_kv_heads + h) * dim;
        const float *v = layer->attn_v.data != NULL ? backend->v + (token * layer->n_kv_heads + h) * dim : k;
        const int64_t row = h * p->kv->capacity + slot;
        kernels->rms_norm(v, NULL, dim, eps, scratch);
        kernels->store_cache(backend->params.type_v, scratch, dim, (uint8_t *)p->kv->v + row * p->v_row_bytes);
        kernels->rms_norm(k, layer->attn_k_norm, dim, eps, scratch);
        kernels->rotate(scratch, half, cosine, sine, rotated);
        if (layer->attn_v.data == NULL) memmove(scratch + rotated, scratch + half, (size_t)rotated * sizeof *scratch);
        kernels->store_cache(backend->params.type_k, scratch, dg_layer_k_dim(layer),
                             (uint8_t *)p->kv->k + row * p->k_row_bytes);
    }
}

static void finish_token(void *context, int64_t token, int thread) {
    const projection *p = context;
    if (p->q != NULL) finish_queries(p, token, p->q + token * p->backend->model->n_heads * p->layer->head_dim);
    store_keys_and_values(p, token, p->backend->threads[thread].row);
}

void dg_cpu_project_qkv(dg_backend *backend, const dg_layer *layer, const float *x, int32_t n, int32_t position,
                        float *q, const dg_kv *kv) {
    const dg_cpu_kernels *kernels = backend->kernels;
    const dg_weight *weights[3] = {&layer->attn_q, &layer->attn_k, &layer->attn_v};
    float *outs[3] = {q, backend->k, backend->v};
    dg_rows rows = {0};
    for (int i = 0; i < 3; i++) {
        if (outs[i] == NULL || weights[i]->data == NULL) continue;
        dg_form form = dg_form_of(kernels, weights[i]);
        if (rows.n == 0 || !dg_form_equal(form, rows.form)) /* q, k and v may be of different types */
            rows = dg_pack_normed(backend, form, x, n, weights[i]->n_cols, layer->attn_norm, 1.0f);
        dg_collect_rows(backend, weights[i], x, n, layer->attn_norm);
        dg_matmul(backend, weights[i], &rows, outs[i]);
    }
    projection p = {.backend = backend,
                    .layer = layer,
                    .rope = rope_of(backend, layer, position, n),
                    .q = q,
                    .kv = kv,
                    .position = position,
                    .k_row_bytes = cache_row_bytes(backend->params.type_k, dg_layer_k_dim(layer)),
                    .v_row_bytes = cache_row_bytes(backend->params.type_v, layer->head_dim)};
    dg_pool_run(backend->pool, n, finish_token, &p);
}

/* ---- Attention ----------------------------------------------------------------------------------------------- */

typedef struct attention_job {
    dg_backend *backend;
    const dg_layer *layer;
    const dg_kv_span *spans;
    int32_t n_spans;
    dg_attention common; /* of all KV heads */
    int32_t n_rows;      /* query rows of one KV head */
    int64_t n_pieces;    /* of one KV head */
} attention_job;

/* The spans of one KV head as runs of consecutive memory. */
static void find_runs(const attention_job *job, int64_t head, dg_attention *a) {
    a->n_runs = 0;
    for (int32_t i = 0; i < job->n_spans; i++) {
        const dg_kv_span *span = &job->spans[i];
        const int64_t capacity = span->kv->capacity;
        for (int32_t done = 0; done < span->n;) {
            int64_t slot = (span->position + done) % capacity;
            int32_t n = span->n - done;
            if (n > capacity - slot) n = (int32_t)(capacity - slot);
            a->runs[a->n_runs++] = (dg_kv_run){(const uint8_t *)span->kv->k + (head * capacity + slot) * a->k_row_bytes,
                                               (const uint8_t *)span->kv->v + (head * capacity + slot) * a->v_row_bytes,
                                               span->position + done, n};
            done += n;
        }
    }
}

static void attend_piece(void *context, int64_t item, int thread) {
    const attention_job *job = context;
    const dg_cpu_kernels *kernels = job->backend->kernels;
    const int64_t head = item % job->layer->n_kv_heads;
    const int32_t first = (int32_t)(item / job->layer->n_kv_heads) * kernels->attention_rows;
    const int32_t left = job->n_rows - first;
    dg_attention a = job->common;
    a.q += head * a.group * a.head_dim;
    a.out += head * a.group * a.head_dim;
    find_runs(job, head, &a);
    kernels->attend(&a, first, left < kernels->attention_rows ? left : kernels->attention_rows,
                    job->backend->threads[thread].attention);
}

void dg_cpu_attend(dg_backend *backend, const dg_layer *layer, const float *q, int32_t n, int32_t position, bool causal,
                   const dg_kv_span *spans, int32_t n_spans, float *out) {
    const int32_t n_heads = backend->model->n_heads, rows = backend->kernels->attention_rows;
    attention_job job = {.backend = backend, .layer = layer, .spans = spans, .n_spans = n_spans};
    job.common = (dg_attention){.q = q,
                                .out = out,
                                .token_stride = (int64_t)n_heads * layer->head_dim,
                                .group = n_heads / layer->n_kv_heads,
                                .head_dim = layer->head_dim,
                                .n_rot = layer->attn_v.data != NULL ? layer->head_dim : layer->n_rot,
                                .type_k = backend->params.type_k,
                                .type_v = backend->params.type_v,
                                .k_row_bytes = cache_row_bytes(backend->params.type_k, dg_layer_k_dim(layer)),
                                .v_row_bytes = cache_row_bytes(backend->params.type_v, layer->head_dim),
                                .causal = causal,
                                .position = position,
                                .window = layer->sliding ? backend->model->sliding_window : 0};
    job.n_rows = n * job.common.group;
    job.n_pieces = (job.n_rows + rows - 1) / rows;
    dg_pool_run(backend->pool, job.n_pieces * layer->n_kv_heads, attend_piece, &job);
}

typedef struct residual {
    dg_backend *backend;
    const float *norm;
    float *x;
} residual;

static void add_residual(void *context, int64_t row, int thread) {
    const residual *r = context;
    const int64_t n_embd = r->backend->model->n_embd;
    float *normed = r->backend->threads[thread].row, *x = r->x + row * n_embd;
    r->backend->kernels->rms_norm(r->backend->product + row * n_embd, r->norm, n_embd, r->backend->model->rms_eps,
                                  normed);
    r->backend->kernels->add(x, normed, n_embd, x);
}

void dg_cpu_project_output(dg_backend *backend, const dg_layer *layer, const float *a, int32_t n, float *x) {
    dg_rows rows = dg_pack(backend, dg_form_of(backend->kernels, &layer->attn_output), a, n, layer->attn_output.n_cols);
    dg_collect_rows(backend, &layer->attn_output, a, n, NULL);
    dg_matmul(backend, &layer->attn_output, &rows, backend->product);
    residual r = {backend, layer->post_attention_norm, x};
    dg_pool_run(backend->pool, n, add_residual, &r);
}
