/* The soft embedding in the same pass over the vocabulary as the logits: sums of the embedding table, weighted with
 * exponentials, as an attention sums values whose keys the table was a moment ago.
 *
 * The vocabulary is worked off in rounds of DG_ROUND_BLOCKS blocks, each in four steps whose pieces any thread takes
 * when it is free: logits by panels of tokens; statistics and the online softmax by rows; weights by blocks, and the
 * table turned by panels; sums by columns. Each sum is added up in the order of tokens whatever the number of threads,
 * and nothing is done twice for two threads, except that a panel that somebody wants is decoded again.
 *
 * A block is left out for a row to which it would add less than its part of the mass that may be dropped: as a canvas
 * settles, that is nearly all of them. */
#include "cpu/head.h"

#include <math.h>
#include <string.h>

#define COLUMN_PANELS 2 /* of a piece of the sums, each `lanes` columns wide */

typedef struct soft_round {
    const dg_head_job *job;
    int64_t first_block;
    int32_t n_blocks;
    bool narrow;
} soft_round;

/* Rounding to 13 bits is well below what a quantized table has lost already; float tables are left as they are. */
static bool is_narrow(const dg_backend *backend) {
    return backend->kernels->has_narrow && dg_form_of(backend->kernels, &backend->model->token_embd).integer;
}

static int64_t padded_embd(const dg_backend *backend) {
    const int64_t lanes = backend->kernels->lanes;
    return (backend->model->n_embd + lanes - 1) / lanes * lanes;
}

static int64_t n_panels(const soft_round *round) {
    return (int64_t)round->n_blocks * DG_VOCABULARY_BLOCK / round->job->backend->kernels->lanes;
}

/* ---- Where things are ---------------------------------------------------------------------------------------- */

static float *logits_of(const soft_round *round, int64_t block) {
    return round->job->backend->soft_round.logits + block * round->job->n * DG_VOCABULARY_BLOCK;
}

static dg_soft_decision *decision_of(const soft_round *round, int64_t row, int64_t block) {
    return &round->job->backend->soft_round.decisions[row * DG_ROUND_BLOCKS + block];
}

/* Words of `values` that a block takes for one column panel. */
static int64_t value_words(const soft_round *round) {
    return DG_VOCABULARY_BLOCK / (round->narrow ? 2 : 1) * (int64_t)round->job->backend->kernels->lanes;
}

/* One block of the round, as add_weighted takes it: columns first_col … first_col + n_cols − 1. */
static dg_soft_block block_of(const soft_round *round, int64_t block, int64_t first_col, int64_t n_cols) {
    const dg_backend *backend = round->job->backend;
    const dg_soft_round *memory = &backend->soft_round;
    const int64_t lanes = backend->kernels->lanes, canvas = backend->model->canvas_length;
    const int64_t places = canvas + backend->kernels->tile_rows, panels = padded_embd(backend) / lanes;
    const int64_t panel = first_col / lanes, scales = DG_VOCABULARY_BLOCK / lanes;
    const int32_t n_tokens = dg_tokens_of_block(round->job, round->first_block + block);
    const int32_t unit = round->narrow ? (int32_t)lanes : 1;
    return (dg_soft_block){.narrow = round->narrow,
                           .n_tokens = (n_tokens + unit - 1) / unit * unit, /* what is added weighs nothing */
                           .n_rows = memory->n_rows[block],
                           .rows = memory->rows + block * canvas,
                           .factors = memory->factors + block * canvas,
                           .weights = memory->weights + block * places * DG_VOCABULARY_BLOCK,
                           .weight_scales = memory->weight_scales + block * canvas,
                           .values = memory->values + (block * panels + panel) * value_words(round),
                           .value_scales = memory->value_scales + (block * panels + panel) * scales,
                           .values_stride = DG_VOCABULARY_BLOCK,
                           .n_cols = n_cols,
                           .n_sums = round->job->n_sums,
                           .sums = backend->soft_sums + first_col * round->job->n_sums};
}

/* ---- The steps of a round ------------------------------------------------------------------------------------ */

static void make_logits(void *context, int64_t item, int thread) {
    const soft_round *round = context;
    const dg_head_job *job = round->job;
    dg_backend *backend = job->backend;
    const int64_t lanes = backend->kernels->lanes, n_vocab = backend->model->n_vocab;
    const int64_t at = item * lanes, first = round->first_block * DG_VOCABULARY_BLOCK + at;
    if (first >= n_vocab) return;
    const int32_t n_tokens = n_vocab - first < lanes ? (int32_t)(n_vocab - first) : (int32_t)lanes;
    float *out = logits_of(round, at / DG_VOCABULARY_BLOCK) + at % DG_VOCABULARY_BLOCK;
    if (job->z == NULL) {
        const int64_t next = first + lanes * dg_pool_size(backend->pool);
        dg_panel_logits(job, &backend->threads[thread], &job->rows, first, n_tokens, next, out, DG_VOCABULARY_BLOCK);
        return;
    }
    for (int32_t r = 0; r < job->n; r++)
        memcpy(out + r * DG_VOCABULARY_BLOCK, job->z + r * n_vocab + first, (size_t)n_tokens * sizeof *out);
}

/* Statistics of one row, and which blocks matter to it. */
static void decide(void *context, int64_t row, int thread) {
    const soft_round *round = context;
    const dg_head_job *job = round->job;
    const dg_backend *backend = job->backend;
    const dg_cpu_kernels *kernels = backend->kernels;
    const double negligible = (double)backend->params.soft_embedding_bound / (double)job->n_blocks;
    dg_online_softmax *softmax = &backend->online_softmax[row];
    for (int32_t i = 0; i < round->n_blocks; i++) {
        const int64_t block = round->first_block + i;
        const int32_t n_tokens = dg_tokens_of_block(job, block);
        float *z = logits_of(round, i) + row * DG_VOCABULARY_BLOCK;
        dg_block_statistics *t = &backend->block_statistics[row * job->n_blocks + block];
        if (job->z == NULL) kernels->softcap(z, n_tokens, backend->model->logit_softcap, job->temperature);
        kernels->head_statistics(z, n_tokens, (int32_t)block * DG_VOCABULARY_BLOCK, t);
        const float max = t->max > softmax->max ? t->max : softmax->max;
        const double factor = exp((double)softmax->max - (double)max);
        const double mass = exp((double)t->max - (double)max) * (double)t->sum;
        softmax->max = max;
        softmax->denominator = softmax->denominator * factor + mass;
        /* the sum can only grow: what is negligible now stays so */
        *decision_of(round, row, i) =
            (dg_soft_decision){(float)factor, max, factor != 1.0 || !(mass <= negligible * softmax->denominator)};
    }
}

/* Gathers the rows to which block i matters. */
static void weigh_block(const soft_round *round, int64_t i) {
    dg_backend *backend = round->job->backend;
    const dg_cpu_kernels *kernels = backend->kernels;
    dg_soft_round *memory = &backend->soft_round;
    const int32_t n_tokens = dg_tokens_of_block(round->job, round->first_block + i);
    const int64_t first = i * backend->model->canvas_length;
    float *weights = memory->weights + i * (backend->model->canvas_length + kernels->tile_rows) * DG_VOCABULARY_BLOCK;
    const int32_t unit = round->narrow ? kernels->lanes : 1, n_padded = (n_tokens + unit - 1) / unit * unit;
    int32_t n = 0;
    for (int32_t r = 0; r < round->job->n; r++) {
        const dg_soft_decision *decision = decision_of(round, r, i);
        if (!decision->wanted) continue;
        float e[DG_VOCABULARY_BLOCK];
        kernels->exponentials(logits_of(round, i) + r * DG_VOCABULARY_BLOCK, n_tokens, decision->max, e);
        for (int32_t k = n_tokens; k < n_padded; k++) e[k] = 0;
        memory->rows[first + n] = r;
        memory->factors[first + n] = decision->factor;
        memory->weight_scales[first + n] = kernels->pack_weights(e, n_padded, round->narrow, n, weights);
        n++;
    }
    memory->n_rows[i] = n;
}

static bool is_block_wanted(const soft_round *round, int64_t block) {
    for (int32_t r = 0; r < round->job->n; r++)
        if (decision_of(round, r, block)->wanted) return true;
    return false;
}

/* Turns the table's rows of one panel by columns. */
static void spread_panel(const soft_round *round, dg_thread *thread, int64_t item) {
    dg_backend *backend = round->job->backend;
    const dg_cpu_kernels *kernels = backend->kernels;
    const dg_weight *table = &backend->model->token_embd;
    dg_soft_round *memory = &backend->soft_round;
    const int64_t lanes = kernels->lanes, panels = padded_embd(backend) / lanes;
    const int64_t at = item * lanes, block = at / DG_VOCABULARY_BLOCK, i = at % DG_VOCABULARY_BLOCK;
    const int64_t first = round->first_block * DG_VOCABULARY_BLOCK + at;
    if (first >= table->n_rows || !is_block_wanted(round, block)) return;
    const int32_t n_lanes = table->n_rows - first < lanes ? (int32_t)(table->n_rows - first) : (int32_t)lanes;
    float *values = memory->values + block * panels * value_words(round) + (round->narrow ? i / 2 : i) * lanes;
    float *scales = memory->value_scales + block * panels * (DG_VOCABULARY_BLOCK / lanes) + i / lanes;
    dg_panel *panel = &thread->panel;
    panel->form = dg_form_of(kernels, table);
    const int64_t strip = dg_strip_cols(kernels, panel->form, table->n_cols);
    for (panel->first_col = 0; panel->first_col < table->n_cols; panel->first_col += strip) {
        panel->n_cols = table->n_cols - panel->first_col < strip ? table->n_cols - panel->first_col : strip;
        kernels->decode(table, 0, first, n_lanes, panel);
        kernels->spread(panel, n_lanes, round->narrow, padded_embd(backend), DG_VOCABULARY_BLOCK, values, scales);
    }
}

static void weigh_and_spread(void *context, int64_t item, int thread) {
    const soft_round *round = context;
    if (item < round->n_blocks)
        weigh_block(round, item);
    else
        spread_panel(round, &round->job->backend->threads[thread], item - round->n_blocks);
}

static void add_columns(void *context, int64_t item, int thread) {
    const soft_round *round = context;
    const dg_backend *backend = round->job->backend;
    const int64_t n_cols = COLUMN_PANELS * backend->kernels->lanes, first = item * n_cols;
    const int64_t left = padded_embd(backend) - first;
    for (int32_t i = 0; i < round->n_blocks; i++) {
        const dg_soft_block s = block_of(round, i, first, left < n_cols ? left : n_cols);
        if (s.n_rows > 0) backend->kernels->add_weighted(&s);
    }
}

void dg_sum_soft_embeddings(dg_head_job *job) {
    dg_backend *backend = job->backend;
    const int64_t width = COLUMN_PANELS * backend->kernels->lanes;
    for (int64_t first = 0; first < job->n_blocks; first += DG_ROUND_BLOCKS) {
        const int64_t left = job->n_blocks - first;
        soft_round round = {job, first, left < DG_ROUND_BLOCKS ? (int32_t)left : DG_ROUND_BLOCKS, is_narrow(backend)};
        dg_pool_run(backend->pool, n_panels(&round), make_logits, &round);
        dg_pool_run(backend->pool, job->n, decide, &round);
        dg_pool_run(backend->pool, round.n_blocks + n_panels(&round), weigh_and_spread, &round);
        dg_pool_run(backend->pool, (padded_embd(backend) + width - 1) / width, add_columns, &round);
    }
}
