#include "engine/gpu_plan.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "cuda/layout.h"
#include "device/placement.h"
#include "engine/operations.h"

/* Where no device is asked: as many multiprocessors as the largest have. More would only matter to tiny models. */
#define MULTIPROCESSORS 192
#define HALVINGS 12 /* of the share of the free memory that GPUs are filled to */

static uint64_t max_u64(uint64_t a, uint64_t b) { return a > b ? a : b; }
static double gib(uint64_t n_bytes) { return (double)n_bytes / (1 << 30); }

/* What a plan is made with. `scratchpad` is a copy of the model whose layers are marked with places. */
typedef struct planner {
    dg_model *scratchpad;
    dg_session_plan session;
    const int32_t *n_multiprocessors;
    dg_gpu_plan *plan;
} planner;

/* ---- What a division takes -------------------------------------------------------------------------------------- */

/* Of one GPU, as the layers are marked. */
static void measure_share(const planner *p, int32_t gpu) {
    dg_gpu_share *share = &p->plan->gpus[gpu];
    dg_backend_params backend = p->session.backend;
    dg_cuda_scratch unused;
    backend.model = p->scratchpad;
    backend.place = gpu;
    share->weights = dg_cuda_weight_bytes(p->scratchpad, gpu);
    share->cache = dg_kv_cache_bytes(p->scratchpad, &p->session.kv, gpu);
    share->scratch = dg_forward_bytes(p->scratchpad, backend.max_rows) +
                     dg_cuda_lay_out_scratch(&backend, p->n_multiprocessors[gpu], NULL, &unused);
    share->reserve = DG_GPU_RESERVE;
    share->total = share->weights + max_u64(share->cache + share->scratch, 2 * DG_CUDA_STAGING_BYTES) + share->reserve;
}

/* Of all; a GPU without layers is left alone, but for the first one. True where each has as much free. */
static bool measure(const planner *p) {
    dg_gpu_plan *plan = p->plan;
    bool fits = true;
    plan->weights = plan->cache = plan->scratch = plan->reserve = plan->total = 0;
    for (int32_t gpu = 0; gpu < plan->n_gpus; gpu++) {
        dg_gpu_share *share = &plan->gpus[gpu];
        measure_share(p, gpu);
        if (gpu > 0 && share->n_layers == 0)
            *share = (dg_gpu_share){.available = share->available, .proportion = share->proportion};
        plan->weights += share->weights;
        plan->cache += share->cache;
        plan->scratch += share->scratch;
        plan->reserve += share->reserve;
        plan->total += share->total;
        fits = fits && share->total <= share->available;
    }
    return fits;
}

/* ---- Divisions over GPUs --------------------------------------------------------------------------------------- */

static double sum_of_proportions(const dg_gpu_plan *plan) {
    double sum = 0;
    for (int32_t gpu = 0; gpu < plan->n_gpus; gpu++) sum += (double)plan->gpus[gpu].proportion;
    return sum;
}

/* Marks the first layers as the CPU's and clears what the GPUs have; the first layer that is not the CPU's. */
static int32_t begin_division(const planner *p) {
    const int32_t n_on_cpu = p->scratchpad->n_layers - p->plan->n_gpu_layers;
    for (int32_t i = 0; i < p->scratchpad->n_layers; i++)
        dg_place_layer(p->scratchpad, i, DG_PLACE_CPU, p->plan->n_cpu_moe);
    for (int32_t gpu = 0; gpu < p->plan->n_gpus; gpu++) p->plan->gpus[gpu].n_layers = 0;
    return n_on_cpu;
}

/* Divides n_gpu_layers by proportions, or where there are none by what is free. */
static bool divide(const planner *p) {
    dg_gpu_plan *plan = p->plan;
    const bool given = sum_of_proportions(plan) > 0;
    const int32_t first = begin_division(p);
    double sum = 0, before = 0;
    for (int32_t gpu = 0; gpu < plan->n_gpus; gpu++)
        sum += given ? (double)plan->gpus[gpu].proportion : (double)plan->gpus[gpu].available;
    int32_t layer = first;
    for (int32_t gpu = 0; gpu < plan->n_gpus; gpu++) {
        before += given ? (double)plan->gpus[gpu].proportion : (double)plan->gpus[gpu].available;
        int32_t end = first + (sum > 0 ? (int32_t)(before / sum * plan->n_gpu_layers + 0.5) : 0);
        if (gpu == plan->n_gpus - 1) end = p->scratchpad->n_layers;
        for (; layer < end; layer++, plan->gpus[gpu].n_layers++)
            dg_place_layer(p->scratchpad, layer, gpu, plan->n_cpu_moe);
    }
    return measure(p);
}

/* Gives each GPU in turn as many layers as this share of its free memory takes. False where some are left over. */
static bool fill(const planner *p, double share) {
    dg_gpu_plan *plan = p->plan;
    int32_t gpu = 0;
    for (int32_t layer = begin_division(p); layer < p->scratchpad->n_layers; layer++) {
        for (;; gpu++) {
            if (gpu == plan->n_gpus) return false;
            dg_place_layer(p->scratchpad, layer, gpu, plan->n_cpu_moe);
            measure_share(p, gpu);
            if ((double)plan->gpus[gpu].total <= share * (double)plan->gpus[gpu].available) break;
        }
        plan->gpus[gpu].n_layers++;
    }
    return measure(p);
}

/* Fills all GPUs to the same share of what they have free, the least one that does: what is left is left everywhere. */
static bool balance(const planner *p) {
    double least = 0, enough = 1;
    if (!fill(p, 1)) return false;
    if (p->plan->n_gpus == 1) return true;
    for (int i = 0; i < HALVINGS; i++) {
        const double middle = (least + enough) / 2;
        if (fill(p, middle))
            enough = middle;
        else
            least = middle;
    }
    return fill(p, enough);
}

/* Experts are most of a model and the part that suffers least from the CPU, so they leave the GPUs first, layer by
 * layer; whole layers only when all experts have. */
static bool fit(const planner *p) {
    dg_gpu_plan *plan = p->plan;
    const bool given = sum_of_proportions(plan) > 0;
    plan->n_gpu_layers = p->scratchpad->n_layers;
    while (!(given ? divide(p) : fill(p, 1))) {
        if (plan->n_cpu_moe < p->scratchpad->n_layers)
            plan->n_cpu_moe++;
        else if (plan->n_gpu_layers > 0)
            plan->n_gpu_layers--;
        else
            return false;
    }
    return given || balance(p);
}

/* ---- The plan -------------------------------------------------------------------------------------------------- */

static dg_status check(const dg_model *model, dg_gpu_plan *plan, dg_error *error) {
    if (plan->n_gpu_layers < -1 || plan->n_cpu_moe < 0)
        return dg_fail(
            error, DG_ERROR_ARGUMENT,
            "n_gpu_layers is %d and n_cpu_moe %d; expected a number of layers each, or -1 for as many layers "
            "on the GPU as fit",
            plan->n_gpu_layers, plan->n_cpu_moe);
    if (plan->n_gpus < 0 || plan->n_gpus > DG_MAX_GPUS)
        return dg_fail(error, DG_ERROR_ARGUMENT, "n_gpus is %d; expected 0 to %d", plan->n_gpus, DG_MAX_GPUS);
    if (plan->n_gpu_layers > model->n_layers) plan->n_gpu_layers = model->n_layers;
    if (plan->n_cpu_moe > model->n_layers) plan->n_cpu_moe = model->n_layers;
    if (plan->n_gpus == 0) {
        plan->n_gpus = 1;
        plan->gpus[0] = (dg_gpu_share){.available = plan->available};
    }
    plan->available = 0;
    for (int32_t gpu = 0; gpu < plan->n_gpus; gpu++) plan->available += plan->gpus[gpu].available;
    return DG_OK;
}

static dg_status make(const planner *p, dg_error *error) {
    dg_gpu_plan *plan = p->plan;
    if (plan->n_gpu_layers >= 0) { /* as it was asked for, whether it fits or not */
        if (sum_of_proportions(plan) > 0 || !balance(p)) divide(p);
        return DG_OK;
    }
    if (fit(p)) return DG_OK;
    return dg_fail(error, DG_ERROR_OUT_OF_MEMORY,
                   "%.2f GiB are free on the GPU, and embedding, head and scratch alone need %.2f GiB: close other "
                   "programs, use a smaller batch, or the CPU",
                   gib(plan->gpus[0].available), gib(plan->gpus[0].total));
}

dg_status dg_gpu_plan_for(const dg_model *model, const dg_session_params *given, const int32_t *n_multiprocessors,
                          dg_gpu_plan *plan, dg_error *error) {
    dg_session_params params = dg_session_params_default();
    planner p = {.n_multiprocessors = n_multiprocessors, .plan = plan};
    if (given != NULL) memcpy(&params, given, given->size < sizeof params ? given->size : sizeof params);
    if (params.n_ctx > model->context_length) params.n_ctx = model->context_length;
    DG_TRY(dg_session_plan_of(model, &params, &p.session, error));
    DG_TRY(check(model, plan, error));

    dg_status status;
    p.scratchpad = malloc(sizeof *p.scratchpad);
    dg_layer *layers = malloc((size_t)model->n_layers * sizeof *layers);
    if (p.scratchpad == NULL || layers == NULL) {
        status = dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory to plan the model on the GPU");
    } else {
        memcpy(p.scratchpad, model, sizeof *p.scratchpad);
        memcpy(layers, model->layers, (size_t)model->n_layers * sizeof *layers);
        p.scratchpad->layers = layers;
        status = make(&p, error);
    }
    free(p.scratchpad);
    free(layers);
    return status;
}

dg_status dg_model_plan_gpu(const dg_model *model, const dg_session_params *session, dg_gpu_plan *out,
                            dg_error *error) {
    int32_t n_multiprocessors[DG_MAX_GPUS];
    dg_gpu_plan plan = {.n_gpu_layers = -1};
    const size_t size = out->size < sizeof plan ? out->size : sizeof plan;
    for (int32_t gpu = 0; gpu < DG_MAX_GPUS; gpu++) n_multiprocessors[gpu] = MULTIPROCESSORS;
    memcpy(&plan, out, size);
    DG_TRY(dg_gpu_plan_for(model, session, n_multiprocessors, &plan, error));
    memcpy(out, &plan, size);
    return DG_OK;
}

/* ---- In words -------------------------------------------------------------------------------------------------- */

static void explain_experts(const dg_gpu_plan *plan, char *text, size_t size) {
    text[0] = '\0';
    if (plan->n_cpu_moe > 0) snprintf(text, size, " but for the experts of the last %d", plan->n_cpu_moe);
}

static void explain_several(const dg_model *model, const dg_gpu_plan *plan, char *text, size_t size) {
    char experts[96];
    int32_t first = model->n_layers - plan->n_gpu_layers;
    explain_experts(plan, experts, sizeof experts);
    size_t length = (size_t)snprintf(text, size, "on %d GPUs: the last %d of %d layers%s;", model->n_gpus,
                                     plan->n_gpu_layers, model->n_layers, experts);
    for (int32_t i = 0; i < model->n_gpus && length < size; i++) {
        const dg_gpu_share *share = &plan->gpus[i];
        length += (size_t)snprintf(text + length, size - length, "%s %d: %s%d layers from %d on, %.2f of %.2f GiB",
                                   i > 0 ? "," : "", model->gpus[i], i == 0 ? "the embedding and " : "",
                                   share->n_layers, first, gib(share->total), gib(share->available));
        first += share->n_layers;
    }
}

void dg_gpu_explain(const dg_model *model, const dg_gpu_plan *plan, char *text, size_t size) {
    char experts[96];
    if (model->n_gpus > 1) {
        explain_several(model, plan, text, size);
        return;
    }
    explain_experts(plan, experts, sizeof experts);
    snprintf(
        text, size,
        "on the GPU: the embedding and the last %d of %d layers%s; %.2f GiB of weights, %.2f GiB of cache and %.2f GiB "
        "of scratch, of %.2f GiB free",
        plan->n_gpu_layers, model->n_layers, experts, gib(plan->weights), gib(plan->cache), gib(plan->scratch),
        gib(plan->available));
}
