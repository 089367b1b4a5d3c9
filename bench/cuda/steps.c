/* Runs a model through the C API and prints what it did and how long it took, as one JSON object.
 *
 *     steps time MODEL BACKEND N_PAST N_STEPS [CACHE [N_PROMPT]]
 *                                                 denoising steps behind n_past random tokens, and a prompt of N_PROMPT
 *                                                 (512), with a cache of type f16 (the default), bf16, q8_0 or f32
 *     steps profile MODEL BACKEND N_PAST N_STEPS  the steps alone
 *     steps answer MODEL BACKEND OUT N_STEPS      logits of a canvas behind a short prompt, with and without
 *                                                 self-conditioning, as float32 into the file OUT; then N_STEPS steps
 * BACKEND is cpu or cuda. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "dgemma.h"

#define PROMPT 37
#define PREFILL 512 /* unless named */

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static dg_error error;

static void check(dg_status status, const char *what) {
    if (status == DG_OK) return;
    fprintf(stderr, "%s: %s\n", what, error.message);
    exit(1);
}

static void *allocate(size_t n, size_t size) {
    void *memory = calloc(n, size);
    if (memory == NULL) {
        fprintf(stderr, "out of memory\n");
        exit(1);
    }
    return memory;
}

static void print_text(const char *text) {
    putchar('"');
    for (; *text != '\0'; text++) {
        if (*text == '"' || *text == '\\') putchar('\\');
        putchar(*text == '\n' ? ' ' : *text);
    }
    putchar('"');
}

static void fill(int32_t *tokens, int32_t n, int32_t n_vocab, uint32_t seed) {
    for (int32_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        tokens[i] = (int32_t)((seed >> 8) % (uint32_t)n_vocab);
    }
}

/* Steps of a canvas that never settles; milliseconds of each. */
static void run_steps(dg_model *model, dg_session *session, int32_t n_steps, double *ms) {
    dg_canvas_params params = dg_canvas_params_default(model);
    dg_draft draft;
    params.sampling.confidence_threshold = 1e-30f;
    if (params.sampling.max_denoising_steps < n_steps + 2) params.sampling.max_denoising_steps = n_steps + 2;
    check(dg_canvas_begin(session, &params, &error), "begin");
    for (int32_t i = 0; i < n_steps; i++) {
        double began = now();
        check(dg_canvas_step(session, &draft, &error), "step");
        ms[i] = 1e3 * (now() - began);
    }
}

static void print_list(const char *name, const double *values, int32_t n) {
    printf("\"%s\": [", name);
    for (int32_t i = 0; i < n; i++) printf("%s%.4f", i > 0 ? ", " : "", values[i]);
    printf("]");
}

static void profile_steps(dg_model *model, dg_session *session, int32_t n_past, int32_t n_steps) {
    double *ms = allocate((size_t)n_steps, sizeof *ms);
    if (n_past > 0) check(dg_session_append_random(session, n_past, &error), "random context");
    run_steps(model, session, n_steps, ms);
    print_list("step_ms", ms, n_steps);
    free(ms);
}

static void time_steps(dg_model *model, dg_session *session, const dg_model_info *info, int32_t n_past, int32_t n_steps,
                       int32_t n_prompt) {
    double *ms = allocate((size_t)n_steps + 1, sizeof *ms), began, prefill;
    int32_t *prompt = allocate((size_t)n_prompt, sizeof *prompt);
    fill(prompt, n_prompt, info->n_vocab, 1);
    run_steps(model, session, 2, ms);
    printf("\"first_step_ms\": %.2f, ", ms[0]);
    check(dg_session_prefill(session, prompt, n_prompt, NULL, NULL, &error), "prefill"); /* the first is not counted */
    check(dg_session_truncate(session, 0, &error), "truncate");
    began = now();
    check(dg_session_prefill(session, prompt, n_prompt, NULL, NULL, &error), "prefill");
    prefill = now() - began;
    check(dg_session_truncate(session, 0, &error), "truncate");
    if (n_past > 0) check(dg_session_append_random(session, n_past, &error), "random context");
    run_steps(model, session, n_steps + 1, ms); /* the first is captured, the others launch it again */
    printf("\"prefill_tokens_per_s\": %.1f, \"n_past\": %d, ", n_prompt / prefill, n_past);
    print_list("step_ms", ms + 1, n_steps);
    free(prompt);
    free(ms);
}

static void answer(dg_model *model, dg_session *session, const dg_model_info *info, const char *out, int32_t n_steps) {
    const size_t n = (size_t)info->canvas_length * (size_t)info->n_vocab;
    float *logits = allocate(n, sizeof *logits), *given = allocate(n, sizeof *given);
    int32_t *tokens = allocate((size_t)(PROMPT + info->canvas_length), sizeof *tokens);
    double *ms = allocate((size_t)n_steps, sizeof *ms);
    FILE *file = fopen(out, "wb");
    bool written = file != NULL;
    fill(tokens, PROMPT, info->n_vocab, 2);
    fill(tokens + PROMPT, info->canvas_length, info->n_vocab, 3);
    check(dg_session_prefill(session, tokens, PROMPT, NULL, NULL, &error), "prefill");
    check(dg_session_canvas_logits(session, tokens + PROMPT, NULL, logits, &error), "logits");
    written = written && fwrite(logits, sizeof *logits, n, file) == n;
    for (size_t i = 0; i < n; i++) given[i] = logits[i] / 0.6f;
    check(dg_session_canvas_logits(session, tokens + PROMPT, given, logits, &error), "logits");
    written = written && fwrite(logits, sizeof *logits, n, file) == n;
    if (file == NULL || fclose(file) != 0 || !written) {
        fprintf(stderr, "cannot write %s\n", out);
        exit(1);
    }
    run_steps(model, session, n_steps, ms);
    print_list("step_ms", ms, n_steps);
    free(ms);
    free(tokens);
    free(given);
    free(logits);
}

static int32_t cache_type(const char *name) {
    static const struct {
        const char *name;
        int32_t type;
    } known[] = {{"f16", DG_TYPE_F16}, {"bf16", DG_TYPE_BF16}, {"q8_0", DG_TYPE_Q8_0}, {"f32", DG_TYPE_F32}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strcmp(name, known[i].name) == 0) return known[i].type;
    fprintf(stderr, "cache type %s: expected f16, bf16, q8_0 or f32\n", name);
    exit(2);
}

int main(int argc, char **argv) {
    dg_model *model;
    dg_session *session;
    if (argc < 6 || argc > (argc > 1 && strcmp(argv[1], "time") == 0 ? 8 : 6)) {
        fprintf(stderr, "usage: steps time MODEL cpu|cuda N_PAST N_STEPS [CACHE [N_PROMPT]]\n"
                        "       steps profile MODEL cpu|cuda N_PAST N_STEPS\n"
                        "       steps answer MODEL cpu|cuda OUT N_STEPS\n");
        return 2;
    }
    const bool answers = strcmp(argv[1], "answer") == 0;
    const int32_t n_past = answers ? PROMPT : atoi(argv[4]), n_steps = atoi(argv[5]);
    dg_session_params session_params = dg_session_params_default();
    dg_model_params params = dg_model_params_default();
    session_params.type_k = session_params.type_v = answers ? DG_TYPE_F32 : cache_type(argc > 6 ? argv[6] : "f16");
    const int32_t n_prompt = argc > 7 ? atoi(argv[7]) : PREFILL;
    params.backend = strcmp(argv[3], "cuda") == 0 ? DG_BACKEND_CUDA : DG_BACKEND_CPU;
    params.session = &session_params;
    dg_model_info info = {.size = sizeof info};
    double began = now();
    check(dg_model_open(argv[2], &params, &model, &error), "open");
    dg_model_describe(model, &info);
    session_params.n_ctx = (n_past > n_prompt ? n_past : n_prompt) + info.canvas_length;
    check(dg_session_create(model, &session_params, &session, &error), "session");
    printf("{\"backend\": ");
    print_text(info.backend_name);
    printf(", \"load_s\": %.3f, \"weight_bytes\": %llu, ", now() - began, (unsigned long long)info.weight_bytes);
    if (strcmp(argv[1], "time") == 0)
        time_steps(model, session, &info, n_past, n_steps, n_prompt);
    else if (strcmp(argv[1], "profile") == 0)
        profile_steps(model, session, n_past, n_steps);
    else
        answer(model, session, &info, argv[4], n_steps);
    printf("}\n");
    dg_session_free(session);
    dg_model_close(model);
    return 0;
}
