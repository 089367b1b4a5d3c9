/* One layer's mixture of experts at the released sizes: 256 tokens, 128 experts, 8 chosen by each.
 *
 * Reference: the scalar kernels' result. */
#include "workbench.h"

typedef struct job {
    dg_backend *backend;
    dg_moe moe;
    const float *x;
    int32_t n;
    float *out;
} job;

static void run(void *context) {
    job *j = context;
    dg_cpu_backend.moe(j->backend, &j->moe, j->x, j->n, j->out);
}

int main(void) {
    const char *isa = getenv("DGEMMA_ISA"); /* below it is changed for the reference */
    const int32_t types[] = {DG_TYPE_Q4_0, DG_TYPE_NVFP4, DG_TYPE_Q8_0};
    const dg_cpu_kernels *kernels = dg_cpu_kernels_choose();
    dg_layer layers[2];
    const dg_model model = bench_model(layers);
    const int32_t n = model.canvas_length;
    const double peak = bench_peak(kernels->peak_int8);
    float *ones = bench_memory((uint64_t)model.n_embd * sizeof *ones);
    for (int32_t i = 0; i < model.n_embd; i++) ones[i] = 1.0f;
    printf("%s, one thread: int8 %.0f GOP/s\n%-8s %10s %10s %7s\n", kernels->name, 1e-9 * peak, "type", "ms", "GOP/s",
           "share");
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        job j = {.n = n, .x = bench_floats((int64_t)n * model.n_embd, 1.0f, 11)};
        j.moe = (dg_moe){.router = bench_floats((int64_t)model.n_experts * model.n_embd, 2.0f, 5),
                         .router_scale = ones,
                         .norm = ones,
                         .gate_up = bench_weight(types[i], model.n_experts, 2 * model.n_ff_expert, model.n_embd),
                         .down = bench_weight(types[i], model.n_experts, model.n_embd, model.n_ff_expert),
                         .expert_scale = ones};
        j.out = bench_memory((uint64_t)n * (uint64_t)model.n_embd * sizeof *j.out);
        j.backend = bench_backend(&model, n, DG_TYPE_F16, 1e-6f);
        const double seconds = bench_best(4, run, &j);
        const double done = 6.0 * n * model.n_experts_used * model.n_embd * model.n_ff_expert;
        printf("%-8s %10.1f %10.1f %6.1f%%\n", dg_type_traits_of(types[i])->name, 1e3 * seconds, 1e-9 * done / seconds,
               100 * done / seconds / peak);
        fflush(stdout);
        dg_cpu_backend.free(j.backend);

        float *expected = bench_memory((uint64_t)model.n_embd * sizeof *expected); /* of the first row */
        setenv("DGEMMA_ISA", "scalar", 1);
        job slow = j;
        slow.n = 1;
        slow.out = expected;
        slow.backend = bench_backend(&model, 1, DG_TYPE_F16, 1e-6f);
        run(&slow);
        dg_cpu_backend.free(slow.backend);
        if (isa != NULL)
            setenv("DGEMMA_ISA", isa, 1);
        else
            unsetenv("DGEMMA_ISA");
        /* tiles round activations otherwise than the scalar kernels */
        bench_check("experts", bench_error(j.out, expected, model.n_embd),
                    kernels->multiply_tiled != NULL ? 2e-2 : 1e-3);

        free((void *)j.x);
        free((void *)j.moe.router);
        free((void *)j.moe.gate_up.data);
        free((void *)j.moe.down.data);
        free(j.out);
        free(expected);
    }
    free(ones);
    return 0;
}
