/* Compares every instruction set that this machine runs with the scalar kernels, which tests/kernels compare
 * with NumPy: for machines where only an emulator and no Python is at hand. Prints how many cases agreed; exits with 1
 * at the first that does not.
 *
 *     dgemma_kernels_agree [SET | --best]    one set, which must be there; or only the name of the one that is chosen
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels_api.h"
#include "quant/quant.h"

static uint64_t state = 1;

static float uniform(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (float)(state >> 40) * 0x1p-24f;
}

static void fill(float *x, int64_t n, float size) {
    for (int64_t i = 0; i < n; i++) x[i] = (uniform() + uniform() + uniform() - 1.5f) * 2.0f * size;
}

static double error_of(const float *a, const float *b, int64_t n) {
    double difference = 0, size = 0;
    for (int64_t i = 0; i < n; i++) {
        if (isnan(a[i])) return INFINITY;
        difference += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        size += (double)b[i] * (double)b[i];
    }
    return sqrt(difference / fmax(size, 1e-30));
}

static int n_cases;

static void expect(const char *isa, const char *what, const char *type, int32_t n, double error, double tolerance) {
    n_cases++;
    if (error <= tolerance) return;
    printf("%s: %s, %s, %d rows: relative error %.2e, at most %.0e expected\n", isa, what, type, n, error, tolerance);
    exit(1);
}

enum { EMBD = 256, VOCAB = 83, MOST = 33 };

static void compare_head(const char *isa, int32_t type, int32_t n) {
    static float values[VOCAB * EMBD], norm[EMBD], x[MOST * EMBD], uniforms[MOST];
    static float logits[2][MOST * VOCAB], soft[2][MOST * EMBD], entropies[2][MOST];
    static int32_t tokens[2][2][MOST];
    static uint8_t table[VOCAB * EMBD * 4];
    const float scale = 0.7f;
    const char *name = dg_type_traits_of(type)->name;
    fill(values, VOCAB * EMBD, 0.1f);
    fill(norm, EMBD, 1.0f);
    fill(x, (int64_t)n * EMBD, 3.0f);
    for (int32_t i = 0; i < n; i++) uniforms[i] = uniform();
    if (dg_quantize(DG_TYPE_F32, values, type, table, VOCAB, EMBD, NULL, NULL, 1, NULL) != DG_OK)
        for (size_t i = 0; i < sizeof table; i++) table[i] = (uint8_t)(i % 64); /* a type that is only read */
    const test_head_params p = {EMBD, VOCAB, type, n, 2, table, &scale, norm, 30.0f, 1e-6f};
    for (int k = 0; k < 2; k++) {
        setenv("DGEMMA_ISA", k == 0 ? "scalar" : isa, 1);
        test_logits(&p, x, n, logits[k]);
        test_sample(&p, x, n, 0.6f, uniforms, tokens[k][0], tokens[k][1], entropies[k], soft[k]);
    }
    expect(isa, "logits", name, n, error_of(logits[1], logits[0], (int64_t)n * VOCAB), 1e-5);
    expect(isa, "soft embedding", name, n, error_of(soft[1], soft[0], (int64_t)n * EMBD), 1e-2);
    expect(isa, "entropies", name, n, error_of(entropies[1], entropies[0], n), 1e-4);
    expect(isa, "draws", name, n, memcmp(tokens[1], tokens[0], sizeof tokens[0]) == 0 ? 0 : 1, 0);
}

static void compare_attention(const char *isa, int32_t type, int32_t n, int32_t n_rot) {
    enum { HEADS = 4, KV_HEADS = 2, DIM = 40, PAST = 150 };
    static float values[KV_HEADS * PAST * 64], q[MOST * HEADS * DIM], out[2][MOST * HEADS * DIM];
    static uint8_t k[KV_HEADS * PAST * 64 * 4], v[KV_HEADS * PAST * 64 * 4];
    const char *name = dg_type_traits_of(type)->name;
    const int64_t block = dg_type_traits_of(type)->block_size, padded = (DIM + block - 1) / block * block;
    const int64_t padded_k = (n_rot + block - 1) / block * block;
    fill(values, KV_HEADS * PAST * padded, 1.0f);
    fill(q, (int64_t)n * HEADS * DIM, 1.0f);
    dg_quantize(DG_TYPE_F32, values, type, k, KV_HEADS * PAST, padded_k, NULL, NULL, 1, NULL);
    dg_quantize(DG_TYPE_F32, values, type, v, KV_HEADS * PAST, padded, NULL, NULL, 1, NULL);
    const test_attention_params p = {.n_embd = 32,
                                     .n_heads = HEADS,
                                     .n_kv_heads = KV_HEADS,
                                     .head_dim = DIM,
                                     .n_rot = n_rot,
                                     .window = n_rot == DIM ? 70 : 0,
                                     .complete_keys = n_rot == DIM,
                                     .type_k = type,
                                     .type_v = type,
                                     .n_threads = 2,
                                     .rope_base = 1e4f,
                                     .k = {k},
                                     .v = {v},
                                     .capacity = {PAST},
                                     .span_position = {1000},
                                     .span_n = {PAST}};
    for (int causal = 0; causal < 2; causal++) {
        for (int i = 0; i < 2; i++) {
            setenv("DGEMMA_ISA", i == 0 ? "scalar" : isa, 1);
            test_attend(&p, q, n, 1000 + PAST - n, causal, out[i]);
        }
        expect(isa, causal ? "causal attention" : "attention", name, n,
               error_of(out[1], out[0], (int64_t)n * HEADS * DIM), type == DG_TYPE_F32 ? 1e-5 : 6e-3);
    }
}

static void compare_mlp(const char *isa, int32_t type, int32_t n) {
    enum { FF = 96 };
    static float values[FF * EMBD], norm[EMBD], x[MOST * EMBD], out[2][MOST * EMBD];
    static uint8_t gate[FF * EMBD * 4], up[FF * EMBD * 4], down[FF * EMBD * 4];
    const float scales[3] = {0.5f, 1.25f, 2.0f};
    fill(norm, EMBD, 1.0f);
    fill(x, (int64_t)n * EMBD, 3.0f);
    fill(values, FF * EMBD, 0.1f);
    dg_quantize(DG_TYPE_F32, values, type, gate, FF, EMBD, NULL, NULL, 1, NULL);
    fill(values, FF * EMBD, 0.1f);
    dg_quantize(DG_TYPE_F32, values, type, up, FF, EMBD, NULL, NULL, 1, NULL);
    dg_quantize(DG_TYPE_F32, values, DG_TYPE_Q4_0, down, EMBD, FF, NULL, NULL, 1, NULL);
    for (int k = 0; k < 2; k++) {
        setenv("DGEMMA_ISA", k == 0 ? "scalar" : isa, 1);
        test_mlp(EMBD, FF, type, gate, type, up, DG_TYPE_Q4_0, down, scales, norm, x, n, 2, out[k]);
    }
    /* A hidden value at the edge between two codes may round the other way. */
    expect(isa, "gated MLP", dg_type_traits_of(type)->name, n, error_of(out[1], out[0], (int64_t)n * EMBD), 1e-3);
}

/* Rows of so many columns that a panel of any set takes several strips. */
static void compare_wide(const char *isa, int32_t type, int32_t n) {
    enum { COLUMNS = 8448, TOKENS = 19, ROWS = 7 };
    static float values[TOKENS * COLUMNS], norm[COLUMNS], x[ROWS * COLUMNS], logits[2][ROWS * TOKENS];
    static uint8_t table[TOKENS * COLUMNS * 4];
    const float scale = 0.7f;
    fill(values, TOKENS * COLUMNS, 0.02f);
    fill(norm, COLUMNS, 1.0f);
    fill(x, (int64_t)n * COLUMNS, 3.0f);
    dg_quantize(DG_TYPE_F32, values, type, table, TOKENS, COLUMNS, NULL, NULL, 1, NULL);
    const test_head_params p = {COLUMNS, TOKENS, type, n, 2, table, &scale, norm, 30.0f, 1e-6f};
    for (int k = 0; k < 2; k++) {
        setenv("DGEMMA_ISA", k == 0 ? "scalar" : isa, 1);
        test_logits(&p, x, n, logits[k]);
    }
    expect(isa, "wide logits", dg_type_traits_of(type)->name, n, error_of(logits[1], logits[0], (int64_t)n * TOKENS),
           1e-5);
}

int main(int argc, char **argv) {
    const char *isas[] = {"avx2", "avxvnni", "avx512", "neon", "dotprod", "i8mm"};
    const int32_t rows[] = {1, 2, 3, 15, 16, 17, 33};
    int n_compared = 0;
    if (argc == 2 && strcmp(argv[1], "--best") == 0) return puts(test_isa()) < 0;
    for (size_t i = 0; i < sizeof isas / sizeof *isas; i++) {
        if (argc == 2 && strcmp(argv[1], isas[i]) != 0) continue;
        setenv("DGEMMA_ISA", isas[i], 1);
        if (strcmp(test_isa(), isas[i]) != 0) continue;
        n_compared++;
        for (size_t r = 0; r < sizeof rows / sizeof *rows; r++) {
            const int32_t types[] = {DG_TYPE_Q4_0, DG_TYPE_Q4_1,  DG_TYPE_Q8_0,
                                     DG_TYPE_Q6_K, DG_TYPE_NVFP4, DG_TYPE_F16};
            for (int t = 0; t < 6; t++) compare_mlp(isas[i], types[t], rows[r]);
            if (rows[r] == 1 || rows[r] == 3)
                for (int t = 0; t < 6; t++) compare_wide(isas[i], types[t], rows[r]);
            for (int32_t type = 0; type <= DG_TYPE_NVFP4; type++)
                if (dg_type_traits_of(type) != NULL) compare_head(isas[i], type, rows[r]);
            const int32_t cache_types[] = {DG_TYPE_F32, DG_TYPE_F16, DG_TYPE_BF16, DG_TYPE_Q8_0};
            for (int t = 0; t < 4; t++)
                for (int32_t n_rot = 40; n_rot > 0; n_rot -= 28)
                    compare_attention(isas[i], cache_types[t], rows[r], n_rot);
        }
        printf("%s: agrees with scalar, %d cases\n", isas[i], n_cases);
        n_cases = 0;
    }
    if (argc == 2 && n_compared == 0) printf("%s: not on this machine\n", argv[1]);
    return argc == 2 && n_compared == 0;
}
