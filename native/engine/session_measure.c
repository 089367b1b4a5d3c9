/* What a session tells about its work: time by operation, and the activations that its weights met. */
#include "base/error.h"
#include "engine/session.h"

int32_t dg_session_operations(const dg_session *session, dg_operation *operations, int32_t capacity) {
    for (int32_t i = 0; i < DG_OP_COUNT && i < capacity; i++) operations[i] = session->profile.operations[i];
    return DG_OP_COUNT;
}

void dg_session_reset_operations(dg_session *session) { dg_profile_reset(&session->profile); }

void dg_session_collect_end(dg_session *session) {
    if (session->collector == NULL) return;
    session->model->backend->collect(session->backend, NULL);
    dg_collector_free(session->collector);
    session->collector = NULL;
}

dg_status dg_session_collect_begin(dg_session *session, dg_error *error) {
    const dg_model *model = session->model;
    if (model->backend->collect == NULL)
        return dg_fail(error, DG_ERROR_BACKEND, "%s cannot collect activations: open the model for the CPU",
                       model->backend_name);
    dg_session_collect_end(session);
    DG_TRY(dg_collector_create(model, &session->collector, error));
    model->backend->collect(session->backend, session->collector);
    return DG_OK;
}

int32_t dg_session_collected(const dg_session *session, dg_activations *activations, int32_t capacity) {
    int32_t n = 0;
    if (session->collector == NULL) return 0;
    const dg_squares *squares = dg_collector_squares(session->collector, &n);
    for (int32_t i = 0; i < n && i < capacity; i++)
        activations[i] = (dg_activations){.name = squares[i].name,
                                          .n_matrices = squares[i].weight->n_matrices,
                                          .n_cols = squares[i].weight->n_cols,
                                          .sums = squares[i].sums,
                                          .counts = squares[i].counts};
    return n;
}
