/* Sessions at once: they share a model, are cancelled from elsewhere, and have more threads than the machine has cores.
 * What each says must be what it says alone. Built with ThreadSanitizer this is where races would show.
 *
 *     dgemma_concurrent MODEL.gguf */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "dgemma.h"

enum { N_PROMPT = 24, N_TOKENS = 48, N_SESSIONS = 4 };

static dg_model *model;

static void require(bool holds, const char *what, const dg_error *error) {
    if (holds) return;
    printf("%s does not hold (%s)\n", what, error != NULL ? error->message : "");
    exit(1);
}

static dg_session *create(int32_t n_threads) {
    dg_session_params params = dg_session_params_default();
    dg_session *session = NULL;
    dg_error error = {0};
    params.n_ctx = 256;
    params.n_batch = 16;
    params.n_threads = n_threads;
    require(dg_session_create(model, &params, &session, &error) == DG_OK, "creating a session", &error);
    return session;
}

typedef struct job {
    int number;
    int32_t n_threads;
    int32_t tokens[N_TOKENS];
    int32_t n_tokens;
} job;

static void *answer(void *argument) {
    job *j = argument;
    int32_t prompt[N_PROMPT];
    dg_error error = {0};
    dg_session *session = create(j->n_threads);
    dg_generate_params params = dg_generate_params_default(model);
    dg_generated generated;
    for (int i = 0; i < N_PROMPT; i++) prompt[i] = 3 + (i * (j->number + 2)) % 200;
    params.max_tokens = N_TOKENS;
    params.sampling.max_denoising_steps = 3;
    params.seed = (uint64_t)j->number;
    require(dg_session_prefill(session, prompt, N_PROMPT, NULL, NULL, &error) == DG_OK, "prefill", &error);
    require(dg_session_generate(session, &params, j->tokens, &generated, &error) == DG_OK, "an answer", &error);
    j->n_tokens = generated.n_tokens;
    dg_session_free(session);
    return NULL;
}

static void at_once(int32_t n_threads) {
    job alone[N_SESSIONS] = {0}, together[N_SESSIONS] = {0};
    pthread_t threads[N_SESSIONS];
    for (int i = 0; i < N_SESSIONS; i++) {
        alone[i] = (job){.number = i, .n_threads = 1};
        together[i] = (job){.number = i, .n_threads = n_threads};
        answer(&alone[i]);
    }
    for (int i = 0; i < N_SESSIONS; i++) pthread_create(&threads[i], NULL, answer, &together[i]);
    for (int i = 0; i < N_SESSIONS; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < N_SESSIONS; i++)
        require(together[i].n_tokens == alone[i].n_tokens &&
                    memcmp(together[i].tokens, alone[i].tokens, sizeof alone[i].tokens) == 0,
                "the same text as alone", NULL);
}

static void *cancel(void *argument) {
    usleep(2000);
    dg_session_cancel(argument);
    return NULL;
}

/* A cancellation from another thread ends the call, and the session says afterwards what it always says. */
static void cancelled(void) {
    for (int round = 0; round < 5; round++) {
        dg_session *session = create(2);
        dg_draft draft;
        dg_error error = {0};
        dg_status status = DG_OK;
        pthread_t thread;
        dg_canvas_params params = dg_canvas_params_default(model);
        params.sampling.max_denoising_steps = 100000;
        params.sampling.confidence_threshold = 1e-30f;
        require(dg_canvas_begin(session, &params, &error) == DG_OK, "begin", &error);
        pthread_create(&thread, NULL, cancel, session);
        while (status == DG_OK) {
            status = dg_canvas_step(session, &draft, &error);
            if (status == DG_OK && draft.done) status = dg_canvas_begin(session, &params, &error);
        }
        pthread_join(thread, NULL);
        require(status == DG_ERROR_CANCELLED, "a cancelled call", &error);
        require(dg_canvas_begin(session, &params, &error) == DG_OK && dg_canvas_step(session, &draft, &error) == DG_OK,
                "a step after a cancelled one", &error);
        dg_session_free(session);
    }
}

/* The child of a fork has none of the threads: its parent's sessions refuse, and all can be freed, or made anew. */
static void forked(const char *path) {
    dg_session *session = create(3);
    dg_error error = {0};
    int32_t token = 3;
    int status = -1;
    require(dg_session_prefill(session, &token, 1, NULL, NULL, &error) == DG_OK, "prefill before the fork", &error);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        alarm(60); /* a child that hangs ends with a signal */
        dg_draft draft;
        dg_status refused[3] = {dg_session_prefill(session, &token, 1, NULL, NULL, &error),
                                dg_canvas_begin(session, NULL, &error), dg_canvas_step(session, &draft, &error)};
        require(refused[0] == DG_ERROR_ARGUMENT && refused[2] == DG_ERROR_ARGUMENT, "a refusal after the fork", &error);
        require(strstr(error.message, "fork") != NULL, "a message that says why", &error);
        dg_session_free(session);
        dg_model_close(model);
        require(dg_model_open(path, NULL, &model, &error) == DG_OK, "opening in the child", &error);
        session = create(2);
        require(dg_session_prefill(session, &token, 1, NULL, NULL, &error) == DG_OK, "prefill in the child", &error);
        dg_session_free(session);
        dg_model_close(model);
        _exit(0);
    }
    require(child > 0 && waitpid(child, &status, 0) == child && status == 0, "a child that ends well", NULL);
    require(dg_session_prefill(session, &token, 1, NULL, NULL, &error) == DG_OK, "prefill after the fork", &error);
    dg_session_free(session);
}

int main(int argc, char **argv) {
    dg_error error = {0};
    if (argc < 2) return 2;
    require(dg_model_open(argv[1], NULL, &model, &error) == DG_OK, "opening", &error);
    at_once(1);
    at_once(2);
    at_once(16); /* 64 threads in all */
    cancelled();
#if !defined(__SANITIZE_THREAD__) /* which does not go on in the child of a process with threads */
    forked(argv[1]);
#endif
    dg_model_close(model);
    printf("%d sessions at once say what they say alone, on 1, 2 and 16 threads each\n", N_SESSIONS);
    return 0;
}
