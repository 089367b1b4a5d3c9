/* A session's view of the processor: its threads, and its scratch memory in one allocation. */
#include "device/backend.h"

#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "base/machine.h"
#include "cpu/cpu.h"

#define ALIGNMENT 64

/* Hands out consecutive, aligned pieces; with base NULL it only counts. */
typedef struct carving {
    char *base;
    uint64_t offset;
} carving;

static void *carve(carving *c, uint64_t n_bytes) {
    void *piece = c->base != NULL ? c->base + c->offset : NULL;
    c->offset += (n_bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return piece;
}

static float *carve_floats(carving *c, int64_t n) { return carve(c, (uint64_t)n * sizeof(float)); }

/* The largest sizes of any operation. */
typedef struct sizes {
    int64_t n_cols;   /* of a dense weight's rows */
    int64_t n_hidden; /* of a gated MLP */
    int64_t kv;       /* n_kv_heads·head_dim */
    int64_t rot;      /* n_rot */
    int32_t head_dim;
} sizes;

static void raise_to(int64_t *largest, int64_t n) {
    if (n > *largest) *largest = n;
}

static sizes sizes_of(const dg_model *model) {
    sizes s = {.n_cols = model->n_embd, .n_hidden = model->self_conditioning.gate.n_rows};
    for (int32_t i = 0; i < model->n_layers; i++) {
        const dg_layer *layer = &model->layers[i];
        raise_to(&s.n_cols, (int64_t)model->n_heads * layer->head_dim);
        raise_to(&s.n_hidden, layer->mlp.gate.n_rows);
        raise_to(&s.kv, (int64_t)layer->n_kv_heads * layer->head_dim);
        raise_to(&s.rot, layer->n_rot);
        if (layer->head_dim > s.head_dim) s.head_dim = layer->head_dim;
    }
    return s;
}

/* n_embd in whole panels. */
static int64_t padded_embd(const dg_backend *b) {
    const int64_t lanes = b->kernels->lanes;
    return (b->model->n_embd + lanes - 1) / lanes * lanes;
}

static void carve_thread(const dg_backend *backend, const sizes *s, carving *c, dg_thread *thread) {
    const dg_cpu_kernels *kernels = backend->kernels;
    const int64_t rows = backend->params.max_rows, canvas = backend->model->canvas_length, lanes = kernels->lanes;
    int64_t n_cols = s->n_cols;
    raise_to(&n_cols, s->n_hidden);
    raise_to(&n_cols, backend->model->n_ff_expert);
    n_cols = (n_cols + DG_MAX_LANES - 1) / DG_MAX_LANES * DG_MAX_LANES; /* decoding writes whole vectors */
    const int64_t strip = dg_strip_cols(kernels, (dg_form){.integer = true}, INT32_MAX);
    thread->panel.values = carve_floats(c, strip * lanes);
    thread->panel.codes = (uint8_t *)thread->panel.values;
    thread->panel.scales = carve_floats(c, strip / 16 * lanes);
    thread->panel.mins = carve_floats(c, strip / 16 * lanes);
    if (kernels->multiply_tiled != NULL) {
        int64_t most = DG_TILED_SCRATCH;
        raise_to(&most, kernels->head_span_bytes(backend->model->n_embd, dg_rows_n_tiles(kernels, (int32_t)canvas)));
        thread->tile_scratch = carve(c, (uint64_t)most);
    }
    thread->sums = carve_floats(c, (rows + kernels->tile_rows) * lanes);
    thread->row = carve_floats(c, 2 * n_cols);
    thread->tile_rows = carve_floats(c, kernels->tile_rows * n_cols);
    thread->gate = carve_floats(c, rows * DG_FEATURES);
    thread->up = carve_floats(c, rows * DG_FEATURES);
    thread->logits = carve_floats(c, canvas * DG_VOCABULARY_BLOCK);
    thread->attention = carve_floats(c, kernels->attend_scratch(s->head_dim));
}

static void carve_soft_round(dg_backend *b, carving *c) {
    const dg_form form = dg_form_of(b->kernels, &b->model->token_embd);
    const int64_t canvas = b->model->canvas_length, blocks = DG_ROUND_BLOCKS, tokens = blocks * DG_VOCABULARY_BLOCK;
    const bool narrow = b->kernels->has_narrow && form.integer;
    dg_soft_round *round = &b->soft_round;
    if (form.weight_tiles) return;
    round->logits = carve_floats(c, canvas * tokens);
    round->decisions = carve(c, (uint64_t)(canvas * blocks) * sizeof *round->decisions);
    round->values = carve_floats(c, tokens / (narrow ? 2 : 1) * padded_embd(b));
    round->value_scales = carve_floats(c, tokens / b->kernels->lanes * (padded_embd(b) / b->kernels->lanes));
    round->weights = carve_floats(c, (canvas + b->kernels->tile_rows) * tokens);
    round->weight_scales = carve_floats(c, canvas * blocks);
    round->factors = carve_floats(c, canvas * blocks);
    round->rows = carve(c, (uint64_t)(canvas * blocks) * sizeof *round->rows);
    round->n_rows = carve(c, (uint64_t)blocks * sizeof *round->n_rows);
}

/* Sets every pointer of `backend` and of its first n_threads `threads`; returns the bytes in all. */
static uint64_t lay_out(dg_backend *b, int32_t n_threads, char *base) {
    carving c = {base, 0};
    const dg_model *model = b->model;
    const sizes s = sizes_of(model);
    const int64_t rows = b->params.max_rows, canvas = model->canvas_length, n_embd = model->n_embd;
    const int64_t pairs = rows * model->n_experts_used;
    const int64_t tiles = dg_rows_n_tiles(b->kernels, b->params.max_rows);
    /* every expert may leave one tile unfilled */
    const int64_t expert_tiles = pairs / b->kernels->tile_rows + (pairs < model->n_experts ? pairs : model->n_experts);

    b->packed = carve(&c, dg_rows_bytes(b->kernels, tiles, s.n_cols));
    b->packed_hidden = carve(&c, dg_rows_bytes(b->kernels, tiles, s.n_hidden));
    b->product = carve_floats(&c, rows * n_embd);
    b->k = carve_floats(&c, rows * s.kv);
    b->v = carve_floats(&c, rows * s.kv);
    for (int i = 0; i < 2; i++) {
        b->rope[i].cosine = carve_floats(&c, rows * s.rot / 2);
        b->rope[i].sine = carve_floats(&c, rows * s.rot / 2);
    }
    b->router_logits = carve_floats(&c, rows * model->n_experts);
    b->chosen = carve(&c, (uint64_t)pairs * sizeof *b->chosen);
    b->expert_weight = carve_floats(&c, pairs);
    b->expert_row = carve(&c, (uint64_t)pairs * sizeof *b->expert_row);
    b->row_of_expert = carve(&c, (uint64_t)pairs * sizeof *b->row_of_expert);
    b->experts = carve(&c, (uint64_t)model->n_experts * sizeof *b->experts);
    b->expert_rank = carve(&c, (uint64_t)model->n_experts * 2 * sizeof *b->expert_rank);
    b->packed_experts = carve(&c, dg_rows_bytes(b->kernels, expert_tiles, n_embd));
    b->packed_experts_hidden = carve(&c, dg_rows_bytes(b->kernels, expert_tiles, model->n_ff_expert));
    b->expert_out = carve_floats(&c, pairs * n_embd);

    b->block_statistics =
        carve(&c, (uint64_t)canvas * (uint64_t)((model->n_vocab + DG_VOCABULARY_BLOCK - 1) / DG_VOCABULARY_BLOCK) *
                      sizeof *b->block_statistics);
    carve_soft_round(b, &c);
    b->online_softmax = carve(&c, (uint64_t)canvas * sizeof *b->online_softmax);
    b->argmax = carve(&c, (uint64_t)canvas * sizeof *b->argmax);
    b->candidates = carve(&c, (uint64_t)canvas * sizeof *b->candidates);
    b->order = carve(&c, (uint64_t)canvas * sizeof *b->order);
    b->uniforms = carve_floats(&c, canvas);
    b->soft_sums = carve_floats(&c, (canvas + b->kernels->tile_rows) * padded_embd(b));
    dg_thread unused;
    for (int32_t i = 0; i < n_threads; i++) carve_thread(b, &s, &c, b->threads != NULL ? &b->threads[i] : &unused);
    return c.offset;
}

static int32_t threads_of(const dg_backend_params *params) {
    return params->n_threads > 0 ? params->n_threads : dg_physical_cores();
}

static uint64_t scratch_bytes(const dg_backend_params *params) {
    dg_backend b = {.params = *params, .model = params->model, .kernels = dg_cpu_kernels_choose()};
    return lay_out(&b, threads_of(params), NULL);
}

static void free_backend(dg_backend *backend) {
    if (backend == NULL) return;
    dg_pool_free(backend->pool);
    free(backend->memory);
    free(backend->threads);
    free(backend);
}

static dg_status create(const dg_backend_params *params, dg_backend **out, dg_error *error) {
    *out = NULL;
    dg_status status = DG_OK;
    dg_backend *b = calloc(1, sizeof *b);
    if (b == NULL) return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory for a session");
    b->params = *params;
    b->model = params->model;
    b->kernels = dg_cpu_kernels_choose();
    const int32_t n_threads = threads_of(params);
    const uint64_t n_bytes = scratch_bytes(params);
    b->threads = calloc((size_t)n_threads, sizeof *b->threads);
    b->memory = aligned_alloc(ALIGNMENT, n_bytes);
    if (b->threads == NULL || b->memory == NULL) {
        status = dg_fail(error, DG_ERROR_OUT_OF_MEMORY,
                         "no memory for %.0f MiB of scratch; a smaller n_batch or fewer threads need less",
                         (double)n_bytes / (1 << 20));
        goto done;
    }
    lay_out(b, n_threads, b->memory);
    status = dg_pool_create(n_threads, &b->pool, error);
done:
    if (status != DG_OK) {
        free_backend(b);
        return status;
    }
    *out = b;
    return DG_OK;
}

static dg_status allocate(dg_backend *backend, int32_t place, uint64_t n_bytes, void **memory, dg_error *error) {
    uint64_t rounded = (n_bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    *memory = NULL;
    if (rounded < n_bytes || posix_memalign(memory, ALIGNMENT, rounded > 0 ? rounded : ALIGNMENT) != 0)
        return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory for %.0f MiB", (double)n_bytes / (1 << 20));
    memset(*memory, 0, n_bytes);
    return DG_OK;
}

static void release(dg_backend *backend, void *memory) { free(memory); }

static void copy_in(dg_backend *backend, void *memory, const void *host_data, uint64_t n_bytes) {
    memcpy(memory, host_data, n_bytes);
}

static void copy_out(dg_backend *backend, void *host_data, const void *memory, uint64_t n_bytes) {
    memcpy(host_data, memory, n_bytes);
}

/* Operations run as they are called, and none can fail. */
static dg_status finish(dg_backend *backend, dg_error *error) { return DG_OK; }

const char *dg_cpu_backend_name(void) { return dg_cpu_kernels_choose()->backend_name; }

const dg_backend_ops dg_cpu_backend = {
    .scratch_bytes = scratch_bytes,
    .create = create,
    .free = free_backend,
    .allocate = allocate,
    .release = release,
    .upload = copy_in,
    .download = copy_out,
    .embed = dg_cpu_embed,
    .mlp = dg_cpu_mlp,
    .add_norm = dg_cpu_add_norm,
    .project_qkv = dg_cpu_project_qkv,
    .attend = dg_cpu_attend,
    .project_output = dg_cpu_project_output,
    .moe = dg_cpu_moe,
    .combine = dg_cpu_combine,
    .logits = dg_cpu_logits,
    .soft_embedding = dg_cpu_soft_embedding,
    .begin_canvas = dg_cpu_begin_canvas,
    .denoise = dg_cpu_denoise,
    .finish = finish,
    .collect = dg_cpu_collect,
};
