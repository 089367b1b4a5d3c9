/* A dense product as the attention projections make it: n rows of 2816 columns with 1024 rows of weights.
 *
 * Names of types as arguments leave the others out.
 *
 * Reference: the same product of decoded weights in float64, on a few rows. */
#include "workbench.h"

#include "cpu/cpu.h"

#define N_COLS 2816
#define N_FEATURES 1024
#define CHECKED 2

typedef struct job {
    const dg_cpu_kernels *kernels;
    dg_panel panel;
    dg_weight w;
    dg_rows rows;
    float *out;
    bool decode, multiply;
    float *sums;
    void *tiles;
} job;

static void run(void *context) {
    job *j = context;
    if (j->multiply && j->panel.form.weight_tiles) {
        for (int32_t f = 0; f < N_FEATURES; f += DG_TILED_FEATURES)
            j->kernels->multiply_tiled(&j->w, 0, f, DG_TILED_FEATURES, &j->panel, &j->rows, j->tiles, j->out + f,
                                       N_FEATURES);
        return;
    }
    const int64_t strip = dg_strip_cols(j->kernels, j->panel.form, N_COLS);
    for (int64_t f = 0; f < N_FEATURES; f += j->kernels->lanes)
        for (int64_t c = 0; c < N_COLS; c += strip) {
            j->panel.first_col = c;
            j->panel.n_cols = N_COLS - c < strip ? N_COLS - c : strip;
            if (j->decode) j->kernels->decode(&j->w, 0, f, j->kernels->lanes, &j->panel);
            if (j->multiply)
                j->kernels->multiply(&j->panel, &j->rows, j->sums, j->out + f, N_FEATURES, j->kernels->lanes);
        }
}

static void check(const job *j, const float *x, int32_t n) {
    float *row = bench_memory(N_COLS * sizeof *row), expected[CHECKED * N_FEATURES], actual[CHECKED * N_FEATURES];
    for (int64_t f = 0; f < N_FEATURES; f++) {
        const uint8_t *src = (const uint8_t *)j->w.data + (uint64_t)f * dg_row_bytes(j->w.type, N_COLS);
        dg_type_traits_of(j->w.type)->decode(src, row, N_COLS);
        for (int r = 0; r < CHECKED && r < n; r++) {
            double sum = 0;
            for (int64_t c = 0; c < N_COLS; c++) sum += (double)x[r * N_COLS + c] * (double)row[c];
            expected[r * N_FEATURES + f] = (float)sum;
            actual[r * N_FEATURES + f] = j->out[r * N_FEATURES + f];
        }
    }
    free(row);
    bench_check("product", bench_error(actual, expected, (n < CHECKED ? n : CHECKED) * N_FEATURES), 2e-2);
}

static bool is_wanted(const char *name, int argc, char **argv) {
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], name) == 0) return true;
    return argc == 1;
}

int main(int argc, char **argv) {
    const int32_t types[] = {DG_TYPE_Q4_0,  DG_TYPE_Q4_1,   DG_TYPE_Q5_0, DG_TYPE_Q5_1, DG_TYPE_Q8_0, DG_TYPE_IQ4_NL,
                             DG_TYPE_NVFP4, DG_TYPE_IQ4_XS, DG_TYPE_Q2_K, DG_TYPE_Q3_K, DG_TYPE_Q4_K, DG_TYPE_Q5_K,
                             DG_TYPE_Q6_K,  DG_TYPE_BF16,   DG_TYPE_F16,  DG_TYPE_F32};
    const int32_t row_counts[] = {256, 16, 10};
    const dg_cpu_kernels *kernels = dg_cpu_kernels_choose();
    const double peak_int8 = bench_peak(kernels->peak_int8), peak_f32 = bench_peak(kernels->peak_f32);
    const double peak_bf16 = bench_peak(kernels->peak_bf16);
    printf("%s, one thread: int8 %.0f GOP/s, bf16 %.0f GFLOP/s, f32 %.0f GFLOP/s\n", kernels->name, 1e-9 * peak_int8,
           1e-9 * peak_bf16, 1e-9 * peak_f32);
    printf("%-8s %5s %10s %7s %9s %10s\n", "type", "rows", "GOP/s", "share", "decode %", "decode G/s");
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        if (!is_wanted(dg_type_traits_of(types[i])->name, argc, argv)) continue;
        job j = {.kernels = kernels, .w = bench_weight(types[i], 1, N_FEATURES, N_COLS)};
        j.panel.form = kernels->form_of(types[i]);
        j.tiles = bench_memory(DG_TILED_SCRATCH);
        j.panel.values = bench_memory(N_COLS * DG_MAX_LANES * sizeof(float));
        j.panel.codes = (uint8_t *)j.panel.values;
        j.panel.scales = bench_memory(N_COLS / 16 * DG_MAX_LANES * sizeof(float));
        j.panel.mins = bench_memory(N_COLS / 16 * DG_MAX_LANES * sizeof(float));
        for (size_t k = 0; k < sizeof row_counts / sizeof *row_counts; k++) {
            const int32_t n = row_counts[k], n_tiles = dg_rows_n_tiles(kernels, n);
            float *x = bench_floats((int64_t)n * N_COLS, 1.0f, 3);
            void *packed = bench_memory(dg_rows_bytes(kernels, n_tiles, N_COLS));
            j.rows = dg_rows_in(kernels, packed, j.panel.form, n, N_COLS, 0, n_tiles);
            j.out = bench_memory((uint64_t)n * N_FEATURES * sizeof *j.out);
            for (int32_t r = 0; r < n; r++) kernels->pack(&j.rows, r, 0, x + (int64_t)r * N_COLS, N_COLS);
            j.sums = bench_memory((uint64_t)n_tiles * (uint64_t)(kernels->tile_rows * kernels->lanes) * sizeof *j.sums);
            const int rounds = n >= 256 ? 5 : 20;
            j.multiply = false, j.decode = true;
            double decoding = bench_best(rounds, run, &j);
            j.multiply = true;
            double seconds = bench_best(rounds, run, &j), done = 2.0 * n * N_COLS * N_FEATURES;
            check(&j, x, n);
            printf("%-8s %5d %10.1f %6.1f%% %8.1f%% %10.2f\n", dg_type_traits_of(types[i])->name, n,
                   1e-9 * done / seconds,
                   100 * done / seconds /
                       (j.panel.form.weight_tiles ? peak_bf16
                        : j.panel.form.integer    ? peak_int8
                                                  : peak_f32),
                   100 * decoding / seconds, 1e-9 * N_COLS * N_FEATURES / decoding);
            fflush(stdout);
            free(x);
            free(packed);
            free(j.out);
        }
        free((void *)j.w.data);
        free(j.panel.values);
        free(j.panel.scales);
        free(j.panel.mins);
        free(j.tiles);
    }
    return 0;
}
