/* Loads the input as a session file of the model that DGEMMA_FUZZ_MODEL names: as it is, and once more with the model's
 * fingerprint and the right checksum, which no mutation would hit. Where it is accepted, denoises one step behind it:
 * for one input of eight, since a step takes a hundred times as long. */
#include <string.h>

#include "dgemma.h"
#include "memory_file.h"
#include "target.h"

/* Places in the file: native/engine/session_file.c draws it. */
enum { FINGERPRINT = 32, CHECKSUM = 40, HEADER = 48, N_CTX = 128 };

static dg_model *model;
static dg_session *session;
static dg_model_info info = {.size = sizeof info};
static uint8_t fingerprint[8];
static memory_file file;

static uint64_t hash(uint64_t state, const uint8_t *bytes, size_t n) {
    for (size_t i = 0; i < n; i++) state = (state ^ bytes[i]) * 0x100000001B3u;
    return state;
}

static void remove_file(void) { memory_file_remove(&file); }

static void begin(void) {
    const char *name = getenv("DGEMMA_FUZZ_MODEL");
    dg_session_params params = dg_session_params_default();
    dg_error error = {0};
    params.n_ctx = N_CTX;
    params.n_batch = 8;
    params.n_threads = 1;
    file = memory_file_open(".session");
    atexit(remove_file);
    if (name == NULL || dg_model_open(name, NULL, &model, &error) != DG_OK ||
        dg_session_create(model, &params, &session, &error) != DG_OK ||
        dg_session_save(session, file.path, &error) != DG_OK) {
        fprintf(stderr, "DGEMMA_FUZZ_MODEL should name a small model: %s\n", error.message);
        exit(2);
    }
    dg_model_describe(model, &info);
    close(file.fd); /* saving puts another file in its place */
    file.fd = open(file.path, O_RDWR | O_CLOEXEC);
    PROMISE(file.fd >= 0 && pread(file.fd, fingerprint, 8, FINGERPRINT) == 8);
}

static void load(const uint8_t *bytes, size_t n) {
    dg_error error = {0};
    memory_file_write(&file, bytes, n);
    PROMISE(dg_session_truncate(session, 0, &error) == DG_OK);
    dg_status status = dg_session_load(session, file.path, &error);
    const int32_t n_past = dg_session_n_past(session), *tokens = dg_session_tokens(session);
    if (status != DG_OK) {
        PROMISE(error.status == status && strstr(error.message, file.path) != NULL);
        PROMISE(status == DG_ERROR_MODEL_FILE || status == DG_ERROR_CONTEXT_LENGTH);
        PROMISE(n_past == 0);
        return;
    }
    PROMISE(n_past >= 0 && n_past <= N_CTX - info.canvas_length);
    for (int32_t i = 0; i < n_past; i++) PROMISE(tokens[i] >= 0 && tokens[i] < info.n_vocab);
    if (hash(0, bytes, n) % 8 != 0) return;
    dg_draft draft;
    PROMISE(dg_canvas_begin(session, NULL, &error) == DG_OK);
    status = dg_canvas_step(session, &draft, &error);
    PROMISE(status == DG_OK || status == DG_ERROR_MODEL_FILE); /* keys and values may be huge */
    for (int32_t i = 0; i < info.canvas_length && status == DG_OK; i++)
        PROMISE(draft.tokens[i] >= 0 && draft.tokens[i] < info.n_vocab);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t n_bytes) {
    if (model == NULL) begin();
    load(input, n_bytes);
    if (n_bytes >= HEADER) {
        uint8_t *mended = malloc(n_bytes);
        PROMISE(mended != NULL);
        memcpy(mended, input, n_bytes);
        memcpy(mended + FINGERPRINT, fingerprint, sizeof fingerprint);
        uint64_t sum = hash(hash(0xCBF29CE484222325u, mended, CHECKSUM), mended + HEADER, n_bytes - HEADER);
        memcpy(mended + CHECKSUM, &sum, sizeof sum);
        load(mended, n_bytes);
        free(mended);
    }
    return 0;
}
