/* A model divided over several GPUs, or between GPUs and the CPU: each operation runs where its layer's weights are
 * (the places of model.h), and activations follow. Weights and caches never move; what crosses the bus is the (n,
 * n_embd) rows at a boundary between layers, or around experts that are kept on the CPU. */
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "device/backend.h"

#define MAX_BUFFERS 8 /* activations that forward.c tells apart */
#define FIRST 0       /* the GPU with embedding, self-conditioning, head and canvas */

/* What one place holds of a session: the places are the model's GPUs and, behind them, the CPU. */
typedef struct side {
    const dg_backend_ops *ops;
    dg_backend *backend; /* NULL: nothing of the model is there */
    char *activations;
    char *cache, *cache_end; /* the one allocation for the keys and values of its layers */
} side;

/* One buffer of activations, known by its address on the first GPU, with a twin at the same offset on every other side.
 */
typedef struct buffer {
    const float *address;
    bool valid[DG_MAX_GPUS + 1]; /* by side: whether it holds what was last written */
} buffer;

struct dg_backend {
    const dg_model *model;
    int32_t n_sides;
    side sides[DG_MAX_GPUS + 1];
    buffer buffers[MAX_BUFFERS];
    int32_t n_buffers;
    dg_error failure; /* the first one since `finish`; status DG_OK where there is none */
};

typedef enum access { READ = 1, WRITE = 2, UPDATE = 3 } access;

static bool usable(const dg_backend *b) { return b->failure.status == DG_OK; }
static int32_t number_of(const dg_backend *b, int32_t place) { return place == DG_PLACE_CPU ? b->n_sides - 1 : place; }
static bool is_cpu(const side *s) { return s->ops == &dg_cpu_backend; }

/* ---- Activations ---------------------------------------------------------------------------------------------- */

static buffer *buffer_of(dg_backend *b, const float *address) {
    for (int32_t i = 0; i < b->n_buffers; i++)
        if (b->buffers[i].address == address) return &b->buffers[i];
    if (b->n_buffers == MAX_BUFFERS) { /* forward.c has more of them than this file was written for */
        dg_fail(&b->failure, DG_ERROR_BACKEND, "a split model holds more than %d kinds of activations", MAX_BUFFERS);
        return NULL;
    }
    b->buffers[b->n_buffers] = (buffer){.address = address};
    return &b->buffers[b->n_buffers++];
}

static void copy(dg_backend *b, const side *from, const side *to, uint64_t offset, uint64_t n_bytes) {
    char *source = from->activations + offset, *target = to->activations + offset;
    if (is_cpu(from)) {
        to->ops->upload(to->backend, target, source, n_bytes);
    } else if (is_cpu(to)) {
        from->ops->download(from->backend, target, source, n_bytes);
        from->ops->finish(from->backend, &b->failure);
    } else {
        from->ops->send(from->backend, source, to->backend, target, n_bytes);
    }
}

/* The address of the activations `x` (n_floats) on the side of `place`, brought there if they are to be read and are
 * not. NULL after a failure, and for NULL. */
static float *at(dg_backend *b, int32_t place, const float *x, int64_t n_floats, access access) {
    if (x == NULL || !usable(b)) return NULL;
    buffer *buffer = buffer_of(b, x);
    if (buffer == NULL) return NULL;
    const int32_t here = number_of(b, place);
    const uint64_t offset = (uint64_t)((const char *)x - b->sides[FIRST].activations);
    if ((access & READ) && !buffer->valid[here]) {
        int32_t there = 0;
        while (there < b->n_sides && !buffer->valid[there]) there++;
        if (there < b->n_sides) copy(b, &b->sides[there], &b->sides[here], offset, (uint64_t)n_floats * sizeof(float));
        if (!usable(b)) return NULL;
        buffer->valid[here] = true;
    }
    if (access & WRITE) {
        memset(buffer->valid, 0, sizeof buffer->valid);
        buffer->valid[here] = true;
    }
    return (float *)(b->sides[here].activations + offset);
}

/* ---- Memory --------------------------------------------------------------------------------------------------- */

static void unload_model(dg_model *model) { model->gpu->unload_model(model); }

static bool needs_cpu(const dg_model *model) {
    for (int32_t i = 0; i < model->n_layers; i++)
        if (model->layers[i].place == DG_PLACE_CPU || model->layers[i].moe.place == DG_PLACE_CPU) return true;
    return false;
}

static uint64_t scratch_bytes(const dg_backend_params *params) {
    const dg_model *model = params->model;
    uint64_t n_bytes = needs_cpu(model) ? dg_cpu_backend.scratch_bytes(params) : 0;
    dg_backend_params own = *params;
    for (own.place = 0; own.place < model->n_gpus; own.place++) n_bytes += model->gpu->scratch_bytes(&own);
    return n_bytes;
}

static void free_backend(dg_backend *b) {
    if (b == NULL) return;
    for (int32_t i = 0; i < b->n_sides; i++)
        if (b->sides[i].backend != NULL) b->sides[i].ops->free(b->sides[i].backend);
    free(b);
}

static dg_status create(const dg_backend_params *params, dg_backend **out, dg_error *error) {
    const dg_model *model = params->model;
    dg_backend_params own = *params;
    dg_status status = DG_OK;
    *out = NULL;
    dg_backend *b = calloc(1, sizeof *b);
    if (b == NULL) return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory for a session");
    b->model = model;
    b->n_sides = model->n_gpus + 1;
    for (int32_t i = 0; i < b->n_sides && status == DG_OK; i++) {
        side *s = &b->sides[i];
        own.place = i;
        s->ops = i < model->n_gpus ? model->gpu : &dg_cpu_backend;
        if (!is_cpu(s) || needs_cpu(model)) status = s->ops->create(&own, &s->backend, error);
    }
    if (status != DG_OK) {
        free_backend(b);
        return status;
    }
    *out = b;
    return DG_OK;
}

static void release_activations(dg_backend *b) {
    for (int32_t i = 0; i < b->n_sides; i++) {
        if (b->sides[i].activations != NULL) b->sides[i].ops->release(b->sides[i].backend, b->sides[i].activations);
        b->sides[i].activations = NULL;
    }
    b->n_buffers = 0;
}

static dg_status allocate_activations(dg_backend *b, uint64_t n_bytes, void **memory, dg_error *error) {
    dg_status status = DG_OK;
    *memory = NULL;
    if (b->sides[FIRST].activations != NULL)
        return dg_fail(error, DG_ERROR_BACKEND,
                       "a split model's session has one piece of activations; more were asked for");
    for (int32_t i = 0; i < b->n_sides && status == DG_OK; i++) {
        void *piece = NULL;
        if (b->sides[i].backend == NULL) continue;
        status = b->sides[i].ops->allocate(b->sides[i].backend, i, n_bytes, &piece, error);
        b->sides[i].activations = piece;
    }
    if (status != DG_OK)
        release_activations(b);
    else
        *memory = b->sides[FIRST].activations;
    return status;
}

static dg_status allocate(dg_backend *b, int32_t place, uint64_t n_bytes, void **memory, dg_error *error) {
    if (place == DG_PLACE_ALL) return allocate_activations(b, n_bytes, memory, error);
    side *s = &b->sides[number_of(b, place)];
    *memory = NULL;
    if (s->cache != NULL)
        return dg_fail(error, DG_ERROR_BACKEND, "a split model's session has one cache a device; more were asked for");
    DG_TRY(s->ops->allocate(s->backend, place, n_bytes, memory, error));
    s->cache = *memory;
    s->cache_end = s->cache + n_bytes;
    return DG_OK;
}

static void release(dg_backend *b, void *memory) {
    if (memory == b->sides[FIRST].activations) {
        release_activations(b);
        return;
    }
    for (int32_t i = 0; i < b->n_sides; i++) {
        if (memory != b->sides[i].cache) continue;
        b->sides[i].ops->release(b->sides[i].backend, memory);
        b->sides[i].cache = b->sides[i].cache_end = NULL;
        return;
    }
}

/* The side in whose cache `memory` lies. */
static const side *owner_of(const dg_backend *b, const void *memory) {
    const char *address = memory;
    int32_t i = 0;
    while (i < b->n_sides - 1 && !(address >= b->sides[i].cache && address < b->sides[i].cache_end)) i++;
    return &b->sides[i];
}

static void upload(dg_backend *b, void *memory, const void *host_data, uint64_t n_bytes) {
    const side *owner = owner_of(b, memory);
    owner->ops->upload(owner->backend, memory, host_data, n_bytes);
}

static void download(dg_backend *b, void *host_data, const void *memory, uint64_t n_bytes) {
    const side *owner = owner_of(b, memory);
    owner->ops->download(owner->backend, host_data, memory, n_bytes);
}

/* ---- Operations ----------------------------------------------------------------------------------------------- */

static const side *side_of(const dg_backend *b, int32_t place) { return &b->sides[number_of(b, place)]; }
static const side *first(const dg_backend *b) { return &b->sides[FIRST]; }

static int64_t embd(const dg_backend *b, int32_t n) { return (int64_t)n * b->model->n_embd; }
static int64_t heads(const dg_backend *b, const dg_layer *layer, int32_t n) {
    return (int64_t)n * b->model->n_heads * layer->head_dim;
}

/* Embedding, self-conditioning, head and canvas are always on the first GPU. */
static void embed(dg_backend *b, const int32_t *host_ids, int32_t n, float *x) {
    x = at(b, FIRST, x, embd(b, n), WRITE);
    if (usable(b)) first(b)->ops->embed(first(b)->backend, host_ids, n, x);
}

static void mlp(dg_backend *b, const dg_mlp *m, const float *x, int32_t n, float *out) {
    x = at(b, m->place, x, embd(b, n), READ);
    out = at(b, m->place, out, embd(b, n), WRITE);
    const side *s = side_of(b, m->place);
    if (usable(b)) s->ops->mlp(s->backend, m, x, n, out);
}

static void add_norm(dg_backend *b, float *x, const float *d, int32_t n) {
    x = at(b, FIRST, x, embd(b, n), UPDATE);
    d = at(b, FIRST, d, embd(b, n), READ);
    if (usable(b)) first(b)->ops->add_norm(first(b)->backend, x, d, n);
}

static void project_qkv(dg_backend *b, const dg_layer *layer, const float *x, int32_t n, int32_t position, float *q,
                        const dg_kv *kv) {
    x = at(b, layer->place, x, embd(b, n), READ);
    q = at(b, layer->place, q, heads(b, layer, n), WRITE);
    const side *s = side_of(b, layer->place);
    if (usable(b)) s->ops->project_qkv(s->backend, layer, x, n, position, q, kv);
}

static void attend(dg_backend *b, const dg_layer *layer, const float *q, int32_t n, int32_t position, bool causal,
                   const dg_kv_span *spans, int32_t n_spans, float *a) {
    q = at(b, layer->place, q, heads(b, layer, n), READ);
    a = at(b, layer->place, a, heads(b, layer, n), WRITE);
    const side *s = side_of(b, layer->place);
    if (usable(b)) s->ops->attend(s->backend, layer, q, n, position, causal, spans, n_spans, a);
}

static void project_output(dg_backend *b, const dg_layer *layer, const float *a, int32_t n, float *x) {
    a = at(b, layer->place, a, heads(b, layer, n), READ);
    x = at(b, layer->place, x, embd(b, n), UPDATE);
    const side *s = side_of(b, layer->place);
    if (usable(b)) s->ops->project_output(s->backend, layer, a, n, x);
}

static void moe(dg_backend *b, const dg_moe *m, const float *x, int32_t n, float *out) {
    x = at(b, m->place, x, embd(b, n), READ);
    out = at(b, m->place, out, embd(b, n), WRITE);
    const side *s = side_of(b, m->place);
    if (usable(b)) s->ops->moe(s->backend, m, x, n, out);
}

static void combine(dg_backend *b, const dg_layer *layer, float *x, const float *d, const float *e, int32_t n,
                    float scalar) {
    x = at(b, layer->place, x, embd(b, n), UPDATE);
    d = at(b, layer->place, d, embd(b, n), READ);
    e = at(b, layer->place, e, embd(b, n), READ);
    const side *s = side_of(b, layer->place);
    if (usable(b)) s->ops->combine(s->backend, layer, x, d, e, n, scalar);
}

static void logits(dg_backend *b, const float *x, int32_t n, float *host_logits) {
    x = at(b, FIRST, x, embd(b, n), READ);
    if (usable(b)) first(b)->ops->logits(first(b)->backend, x, n, host_logits);
}

static void soft_embedding(dg_backend *b, const float *host_z, int32_t n, float *soft) {
    soft = at(b, FIRST, soft, embd(b, n), WRITE);
    if (usable(b)) first(b)->ops->soft_embedding(first(b)->backend, host_z, n, soft);
}

static void begin_canvas(dg_backend *b, dg_canvas *host_canvas) {
    if (usable(b)) first(b)->ops->begin_canvas(first(b)->backend, host_canvas);
}

static void denoise(dg_backend *b, const float *x, float *soft) {
    const int32_t n = b->model->canvas_length;
    x = at(b, FIRST, x, embd(b, n), READ);
    soft = at(b, FIRST, soft, embd(b, n), WRITE);
    if (usable(b)) first(b)->ops->denoise(first(b)->backend, x, soft);
}

/* All sides end, and the first failure counts: what the others say may follow from it. */
static dg_status finish(dg_backend *b, dg_error *error) {
    dg_error first_failure = b->failure;
    for (int32_t i = 0; i < b->n_sides; i++) {
        dg_error own = {0};
        if (b->sides[i].backend == NULL) continue;
        b->sides[i].ops->finish(b->sides[i].backend, &own);
        if (first_failure.status == DG_OK) first_failure = own;
    }
    b->failure = (dg_error){0};
    if (first_failure.status == DG_OK) return DG_OK;
    b->n_buffers = 0; /* nobody knows what they hold */
    return dg_fail(error, first_failure.status, "%s", first_failure.message);
}

const dg_backend_ops dg_split_backend = {
    .unload_model = unload_model,
    .scratch_bytes = scratch_bytes,
    .create = create,
    .free = free_backend,
    .allocate = allocate,
    .release = release,
    .upload = upload,
    .download = download,
    .embed = embed,
    .mlp = mlp,
    .add_norm = add_norm,
    .project_qkv = project_qkv,
    .attend = attend,
    .project_output = project_output,
    .moe = moe,
    .combine = combine,
    .logits = logits,
    .soft_embedding = soft_embedding,
    .begin_canvas = begin_canvas,
    .denoise = denoise,
    .finish = finish,
};
