/* A model divided between a GPU and the CPU: each operation runs where its layer's weights are (the on_cpu marks of
 * model.h), and activations follow. Weights and caches never move; what crosses the bus is the (n, n_embd) rows at a
 * boundary between layers, or around experts that are kept on the CPU. */
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "device/backend.h"

#define MAX_BUFFERS 8 /* activations that forward.c tells apart */

/* One buffer of activations, known by its address on the device, with a twin at the same offset in the CPU's memory. */
typedef struct buffer {
    const float *device;
    bool valid[2]; /* by dg_place: which of the two holds what was last written */
} buffer;

struct dg_backend {
    const dg_model *model;
    dg_backend *gpu;
    dg_backend *cpu;
    char *device_memory; /* of activations */
    char *cpu_memory;
    char *cpu_cache; /* the one allocation of DG_PLACE_CPU, and its end */
    char *cpu_cache_end;
    buffer buffers[MAX_BUFFERS];
    int32_t n_buffers;
    dg_error failure; /* the first one since `finish`; status DG_OK where there is none */
};

typedef enum access { READ = 1, WRITE = 2, UPDATE = 3 } access;

static const dg_backend_ops *const cpu_ops = &dg_cpu_backend;
static const dg_backend_ops *gpu_ops(const dg_backend *b) { return b->model->gpu; }
static bool usable(const dg_backend *b) { return b->failure.status == DG_OK; }

/* ---- Activations ---------------------------------------------------------------------------------------------- */

static buffer *buffer_of(dg_backend *b, const float *device) {
    for (int32_t i = 0; i < b->n_buffers; i++)
        if (b->buffers[i].device == device) return &b->buffers[i];
    if (b->n_buffers == MAX_BUFFERS) { /* forward.c has more of them than this file was written for */
        dg_fail(&b->failure, DG_ERROR_BACKEND, "a split model holds more than %d kinds of activations", MAX_BUFFERS);
        return NULL;
    }
    b->buffers[b->n_buffers] = (buffer){.device = device};
    return &b->buffers[b->n_buffers++];
}

/* The address of the activations `x` (n_floats) at `place`, brought there if they are to be read and are not. NULL
 * after a failure, and for NULL. */
static float *at(dg_backend *b, dg_place place, const float *x, int64_t n_floats, access access) {
    if (x == NULL || !usable(b)) return NULL;
    buffer *buffer = buffer_of(b, x);
    if (buffer == NULL) return NULL;
    float *device = (float *)(uintptr_t)x, *twin = (float *)(b->cpu_memory + ((const char *)x - b->device_memory));
    const dg_place other = place == DG_PLACE_CPU ? DG_PLACE_DEVICE : DG_PLACE_CPU;
    const uint64_t n_bytes = (uint64_t)n_floats * sizeof(float);
    if ((access & READ) && !buffer->valid[place] && buffer->valid[other]) {
        if (place == DG_PLACE_CPU) {
            gpu_ops(b)->download(b->gpu, twin, device, n_bytes);
            if (gpu_ops(b)->finish(b->gpu, &b->failure) != DG_OK) return NULL;
        } else {
            gpu_ops(b)->upload(b->gpu, device, twin, n_bytes);
        }
        buffer->valid[place] = true;
    }
    if (access & WRITE) {
        buffer->valid[place] = true;
        buffer->valid[other] = false;
    }
    return place == DG_PLACE_CPU ? twin : device;
}

static dg_place place_of(bool on_cpu) { return on_cpu ? DG_PLACE_CPU : DG_PLACE_DEVICE; }
static const dg_backend_ops *ops_of(const dg_backend *b, bool on_cpu) { return on_cpu ? cpu_ops : gpu_ops(b); }
static dg_backend *side_of(const dg_backend *b, bool on_cpu) { return on_cpu ? b->cpu : b->gpu; }

/* ---- Memory --------------------------------------------------------------------------------------------------- */

static void unload_model(dg_model *model) { model->gpu->unload_model(model); }

static uint64_t scratch_bytes(const dg_backend_params *params) {
    return cpu_ops->scratch_bytes(params) + params->model->gpu->scratch_bytes(params);
}

static void free_backend(dg_backend *b) {
    if (b == NULL) return;
    if (b->cpu != NULL) cpu_ops->free(b->cpu);
    if (b->gpu != NULL) gpu_ops(b)->free(b->gpu);
    free(b);
}

static dg_status create(const dg_backend_params *params, dg_backend **out, dg_error *error) {
    *out = NULL;
    dg_backend *b = calloc(1, sizeof *b);
    if (b == NULL) return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory for a session");
    b->model = params->model;
    dg_status status = gpu_ops(b)->create(params, &b->gpu, error);
    if (status == DG_OK) status = cpu_ops->create(params, &b->cpu, error);
    if (status != DG_OK) {
        free_backend(b);
        return status;
    }
    *out = b;
    return DG_OK;
}

static bool is_in_cpu_cache(const dg_backend *b, const void *memory) {
    return b->cpu_cache != NULL && (const char *)memory >= b->cpu_cache && (const char *)memory < b->cpu_cache_end;
}

static dg_status allocate(dg_backend *b, dg_place place, uint64_t n_bytes, void **memory, dg_error *error) {
    if (place == DG_PLACE_DEVICE) return gpu_ops(b)->allocate(b->gpu, place, n_bytes, memory, error);
    void *on_cpu;
    *memory = NULL;
    if ((place == DG_PLACE_CPU ? b->cpu_cache : b->device_memory) != NULL)
        return dg_fail(error, DG_ERROR_BACKEND,
                       "a split model's session has one cache on the CPU and one piece of "
                       "activations; more were asked for");
    DG_TRY(cpu_ops->allocate(b->cpu, place, n_bytes, &on_cpu, error));
    if (place == DG_PLACE_CPU) {
        *memory = b->cpu_cache = on_cpu;
        b->cpu_cache_end = b->cpu_cache + n_bytes;
        return DG_OK;
    }
    dg_status status = gpu_ops(b)->allocate(b->gpu, place, n_bytes, memory, error);
    if (status != DG_OK) {
        cpu_ops->release(b->cpu, on_cpu);
        return status;
    }
    b->device_memory = *memory;
    b->cpu_memory = on_cpu;
    return DG_OK;
}

static void release(dg_backend *b, void *memory) {
    if (memory == b->cpu_cache) {
        cpu_ops->release(b->cpu, memory);
        b->cpu_cache = NULL;
        return;
    }
    gpu_ops(b)->release(b->gpu, memory);
    if (memory == b->device_memory) {
        cpu_ops->release(b->cpu, b->cpu_memory);
        b->device_memory = b->cpu_memory = NULL;
        b->n_buffers = 0;
    }
}

static void upload(dg_backend *b, void *memory, const void *host_data, uint64_t n_bytes) {
    const bool on_cpu = is_in_cpu_cache(b, memory);
    ops_of(b, on_cpu)->upload(side_of(b, on_cpu), memory, host_data, n_bytes);
}

static void download(dg_backend *b, void *host_data, const void *memory, uint64_t n_bytes) {
    const bool on_cpu = is_in_cpu_cache(b, memory);
    ops_of(b, on_cpu)->download(side_of(b, on_cpu), host_data, memory, n_bytes);
}

/* ---- Operations ----------------------------------------------------------------------------------------------- */

static int64_t embd(const dg_backend *b, int32_t n) { return (int64_t)n * b->model->n_embd; }
static int64_t heads(const dg_backend *b, const dg_layer *layer, int32_t n) {
    return (int64_t)n * b->model->n_heads * layer->head_dim;
}

/* Embedding, self-conditioning, head and canvas are always on the GPU. */
static void embed(dg_backend *b, const int32_t *host_ids, int32_t n, float *x) {
    x = at(b, DG_PLACE_DEVICE, x, embd(b, n), WRITE);
    if (usable(b)) gpu_ops(b)->embed(b->gpu, host_ids, n, x);
}

static void mlp(dg_backend *b, const dg_mlp *m, const float *x, int32_t n, float *out) {
    const dg_place place = place_of(m->on_cpu);
    x = at(b, place, x, embd(b, n), READ);
    out = at(b, place, out, embd(b, n), WRITE);
    if (usable(b)) ops_of(b, m->on_cpu)->mlp(side_of(b, m->on_cpu), m, x, n, out);
}

static void add_norm(dg_backend *b, float *x, const float *d, int32_t n) {
    x = at(b, DG_PLACE_DEVICE, x, embd(b, n), UPDATE);
    d = at(b, DG_PLACE_DEVICE, d, embd(b, n), READ);
    if (usable(b)) gpu_ops(b)->add_norm(b->gpu, x, d, n);
}

static void project_qkv(dg_backend *b, const dg_layer *layer, const float *x, int32_t n, int32_t position, float *q,
                        const dg_kv *kv) {
    const dg_place place = place_of(layer->on_cpu);
    x = at(b, place, x, embd(b, n), READ);
    q = at(b, place, q, heads(b, layer, n), WRITE);
    if (usable(b)) ops_of(b, layer->on_cpu)->project_qkv(side_of(b, layer->on_cpu), layer, x, n, position, q, kv);
}

static void attend(dg_backend *b, const dg_layer *layer, const float *q, int32_t n, int32_t position, bool causal,
                   const dg_kv_span *spans, int32_t n_spans, float *a) {
    const dg_place place = place_of(layer->on_cpu);
    q = at(b, place, q, heads(b, layer, n), READ);
    a = at(b, place, a, heads(b, layer, n), WRITE);
    if (usable(b))
        ops_of(b, layer->on_cpu)->attend(side_of(b, layer->on_cpu), layer, q, n, position, causal, spans, n_spans, a);
}

static void project_output(dg_backend *b, const dg_layer *layer, const float *a, int32_t n, float *x) {
    const dg_place place = place_of(layer->on_cpu);
    a = at(b, place, a, heads(b, layer, n), READ);
    x = at(b, place, x, embd(b, n), UPDATE);
    if (usable(b)) ops_of(b, layer->on_cpu)->project_output(side_of(b, layer->on_cpu), layer, a, n, x);
}

static void moe(dg_backend *b, const dg_moe *m, const float *x, int32_t n, float *out) {
    const dg_place place = place_of(m->on_cpu);
    x = at(b, place, x, embd(b, n), READ);
    out = at(b, place, out, embd(b, n), WRITE);
    if (usable(b)) ops_of(b, m->on_cpu)->moe(side_of(b, m->on_cpu), m, x, n, out);
}

static void combine(dg_backend *b, const dg_layer *layer, float *x, const float *d, const float *e, int32_t n,
                    float scalar) {
    const dg_place place = place_of(layer->on_cpu);
    x = at(b, place, x, embd(b, n), UPDATE);
    d = at(b, place, d, embd(b, n), READ);
    e = at(b, place, e, embd(b, n), READ);
    if (usable(b)) ops_of(b, layer->on_cpu)->combine(side_of(b, layer->on_cpu), layer, x, d, e, n, scalar);
}

static void logits(dg_backend *b, const float *x, int32_t n, float *host_logits) {
    x = at(b, DG_PLACE_DEVICE, x, embd(b, n), READ);
    if (usable(b)) gpu_ops(b)->logits(b->gpu, x, n, host_logits);
}

static void soft_embedding(dg_backend *b, const float *host_z, int32_t n, float *soft) {
    soft = at(b, DG_PLACE_DEVICE, soft, embd(b, n), WRITE);
    if (usable(b)) gpu_ops(b)->soft_embedding(b->gpu, host_z, n, soft);
}

static void begin_canvas(dg_backend *b, dg_canvas *host_canvas) {
    if (usable(b)) gpu_ops(b)->begin_canvas(b->gpu, host_canvas);
}

static void denoise(dg_backend *b, const float *x, float *soft) {
    const int32_t n = b->model->canvas_length;
    x = at(b, DG_PLACE_DEVICE, x, embd(b, n), READ);
    soft = at(b, DG_PLACE_DEVICE, soft, embd(b, n), WRITE);
    if (usable(b)) gpu_ops(b)->denoise(b->gpu, x, soft);
}

static dg_status finish(dg_backend *b, dg_error *error) {
    dg_error own = b->failure;
    dg_status status = gpu_ops(b)->finish(b->gpu, error);
    b->failure = (dg_error){0};
    if (own.status != DG_OK) status = dg_fail(error, own.status, "%s", own.message);
    if (status != DG_OK) b->n_buffers = 0; /* nobody knows what they hold */
    return status;
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
