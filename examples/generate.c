/* Continues a prompt with the installed library: no Python, no other dependency.
 *
 *     cc generate.c $(pkg-config --cflags --libs dgemma) -o generate
 *     ./generate MODEL.gguf 64 2 106 1645 108
 *
 * The arguments are a model, the number of tokens wanted, and the prompt's token ids. The library works on ids: text is
 * turned into them, and back, by the vocabulary that stands in the file (keys tokenizer.ggml.*), with a tokenizer of
 * your choice. Drafts of a canvas go to standard error as they settle, the answer's ids to standard output. */
#include <stdio.h>
#include <stdlib.h>

#include <dgemma.h>

static bool show_draft(int32_t canvas, const dg_draft *draft, void *user) {
    (void)user;
    fprintf(stderr, "canvas %d, step %d: %d accepted, mean entropy %.3f%s\n", canvas, draft->step, draft->n_accepted,
            draft->mean_entropy, draft->settled ? ", settled" : "");
    return true; /* false would stop the answer */
}

static int fail(const dg_error *error) {
    fprintf(stderr, "generate: %s\n", error->message);
    return 1;
}

/* Encodes the prompt and prints the answer. */
static int answer(const dg_model *model, dg_session *session, const int32_t *prompt, int32_t n_prompt,
                  int32_t max_tokens) {
    dg_error error;
    dg_generated generated;
    dg_generate_params params = dg_generate_params_default(model);
    int32_t *tokens = malloc((size_t)max_tokens * sizeof *tokens);
    params.max_tokens = max_tokens;
    params.on_draft = show_draft;
    params.seed = 1;
    if (tokens == NULL) return 1;
    dg_status status = dg_session_prefill(session, prompt, n_prompt, NULL, NULL, &error);
    if (status == DG_OK) status = dg_session_generate(session, &params, tokens, &generated, &error);
    for (int32_t i = 0; status == DG_OK && i < generated.n_tokens; i++) printf("%d ", tokens[i]);
    if (status == DG_OK)
        printf("\n");
    else
        fail(&error);
    free(tokens);
    return status == DG_OK ? 0 : 1;
}

int main(int argc, char **argv) {
    dg_error error;
    dg_model *model;
    dg_session *session;
    if (argc < 4) {
        fprintf(stderr, "usage: generate MODEL.gguf MAX_TOKENS ID [ID …]   (dgemma %s)\n", dg_version());
        return 2;
    }
    const int32_t max_tokens = (int32_t)strtol(argv[2], NULL, 10), n_prompt = argc - 3;
    int32_t *prompt = malloc((size_t)n_prompt * sizeof *prompt);
    if (prompt == NULL || max_tokens < 1) return 2;
    for (int32_t i = 0; i < n_prompt; i++) prompt[i] = (int32_t)strtol(argv[3 + i], NULL, 10);

    /* NULL: the defaults, which use a GPU where one can serve. */
    if (dg_model_open(argv[1], NULL, &model, &error) != DG_OK) return fail(&error);
    dg_session_params params = dg_session_params_default();
    params.n_ctx = 0; /* the model's own */
    dg_status status = dg_session_create(model, &params, &session, &error);
    dg_model_close(model); /* the session keeps it alive */
    if (status != DG_OK) return fail(&error);

    const int result = answer(model, session, prompt, n_prompt, max_tokens);
    dg_session_free(session);
    free(prompt);
    return result;
}
