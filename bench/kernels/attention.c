/* Attention of a canvas of 256 tokens over cached tokens, in a sliding and in a full layer of the released sizes.
 *
 * Reference: the scalar kernels' result. */
#include "workbench.h"

typedef struct job {
    dg_backend *backend;
    const dg_layer *layer;
    const float *q;
    float *out;
    int32_t n, n_past;
    dg_kv cache, canvas;
} job;

static void run(void *context) {
    job *j = context;
    const dg_kv_span spans[2] = {{&j->cache, 0, j->n_past}, {&j->canvas, j->n_past, j->n}};
    dg_cpu_backend.attend(j->backend, j->layer, j->q, j->n, j->n_past, false, spans + (j->n_past == 0),
                          1 + (j->n_past > 0), j->out);
}

static dg_kv random_kv(const dg_cpu_kernels *kernels, const dg_layer *layer, int32_t type, int64_t capacity) {
    const int32_t dims[2] = {layer->sliding ? layer->head_dim : layer->n_rot, layer->head_dim};
    void *memory[2];
    for (int i = 0; i < 2; i++) {
        const dg_type_traits *traits = dg_type_traits_of(type);
        const int64_t row_bytes =
            (int64_t)(dims[i] + traits->block_size - 1) / traits->block_size * traits->block_bytes;
        const int64_t n_rows = capacity * layer->n_kv_heads;
        float *values = bench_floats(64 * dims[i], 0.3f, 9 + (uint64_t)i);
        uint8_t *rows = memory[i] = bench_memory((uint64_t)(n_rows * row_bytes));
        for (int64_t r = 0; r < n_rows; r++)
            kernels->store_cache(type, values + r * 7 % 64 * dims[i], dims[i], rows + r * row_bytes);
        free(values);
    }
    return (dg_kv){memory[0], memory[1], capacity};
}

int main(void) {
    const char *isa = getenv("DGEMMA_ISA"); /* below it is changed for the reference */
    const int32_t types[] = {DG_TYPE_F32, DG_TYPE_F16, DG_TYPE_Q8_0};
    const int32_t pasts[2][3] = {{0, 512, 1023}, {0, 8192, 32512}};
    const dg_cpu_kernels *kernels = dg_cpu_kernels_choose();
    dg_layer layers[2];
    const dg_model model = bench_model(layers);
    const int32_t n = model.canvas_length;
    const double peak_f32 = bench_peak(kernels->peak_f32);
    layers[0].attn_v.data = "";
    printf("%s, one thread: f32 %.0f GFLOP/s\n", kernels->name, 1e-9 * peak_f32);
    printf("%-8s %-6s %8s %10s %10s %8s\n", "layer", "cache", "n_past", "ms", "GFLOP/s", "of f32");
    for (int kind = 0; kind < 2; kind++)
        for (size_t i = 0; i < sizeof types / sizeof *types; i++)
            for (int k = 0; k < 3; k++) {
                job j = {.layer = &layers[kind], .n = n, .n_past = pasts[kind][k]};
                const int64_t n_out = (int64_t)n * model.n_heads * j.layer->head_dim;
                j.q = bench_floats(n_out, 0.3f, 4);
                j.out = bench_memory((uint64_t)n_out * sizeof *j.out);
                j.cache = random_kv(kernels, j.layer, types[i], j.n_past > 0 ? j.n_past : 1);
                j.canvas = random_kv(kernels, j.layer, types[i], n);
                j.backend = bench_backend(&model, n, types[i], 0);
                const double seconds = bench_best(3, run, &j);
                const double done = 4.0 * (double)n_out * (j.n_past + n);
                dg_cpu_backend.free(j.backend);
                printf("%-8s %-6s %8d %10.1f %10.1f %7.1f%%\n", kind == 0 ? "sliding" : "full",
                       dg_type_traits_of(types[i])->name, j.n_past, 1e3 * seconds, 1e-9 * done / seconds,
                       100 * done / seconds / peak_f32);
                fflush(stdout);

                setenv("DGEMMA_ISA", "scalar", 1);
                job slow = j;
                slow.n = 1; /* not causal: the first token sees the same keys */
                slow.canvas.capacity = n;
                slow.out = bench_memory((uint64_t)n_out * sizeof *slow.out);
                slow.backend = bench_backend(&model, n, types[i], 0);
                const dg_kv_span spans[2] = {{&j.cache, 0, j.n_past}, {&j.canvas, j.n_past, n}};
                dg_cpu_backend.attend(slow.backend, slow.layer, slow.q, 1, slow.n_past, false, spans + (j.n_past == 0),
                                      1 + (j.n_past > 0), slow.out);
                dg_cpu_backend.free(slow.backend);
                if (isa != NULL)
                    setenv("DGEMMA_ISA", isa, 1);
                else
                    unsetenv("DGEMMA_ISA");
                bench_check("attention", bench_error(j.out, slow.out, model.n_heads * j.layer->head_dim),
                            types[i] == DG_TYPE_F32 ? 1e-5 : 1e-2);
                free((void *)j.q), free(j.out), free(slow.out);
                free(j.cache.k), free(j.cache.v), free(j.canvas.k), free(j.canvas.v);
            }
    return 0;
}
