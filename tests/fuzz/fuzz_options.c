/* Reads the input as the structs that say how a session is made and how a model is divided between GPU and CPU, and has
 * them checked: what is accepted lies within what dgemma.h says, and what follows from it is plausible. */
#include <string.h>

#include "engine/gpu_plan.h"
#include "engine/session_plan.h"
#include "take.h"
#include "target.h"

static dg_model *model;

static void begin(void) {
    const char *name = getenv("DGEMMA_FUZZ_MODEL");
    dg_error error = {0};
    dg_model_params params = dg_model_params_default();
    params.backend = DG_BACKEND_CPU;
    if (name == NULL || dg_model_open(name, &params, &model, &error) != DG_OK) {
        fprintf(stderr, "DGEMMA_FUZZ_MODEL should name a small model: %s\n", error.message);
        exit(2);
    }
}

/* The linker puts it in the place of dg_physical_cores, which reads a dozen files. */
int __wrap_dg_physical_cores(void);
int __wrap_dg_physical_cores(void) { return 2; }

static void check(const uint8_t *input, size_t n_left) {
    dg_session_params given;
    dg_session_plan plan;
    dg_gpu_plan division = {.size = sizeof division};
    dg_memory memory = {0};
    dg_error error = {0};
    int32_t n_multiprocessors[DG_MAX_GPUS];
    uint8_t shorter;
    char text[256];
    take(&input, &n_left, &shorter, 1);
    take(&input, &n_left, &given, sizeof given);
    take(&input, &n_left, &division.available, sizeof division.available);
    take(&input, &n_left, &division.n_gpu_layers, sizeof division.n_gpu_layers);
    take(&input, &n_left, &division.n_cpu_moe, sizeof division.n_cpu_moe);
    take(&input, &n_left, n_multiprocessors, sizeof n_multiprocessors);
    for (int i = 0; i < DG_MAX_GPUS; i++) n_multiprocessors[i] = 1 + (n_multiprocessors[i] & 255);
    given.size = shorter % 2 ? sizeof given : 8 + shorter % 29; /* of an older header */
    const dg_status status = dg_session_plan_of(model, &given, &plan, &error);
    PROMISE(dg_session_memory(model, &given, &memory, NULL) == status);
    if (status != DG_OK) {
        PROMISE(status == DG_ERROR_ARGUMENT && error.message[0] != '\0');
    } else {
        const dg_session_params *p = &plan.params;
        PROMISE(p->n_ctx > model->canvas_length && p->n_ctx <= model->context_length);
        PROMISE(p->n_batch >= 1 && p->n_batch <= p->n_ctx && p->n_rewind >= 0 && p->n_rewind <= p->n_ctx);
        PROMISE(p->n_threads >= 1 && p->n_threads <= DG_MAX_THREADS);
        PROMISE(p->soft_embedding_bound >= 0 && p->soft_embedding_bound < 1);
        PROMISE(memory.cache > 0 && memory.cache < UINT64_C(1) << 40 && memory.scratch < UINT64_C(1) << 40);
    }
    const int32_t wanted = division.n_gpu_layers;
    const dg_status planned = dg_gpu_plan_for(model, &given, n_multiprocessors, &division, &error);
    if (planned == DG_OK) {
        PROMISE(division.n_gpu_layers >= 0 && division.n_gpu_layers <= model->n_layers);
        PROMISE(division.n_cpu_moe >= 0 && division.n_cpu_moe <= model->n_layers);
        PROMISE(division.total >= division.weights + division.reserve);
        if (wanted == -1) PROMISE(division.total <= division.available);
        dg_gpu_explain(model, &division, text, 1 + (size_t)shorter);
        PROMISE(strlen(text) <= shorter);
    }
    PROMISE(planned == DG_OK || planned == DG_ERROR_ARGUMENT || planned == DG_ERROR_OUT_OF_MEMORY);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t n_bytes) {
    if (model == NULL) begin();
    check(input, n_bytes);
    return 0;
}
