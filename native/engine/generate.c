/* A whole answer, canvas after canvas, for callers without a loop of their own. */
#include <string.h>

#include "base/error.h"
#include "engine/session.h"

dg_generate_params dg_generate_params_default(const dg_model *model) {
    return (dg_generate_params){
        .size = sizeof(dg_generate_params), .sampling = model->sampling, .max_tokens = model->canvas_length};
}

static bool is_end_token(const dg_model *model, int32_t token) {
    for (int32_t i = 0; i < model->n_end_tokens; i++)
        if (model->end_tokens[i] == token) return true;
    return false;
}

dg_status dg_session_generate(dg_session *session, const dg_generate_params *given, int32_t *tokens, dg_generated *out,
                              dg_error *error) {
    const dg_model *model = session->model;
    const int32_t n_canvas = model->canvas_length;
    dg_generate_params p = dg_generate_params_default(model);
    if (given != NULL) memcpy(&p, given, given->size < sizeof p ? given->size : sizeof p);
    *out = (dg_generated){.finish = DG_FINISH_LENGTH};
    if (p.max_tokens < 1)
        return dg_fail(error, DG_ERROR_ARGUMENT, "max_tokens is %d; expected at least 1", p.max_tokens);

    for (;;) {
        dg_canvas_params canvas = dg_canvas_params_default(model);
        dg_draft draft;
        canvas.sampling = p.sampling;
        canvas.seed = p.seed;
        canvas.canvas = out->n_canvases;
        DG_TRY(dg_canvas_begin(session, &canvas, error));
        do {
            DG_TRY(dg_canvas_step(session, &draft, error));
            out->n_steps++;
            if (p.on_draft != NULL && !p.on_draft(canvas.canvas, &draft, p.user)) {
                out->finish = DG_FINISH_CALLBACK;
                return DG_OK;
            }
        } while (!draft.done);
        out->n_canvases++;

        int32_t n = 0, room = p.max_tokens - out->n_tokens;
        while (n < n_canvas && n < room && !is_end_token(model, draft.tokens[n])) n++;
        memcpy(tokens + out->n_tokens, draft.tokens, (size_t)n * sizeof *tokens);
        out->n_tokens += n;
        const bool ended = n < n_canvas && n < room;
        if (p.on_commit != NULL && !p.on_commit(canvas.canvas, tokens + out->n_tokens - n, n, p.user)) {
            out->finish = DG_FINISH_CALLBACK;
            return DG_OK;
        }
        if (ended) {
            out->finish = DG_FINISH_END_TOKEN;
            return DG_OK;
        }
        const bool full = session->cache.n_past + 2 * n_canvas > session->params.n_ctx;
        if (out->n_tokens == p.max_tokens || full) return DG_OK;
        DG_TRY(dg_session_prefill(session, tokens + out->n_tokens - n, n, NULL, NULL, error));
    }
}
