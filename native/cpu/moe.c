/* The mixture of experts. Rows are brought together by expert, so that an expert's weights are decoded once for all of
 * its rows; pieces of work are (expert, some features), the experts with most rows first. */
#include "cpu/cpu.h"

#include <math.h>
#include <string.h>

#define DOWN_FEATURES 256 /* output features of a piece of work: rows of the down projection are short */

typedef struct mixture {
    dg_backend *backend;
    const dg_moe *moe;
    const float *x;
    float *out;
    dg_form form, hidden_form;
    dg_gated gated;
    int32_t n_experts; /* with rows */
    int64_t n_tiles;   /* of all experts */
    int64_t n_pieces;  /* of one expert */
} mixture;

/* ---- Routing ------------------------------------------------------------------------------------------------- */

/* The experts_used most probable experts of a row, the most probable first, and their weights. */
static void choose_experts(void *context, int64_t row, int thread) {
    const mixture *m = context;
    dg_backend *backend = m->backend;
    const int32_t n_experts = backend->model->n_experts, n_used = backend->model->n_experts_used;
    float *p = backend->router_logits + row * n_experts;
    int32_t *chosen = backend->chosen + row * n_used;
    float *weight = backend->expert_weight + row * n_used;
    backend->kernels->softmax(p, n_experts); /* the sum cancels when the weights are made to add up to 1 */
    float total = 0;
    for (int32_t e = 0; e < n_experts; e++)
        if (!(p[e] >= 0)) p[e] = 0; /* NaN, from a damaged file: a row must still choose distinct experts */
    for (int32_t j = 0; j < n_used; j++) {
        int32_t best = 0;
        for (int32_t e = 1; e < n_experts; e++)
            if (p[e] > p[best]) best = e;
        chosen[j] = best;
        weight[j] = p[best];
        total += p[best];
        p[best] = -1;
    }
    for (int32_t j = 0; j < n_used; j++) weight[j] = weight[j] / total * m->moe->expert_scale[chosen[j]];
}

static void route(mixture *m, int32_t n) {
    dg_backend *backend = m->backend;
    const dg_model *model = backend->model;
    const dg_weight router = {.data = m->moe->router,
                              .type = DG_TYPE_F32,
                              .n_matrices = 1,
                              .n_rows = model->n_experts,
                              .n_cols = model->n_embd,
                              .matrix_bytes = (uint64_t)model->n_experts * (uint64_t)model->n_embd * sizeof(float)};
    dg_rows rows = dg_pack_normed(backend, (dg_form){.integer = false}, m->x, n, model->n_embd, m->moe->router_scale,
                                  1.0f / sqrtf((float)model->n_embd));
    dg_matmul(backend, &router, &rows, backend->router_logits);
    dg_pool_run(backend->pool, n, choose_experts, m);
}

/* Orders the chosen (row, expert) pairs by expert. */
static void sort_by_expert(mixture *m, int32_t n) {
    dg_backend *backend = m->backend;
    const int32_t n_all = backend->model->n_experts, n_pairs = n * backend->model->n_experts_used;
    dg_expert *experts = backend->experts;
    int32_t *rank = backend->expert_rank, *next = backend->expert_rank + n_all;
    memset(next, 0, (size_t)n_all * sizeof *next);
    for (int32_t i = 0; i < n_pairs; i++) next[backend->chosen[i]]++;

    m->n_experts = 0;
    for (int32_t e = 0; e < n_all; e++) { /* insertion: there are a few hundred at most */
        if (next[e] == 0) continue;
        int32_t at = m->n_experts++;
        for (; at > 0 && experts[at - 1].n < next[e]; at--) experts[at] = experts[at - 1];
        experts[at] = (dg_expert){.expert = e, .n = next[e]};
    }
    int32_t first = 0, first_tile = 0;
    for (int32_t i = 0; i < m->n_experts; i++) {
        dg_expert *expert = &experts[i];
        expert->first = next[expert->expert] = first;
        expert->first_tile = first_tile;
        rank[expert->expert] = i;
        first += expert->n;
        first_tile += dg_rows_n_tiles(backend->kernels, expert->n);
    }
    m->n_tiles = first_tile;
    for (int32_t i = 0; i < n_pairs; i++) {
        backend->expert_row[i] = next[backend->chosen[i]]++;
        backend->row_of_expert[backend->expert_row[i]] = i / backend->model->n_experts_used;
    }
}

/* ---- The experts --------------------------------------------------------------------------------------------- */

static dg_rows expert_inputs(const mixture *m, const dg_expert *expert) {
    return dg_rows_in(m->backend->kernels, m->backend->packed_experts, m->form, expert->n, m->gated.gate->n_cols,
                      expert->first_tile, m->n_tiles);
}

static dg_rows expert_hidden(const mixture *m, const dg_expert *expert) {
    return dg_rows_in(m->backend->kernels, m->backend->packed_experts_hidden, m->hidden_form, expert->n, m->gated.n_ff,
                      expert->first_tile, m->n_tiles);
}

static void norm_row(void *context, int64_t row, int thread) {
    const mixture *m = context;
    const dg_model *model = m->backend->model;
    m->backend->kernels->rms_norm(m->x + row * model->n_embd, m->moe->norm, model->n_embd, model->rms_eps,
                                  m->out + row * model->n_embd);
}

/* Packs the rows of one expert, where that is done by tiles, from `out`, where they wait. */
static void pack_expert(void *context, int64_t item, int thread) {
    const mixture *m = context;
    const dg_expert *expert = &m->backend->experts[item];
    const dg_rows rows = expert_inputs(m, expert);
    for (int32_t first = 0; first < rows.n; first += rows.per_tile) {
        const int32_t n = rows.n - first < rows.per_tile ? rows.n - first : rows.per_tile;
        const float *x[DG_MAX_TILE_ROWS];
        for (int32_t i = 0; i < n; i++)
            x[i] = m->out + (int64_t)m->backend->row_of_expert[expert->first + first + i] * rows.n_cols;
        m->backend->kernels->pack_tile(&rows, first / rows.per_tile, x, n);
    }
}

/* Packs one row of x for each of its experts. */
static void pack_for_experts(void *context, int64_t row, int thread) {
    const mixture *m = context;
    dg_backend *backend = m->backend;
    const int32_t n_used = backend->model->n_experts_used, n_embd = backend->model->n_embd;
    float *normed = backend->threads[thread].row;
    backend->kernels->rms_norm(m->x + row * n_embd, m->moe->norm, n_embd, backend->model->rms_eps, normed);
    dg_rows first;
    int32_t first_row = 0;
    for (int32_t j = 0; j < n_used; j++) {
        const int64_t i = row * n_used + j;
        const dg_expert *expert = &backend->experts[backend->expert_rank[backend->chosen[i]]];
        const dg_rows rows = expert_inputs(m, expert);
        const int32_t r = backend->expert_row[i] - expert->first;
        if (j > 0 && m->form.integer) {
            dg_copy_packed(backend->kernels, &first, first_row, &rows, r);
            continue;
        }
        backend->kernels->pack(&rows, r, 0, normed, n_embd);
        first = rows;
        first_row = r;
    }
}

/* What a thread will probably do after `item`, as the threads take pieces in turn: rows of `w`, `features` for each
 * piece, from w_first on. */
static dg_features piece_after(const mixture *m, int64_t item, const dg_weight *w, int64_t w_first, int64_t features) {
    const int64_t next = item + dg_pool_size(m->backend->pool);
    if (next >= m->n_experts * m->n_pieces) return (dg_features){0};
    return (dg_features){w, m->backend->experts[next / m->n_pieces].expert, w_first + next % m->n_pieces * features};
}

static void multiply_hidden(void *context, int64_t item, int thread) {
    const mixture *m = context;
    const dg_expert *expert = &m->backend->experts[item / m->n_pieces];
    dg_rows rows = expert_inputs(m, expert), hidden = expert_hidden(m, expert);
    dg_gated gated = m->gated;
    gated.matrix = expert->expert;
    const dg_features next = piece_after(m, item, gated.gate, gated.gate_first, DG_FEATURES);
    dg_multiply_gated(m->backend, thread, &gated, item % m->n_pieces * DG_FEATURES, &next, &rows, &hidden);
}

static void multiply_down(void *context, int64_t item, int thread) {
    const mixture *m = context;
    dg_backend *backend = m->backend;
    const dg_expert *expert = &backend->experts[item / m->n_pieces];
    const dg_weight *down = &m->moe->down;
    const dg_rows hidden = expert_hidden(m, expert);
    const dg_features now = {down, expert->expert, item % m->n_pieces * DOWN_FEATURES};
    const dg_features next = piece_after(m, item, down, 0, DOWN_FEATURES);
    const int64_t left = down->n_rows - now.first;
    dg_multiply_features(backend->kernels, &backend->threads[thread], &now, left < DOWN_FEATURES ? left : DOWN_FEATURES,
                         &next, &hidden, backend->expert_out + expert->first * down->n_rows + now.first, down->n_rows);
}

/* Adds the experts' outputs up, always in the order of their probabilities: the result depends on nothing else. */
static void add_experts(void *context, int64_t row, int thread) {
    const mixture *m = context;
    dg_backend *backend = m->backend;
    const int32_t n_used = backend->model->n_experts_used, n_embd = backend->model->n_embd;
    float *out = m->out + row * n_embd;
    memset(out, 0, (size_t)n_embd * sizeof *out);
    for (int64_t i = row * n_used; i < (row + 1) * n_used; i++)
        backend->kernels->add_scaled(backend->expert_out + (int64_t)backend->expert_row[i] * n_embd,
                                     backend->expert_weight[i], n_embd, out);
}

void dg_cpu_moe(dg_backend *backend, const dg_moe *moe, const float *x, int32_t n, float *out) {
    const dg_cpu_kernels *kernels = backend->kernels;
    mixture m = {.backend = backend, .moe = moe, .x = x, .out = out};
    if (moe->gate_up.data != NULL)
        m.gated = (dg_gated){.gate = &moe->gate_up,
                             .up = &moe->gate_up,
                             .up_first = moe->gate_up.n_rows / 2,
                             .n_ff = moe->gate_up.n_rows / 2};
    else
        m.gated = (dg_gated){.gate = &moe->gate, .up = &moe->up, .n_ff = moe->gate.n_rows};
    m.gated.hidden_squares = dg_collector_of(backend->collector, &moe->down);
    m.form = dg_common_form(kernels, m.gated.gate, m.gated.up);
    m.hidden_form = dg_form_of(kernels, &moe->down);

    route(&m, n);
    dg_collect_chosen(backend, m.gated.gate, x, n, moe->norm);
    if (m.gated.up != m.gated.gate) dg_collect_chosen(backend, m.gated.up, x, n, moe->norm);
    sort_by_expert(&m, n);
    if (m.form.weight_tiles) {
        dg_pool_run(backend->pool, n, norm_row, &m);
        dg_pool_run(backend->pool, m.n_experts, pack_expert, &m);
    } else {
        dg_pool_run(backend->pool, n, pack_for_experts, &m);
    }
    m.n_pieces = (m.gated.n_ff + DG_FEATURES - 1) / DG_FEATURES;
    dg_pool_run(backend->pool, m.n_experts * m.n_pieces, multiply_hidden, &m);
    m.n_pieces = (moe->down.n_rows + DOWN_FEATURES - 1) / DOWN_FEATURES;
    dg_pool_run(backend->pool, m.n_experts * m.n_pieces, multiply_down, &m);
    dg_pool_run(backend->pool, n, add_experts, &m);
}
