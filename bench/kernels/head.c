/* The head at the released sizes: logits of 256 positions over 262,144 tokens, statistics, draw and soft embedding, for
 * wide distributions (the first denoising steps, and random weights) and narrow ones (a settling canvas).
 *
 * Check: the soft embedding with a bound of 1e-6 against the dense one, with the same draws. */
#include "workbench.h"

#include "cpu/cpu.h"

typedef struct job {
    dg_backend *backend;
    const float *x, *uniforms;
    int32_t n;
    dg_head_result result;
    float *soft;
} job;

static void run(void *context) {
    job *j = context;
    dg_cpu_sample(j->backend, j->x, j->n, 0.6f, j->uniforms, &j->result, j->soft);
}

int main(void) {
    const int32_t types[] = {DG_TYPE_Q4_0, DG_TYPE_Q6_K, DG_TYPE_Q8_0};
    const float sharpness[] = {1.0f, 12.0f};
    const dg_cpu_kernels *kernels = dg_cpu_kernels_choose();
    dg_layer layers[2];
    dg_model model = bench_model(layers);
    const int32_t n = model.canvas_length;
    const int64_t n_soft = (int64_t)n * model.n_embd;
    const double peak = bench_peak(kernels->peak_int8);
    float *x = bench_floats(n_soft, 1.0f, 11), *norm = bench_memory((uint64_t)model.n_embd * sizeof *norm);
    float *uniforms = bench_memory((uint64_t)n * sizeof *uniforms);
    float *soft = bench_memory((uint64_t)n_soft * sizeof *soft), *dense = bench_memory((uint64_t)n_soft * sizeof *soft);
    int32_t *tokens = bench_memory((uint64_t)n * 4 * sizeof *tokens);
    float *entropies = bench_memory((uint64_t)n * sizeof *entropies);
    for (int32_t i = 0; i < n; i++) uniforms[i] = ((float)i + 0.5f) / (float)n;
    model.output_norm = norm;

    printf("%s, one thread: int8 %.0f GOP/s; logits alone are %.0f GOP\n", kernels->name, 1e-9 * peak,
           2e-9 * n * model.n_embd * model.n_vocab);
    printf("%-8s %-10s %10s %10s %16s\n", "type", "entropy", "ms", "+ soft ms", "share of logits");
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        model.token_embd = bench_weight(types[i], 1, model.n_vocab, model.n_embd);
        for (size_t k = 0; k < 2; k++) {
            for (int32_t c = 0; c < model.n_embd; c++) norm[c] = sharpness[k];
            if (k == 1) /* all but the first tokens get a logit of 0 */
                memset((uint8_t *)model.token_embd.data + 64 * dg_row_bytes(types[i], model.n_embd), 0,
                       (size_t)(model.n_vocab - 64) * dg_row_bytes(types[i], model.n_embd));
            job j = {.backend = bench_backend(&model, n, DG_TYPE_F16, 1e-6f), .x = x, .uniforms = uniforms, .n = n};
            j.result = (dg_head_result){tokens, tokens + n, entropies};
            const double without = bench_best(2, run, &j);
            j.soft = soft;
            const double with = bench_best(2, run, &j);
            dg_cpu_backend.free(j.backend);
            double mean = 0;
            for (int32_t r = 0; r < n; r++) mean += (double)entropies[r] / n;
            printf("%-8s %-10.3f %10.0f %10.0f %15.1f%%\n", dg_type_traits_of(types[i])->name, mean, 1e3 * without,
                   1e3 * (with - without), 100 * 2.0 * n * model.n_embd * model.n_vocab / without / peak);
            fflush(stdout);

            job exact = j;
            exact.backend = bench_backend(&model, n, DG_TYPE_F16, 0);
            exact.soft = dense;
            exact.result = (dg_head_result){tokens + 2 * n, tokens + 3 * n, entropies};
            run(&exact);
            dg_cpu_backend.free(exact.backend);
            bench_check("soft embedding", bench_error(soft, dense, n_soft), 1e-4);
            bench_check("draws", memcmp(tokens, tokens + 2 * n, 2 * (size_t)n * sizeof *tokens) != 0, 0);
        }
        free((void *)model.token_embd.data);
    }
    free(x), free(norm), free(uniforms), free(soft), free(dense), free(tokens), free(entropies);
    return 0;
}
