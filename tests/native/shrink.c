/* A mapped model becomes shorter after it was looked at and before it is read: in every call that reads it.
 *
 *     dgemma_shrink MODEL.gguf COPY.gguf
 *
 * The file is cut by the fstat with which the engine checks it, so that this is the same every time. Each call must
 * fail with DG_ERROR_MODEL_FILE, leave the process and other models in order, and give the handler of SIGBUS back. A
 * fault that is not the engine's must reach the handler that was there. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "dgemma.h"
#include "faults_wrap.h"

enum { N_PROMPT = 40, N_BATCH = 8, KEPT = 4096 };

static const char *original, *copy;
static int32_t prompt[N_PROMPT];
static int n_cases;

static void require(bool holds, const char *what, const char *why) {
    n_cases++;
    if (holds) return;
    printf("%s: %s\n", what, why);
    exit(1);
}

static void copy_file(void) {
    static char bytes[1 << 16];
    FILE *in = fopen(original, "rb"), *out = fopen(copy, "wb");
    size_t n;
    if (in == NULL || out == NULL) exit(2);
    while ((n = fread(bytes, 1, sizeof bytes, in)) > 0)
        if (fwrite(bytes, 1, n, out) != n) exit(2);
    fclose(in);
    fclose(out);
}

static dg_status open_at(const char *path, dg_model **model, dg_session **session, dg_error *error) {
    dg_model_params params = dg_model_params_default();
    dg_session_params sizes = dg_session_params_default();
    params.backend = DG_BACKEND_CPU;
    sizes.n_ctx = 256;
    sizes.n_batch = N_BATCH;
    sizes.n_threads = 3;
    *session = NULL;
    dg_status status = dg_model_open(path, &params, model, error);
    if (status == DG_OK) status = dg_session_create(*model, &sizes, session, error);
    return status;
}

static void close_both(dg_model *model, dg_session *session) {
    dg_session_free(session);
    dg_model_close(model);
}

static dg_status step(dg_session *session, dg_error *error) {
    dg_draft draft;
    dg_status status = dg_canvas_begin(session, NULL, error);
    return status == DG_OK ? dg_canvas_step(session, &draft, error) : status;
}

static dg_status logits(dg_session *session, dg_error *error) {
    static int32_t canvas[1 << 16];
    static float z[1 << 22];
    return dg_session_canvas_logits(session, canvas, NULL, z, error);
}

static dg_status prefill(dg_session *session, dg_error *error) {
    return dg_session_prefill(session, prompt, N_PROMPT, NULL, NULL, error);
}

static dg_status save(dg_session *session, dg_error *error) {
    static char path[4096];
    snprintf(path, sizeof path, "%s.session", copy);
    dg_status status = dg_session_save(session, path, error);
    remove(path);
    return status;
}

static bool default_handler(void) {
    struct sigaction now;
    return sigaction(SIGBUS, NULL, &now) == 0 && (now.sa_flags & SA_SIGINFO) == 0 && now.sa_handler == SIG_DFL;
}

/* `call` on a copy that is cut after the n-th look at it within the call, which looks before and after it reads. */
static void cut_during(const char *what, int n, dg_status (*call)(dg_session *, dg_error *)) {
    dg_model *model, *other;
    dg_session *session, *intact;
    dg_error error;
    copy_file();
    require(open_at(copy, &model, &session, &error) == DG_OK, what, "does not open");
    require(open_at(original, &other, &intact, &error) == DG_OK, what, "the original does not open");
    if (call != prefill) require(prefill(session, &error) == DG_OK, what, "prefill fails before");
    const int32_t n_past = dg_session_n_past(session);
    faults_cut_after_fstat(n, copy, KEPT);
    require(call(session, &error) == DG_ERROR_MODEL_FILE, what, "succeeds with a cut file");
    require(faults_cut(), what, "was not cut");
    require(strstr(error.message, copy) != NULL, what, error.message);
    /* Of a prompt, what was encoded before the cut stays: here the first of two chunks. */
    require(dg_session_n_past(session) == n_past + n / 3 * N_BATCH, what, "keeps what it made of a cut file");
    require(default_handler(), what, "keeps the handler");
    require(call(session, &error) == DG_ERROR_MODEL_FILE, what, "succeeds a second time");
    copy_file();
    require(call(session, &error) == DG_ERROR_MODEL_FILE, what, "trusts pages that it has replaced");
    require(prefill(intact, &error) == DG_OK && step(intact, &error) == DG_OK, what, "harms another model");
    close_both(model, session);
    close_both(other, intact);
}

static void cut_during_open(int n) {
    dg_model *model;
    dg_session *session;
    dg_error error;
    copy_file();
    faults_cut_after_fstat(n, copy, KEPT);
    require(open_at(copy, &model, &session, &error) != DG_OK, "open", "succeeds with a cut file");
    require(default_handler(), "open", "keeps the handler");
}

/* ---- Faults of others ------------------------------------------------------------------------------------------ */

static sigjmp_buf back;
static volatile int n_caught;
static volatile char *gone; /* a page of a mapping whose file is empty */

static void on_fault(int number) {
    n_caught++;
    siglongjmp(back, 1);
}

static void touch(void) {
    if (sigsetjmp(back, 1) == 0) (void)*gone;
}

static bool touch_in_between(float done, void *user) {
    touch();
    return true;
}

static void faults_of_others(void) {
    dg_model *model;
    dg_session *session;
    dg_error error;
    struct sigaction mine = {.sa_handler = on_fault}, now;
    int fd = open(copy, O_RDWR | O_TRUNC);
    gone = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);
    sigaction(SIGBUS, &mine, NULL);
    require(open_at(original, &model, &session, &error) == DG_OK, "other fault", "the original does not open");
    touch();
    require(n_caught == 1, "other fault", "is lost before a call");
    require(dg_session_prefill(session, prompt, 8, touch_in_between, NULL, &error) == DG_OK, "other fault",
            error.message);
    require(n_caught == 2, "other fault", "is lost within a call");
    sigaction(SIGBUS, NULL, &now);
    require(now.sa_handler == on_fault, "other fault", "the handler is not given back");
    require(step(session, &error) == DG_OK, "other fault", "a call fails afterwards");
    signal(SIGBUS, SIG_DFL);
    close_both(model, session);
    munmap((void *)gone, 4096);
    close(fd);
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    original = argv[1];
    copy = argv[2];
    for (int i = 0; i < N_PROMPT; i++) prompt[i] = 3 + i;
    cut_during("prefill", 1, prefill);
    cut_during("prefill, second chunk", 3, prefill);
    cut_during("step", 1, step);
    cut_during("logits", 1, logits);
    cut_during("save", 1, save);
    for (int n = 1; n <= 2; n++) cut_during_open(n);
    faults_of_others();
    printf("%d checks hold with a file that becomes shorter\n", n_cases);
    return 0;
}
