/* Everything that a program does with the engine, over and over: first as it is, then with the first call to the C
 * library failing that can fail (memory, files, mappings, threads), then with the second, and so on until none is left.
 *
 *     dgemma_faults MODEL.gguf FOLDER
 *
 * Whatever fails: a status with a text comes back, or a result that is the same as without a failure; nothing leaks;
 * and the next attempt succeeds. Prints how many cases were tried; exits with 1 at the first that does not hold. */
#define _GNU_SOURCE
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dgemma.h"
#include "faults_wrap.h"

#define N_PROMPT 20
#define N_WEIGHTS (64 * 256)

static char model_path[4096], session_path[4096], folder[2048];
static dg_model *model;
static dg_session *session;
static int32_t prompt[N_PROMPT];

static void fail(const char *what, long n, const char *why, const char *text) {
    printf("%s, call %ld: %s (%s)\n", what, n, why, text);
    exit(1);
}

static uint64_t hash(uint64_t state, const void *data, size_t n) {
    for (size_t i = 0; i < n; i++) state = (state ^ ((const uint8_t *)data)[i]) * 0x100000001B3u;
    return state;
}

static int n_entries(const char *path) {
    DIR *entries = opendir(path);
    int n = 0;
    if (entries == NULL) return -1;
    while (readdir(entries) != NULL) n++;
    closedir(entries);
    return n;
}

/* ---- What is tried: each puts a hash of its result into `result` ---------------------------------------------- */

static dg_status open_model(bool use_mmap, uint64_t *result, dg_error *error) {
    dg_model_params params = dg_model_params_default();
    dg_model *opened;
    params.backend = DG_BACKEND_CPU;
    params.use_mmap = use_mmap;
    dg_status status = dg_model_open(model_path, &params, &opened, error);
    if (status != DG_OK) return status;
    dg_model_info info = {.size = sizeof info};
    dg_model_describe(opened, &info);
    *result = hash(info.weight_bytes, info.end_tokens, sizeof info.end_tokens);
    dg_model_close(opened);
    return DG_OK;
}
static dg_status open_mapped(uint64_t *result, dg_error *error) { return open_model(true, result, error); }
static dg_status open_read(uint64_t *result, dg_error *error) { return open_model(false, result, error); }

static dg_status create(dg_session **created, dg_error *error) {
    dg_session_params params = dg_session_params_default();
    params.n_ctx = 256;
    params.n_batch = 8;
    params.n_threads = 3;
    return dg_session_create(model, &params, created, error);
}

static dg_status create_session(uint64_t *result, dg_error *error) {
    dg_session *created;
    dg_status status = create(&created, error);
    if (status != DG_OK) return status;
    *result = (uint64_t)dg_session_n_ctx(created);
    dg_session_free(created);
    return DG_OK;
}

static dg_status encode(dg_error *error) {
    dg_status status = dg_session_truncate(session, 0, error);
    if (status == DG_OK) status = dg_session_prefill(session, prompt, N_PROMPT, NULL, NULL, error);
    return status;
}

static dg_status step(uint64_t *result, dg_error *error) {
    dg_draft draft;
    dg_status status = encode(error);
    if (status == DG_OK) status = dg_canvas_begin(session, NULL, error);
    for (int i = 0; i < 2 && status == DG_OK; i++) status = dg_canvas_step(session, &draft, error);
    if (status == DG_OK) *result = hash(1, draft.tokens, 8 * sizeof *draft.tokens);
    return status;
}

static dg_status generate(uint64_t *result, dg_error *error) {
    int32_t tokens[40];
    dg_generate_params params = dg_generate_params_default(model);
    dg_generated generated;
    params.max_tokens = 40;
    params.sampling.max_denoising_steps = 2;
    dg_status status = encode(error);
    if (status == DG_OK) status = dg_session_generate(session, &params, tokens, &generated, error);
    if (status == DG_OK) *result = hash(2, tokens, (size_t)generated.n_tokens * sizeof *tokens);
    return status;
}

static dg_status append_random(uint64_t *result, dg_error *error) {
    dg_status status = dg_session_truncate(session, 0, error);
    if (status == DG_OK) status = dg_session_append_random(session, 100, error);
    if (status == DG_OK) *result = (uint64_t)dg_session_n_past(session);
    return status;
}

static uint64_t hash_file(const char *path) {
    static char bytes[1 << 22];
    FILE *file = fopen(path, "rb");
    if (file == NULL) return 0;
    size_t n = fread(bytes, 1, sizeof bytes, file);
    fclose(file);
    return hash(3, bytes, n);
}

static dg_status save(uint64_t *result, dg_error *error) {
    dg_status status = dg_session_save(session, session_path, error);
    if (status == DG_OK) *result = 1; /* the file is looked at when nothing fails any more */
    return status;
}

static dg_status load(uint64_t *result, dg_error *error) {
    dg_status status = dg_session_load(session, session_path, error);
    int32_t n_past = dg_session_n_past(session);
    if (status != DG_OK && n_past != 0 && n_past != N_PROMPT) fail("load", 0, "half of a session is left", "");
    if (status == DG_OK) *result = hash(4, dg_session_tokens(session), (size_t)n_past * sizeof(int32_t));
    return status;
}

static dg_status quantize(uint64_t *result, dg_error *error) {
    static float values[N_WEIGHTS], back[N_WEIGHTS];
    static uint8_t blocks[N_WEIGHTS * 4];
    dg_status status = DG_OK;
    const int32_t types[] = {DG_TYPE_Q4_0, DG_TYPE_Q6_K, DG_TYPE_NVFP4};
    for (int i = 0; i < N_WEIGHTS; i++) values[i] = (float)(i * 7919 % 1009 - 504) * 1e-3f;
    *result = 5;
    for (int t = 0; t < 3 && status == DG_OK; t++) {
        float multiplier = 1;
        memset(blocks, 0, sizeof blocks);
        status = dg_quantize(DG_TYPE_F32, values, types[t], blocks, 64, 256, NULL,
                             types[t] == DG_TYPE_NVFP4 ? &multiplier : NULL, 2, error);
        if (status == DG_OK) status = dg_dequantize(types[t], blocks, back, 64, 256, 2, error);
        *result = hash(*result, back, sizeof back);
    }
    return status;
}

/* ---- Trying ---------------------------------------------------------------------------------------------------- */

typedef dg_status (*scenario)(uint64_t *result, dg_error *error);

static void try_all(const char *what, scenario run) {
    uint64_t expected = 0, result;
    dg_error error;
    if (run(&expected, &error) != DG_OK) fail(what, 0, "fails by itself", error.message);
    const uint64_t file = hash_file(session_path);
    const long live = faults_live_allocations();
    const int n_files = n_entries("/proc/self/fd"), n_saved = n_entries(folder);
    long n = 1, n_survived = 0;
    for (;; n++) {
        error = (dg_error){0};
        faults_arm(n);
        dg_status status = run(&result, &error);
        const bool hit = faults_hit();
        faults_arm(0);
        if (!hit) break;
        if (status == DG_OK && result != expected) fail(what, n, "another result", "");
        if (status != DG_OK && (error.status != status || error.message[0] == '\0')) fail(what, n, "no text", "");
        if (status == DG_ERROR_ARGUMENT || status == DG_ERROR_CANCELLED) fail(what, n, "wrong status", error.message);
        n_survived += status == DG_OK;
        if (n_entries(folder) != n_saved || hash_file(session_path) != file)
            fail(what, n, "an older file did not stay as it was", error.message);
        if (run(&result, &error) != DG_OK) fail(what, n, "fails afterwards", error.message);
        if (result != expected) fail(what, n, "another result afterwards", "");
        if (faults_live_allocations() != live) fail(what, n, "memory is lost", error.message);
        if (n_entries("/proc/self/fd") != n_files) fail(what, n, "a file stays open", error.message);
    }
    printf("%s: %ld failing calls, %ld of them without effect\n", what, n - 1, n_survived);
}

int main(int argc, char **argv) {
    dg_error error;
    uint64_t result;
    if (argc != 3) return 2;
    snprintf(model_path, sizeof model_path, "%s", argv[1]);
    snprintf(folder, sizeof folder, "%s", argv[2]);
    snprintf(session_path, sizeof session_path, "%s/session", folder);
    for (int i = 0; i < N_PROMPT; i++) prompt[i] = 3 + i;
    dg_model_params params = dg_model_params_default();
    params.backend = DG_BACKEND_CPU;
    if (dg_model_open(model_path, &params, &model, &error) != DG_OK || create(&session, &error) != DG_OK ||
        step(&result, &error) != DG_OK || save(&result, &error) != DG_OK)
        fail("start", 0, "failed", error.message);

    try_all("open", open_mapped);
    try_all("open without mmap", open_read);
    try_all("create a session", create_session);
    try_all("prefill and step", step);
    try_all("generate", generate);
    try_all("random rows", append_random);
    if (encode(&error) != DG_OK) fail("encode", 0, "failed", error.message);
    try_all("save", save);
    try_all("load", load);
    try_all("quantize", quantize);

    dg_session_free(session);
    dg_model_close(model);
    if (faults_live_allocations() != 0) fail("end", 0, "memory is lost", "");
    return 0;
}
