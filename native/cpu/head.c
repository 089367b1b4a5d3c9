/* The head: logits, their statistics and the draw, and the soft embedding, in vocabulary blocks of DG_VOCABULARY_BLOCK
 * tokens.
 *
 * The draw picks a vocabulary block by the blocks' shares of the denominator, then looks again only into that block; a
 * logit computed twice is the same to the last bit.
 *
 * The soft embedding is summed in the same pass: soft_embedding.c, or where products are tiles head_span. */
#include "cpu/head.h"

#include <math.h>
#include <string.h>

#include "quant/quant.h"

static int32_t n_vocab_of(const dg_head_job *job) { return job->backend->model->n_vocab; }
static int64_t vocabulary_blocks(const dg_model *model) {
    return (model->n_vocab + DG_VOCABULARY_BLOCK - 1) / DG_VOCABULARY_BLOCK;
}

static dg_rows pack_head(dg_backend *backend, const float *x, int32_t n) {
    const dg_model *model = backend->model;
    dg_collect_rows(backend, &model->token_embd, x, n, model->output_norm);
    return dg_pack_normed(backend, dg_form_of(backend->kernels, &model->token_embd), x, n, model->n_embd,
                          model->output_norm, 1.0f);
}

/* Some of the rows: those of n_tiles row tiles. */
typedef struct row_range {
    dg_rows rows;
    int32_t first, n;
} row_range;

static row_range rows_in_tiles(const dg_head_job *job, int32_t first_tile, int32_t n_tiles) {
    const dg_rows *all = &job->rows;
    row_range range = {*all, first_tile * all->per_tile, n_tiles * all->per_tile};
    const int64_t places = (int64_t)first_tile * job->backend->kernels->tile_rows;
    if (range.n > all->n - range.first) range.n = all->n - range.first;
    range.rows.n = range.n;
    range.rows.n_tiles = n_tiles;
    if (all->form.weight_tiles) {
        range.rows.pairs += places * all->n_cols;
        return range;
    }
    if (!all->form.integer) {
        range.rows.values += places * all->n_cols;
        return range;
    }
    range.rows.codes += places * all->n_cols * dg_code_bytes(all->form);
    range.rows.scales += places * (all->n_cols / DG_BLOCK);
    range.rows.bias += places * (all->n_cols / all->form.group);
    range.rows.sums += places * (all->n_cols / all->form.group);
    return range;
}

/* Where a row's sums are: with spans each row tile has all its places. */
static int64_t place_of(const dg_head_job *job, int64_t row) {
    if (!job->by_spans) return row;
    return row / job->rows.per_tile * job->backend->kernels->tile_rows + row % job->rows.per_tile;
}

/* ---- One vocabulary block ----------------------------------------------------------------------------------- */

static int64_t padded_embd(const dg_backend *backend) {
    const int64_t lanes = backend->kernels->lanes;
    return (backend->model->n_embd + lanes - 1) / lanes * lanes;
}

void dg_panel_logits(const dg_head_job *job, dg_thread *thread, const dg_rows *rows, int64_t first, int32_t n_tokens,
                     int64_t next, float *out, int64_t out_stride) {
    const dg_cpu_kernels *kernels = job->backend->kernels;
    const dg_weight *table = &job->backend->model->token_embd;
    dg_panel *panel = &thread->panel;
    panel->form = dg_form_of(kernels, table);
    const int64_t strip = dg_strip_cols(kernels, panel->form, table->n_cols);
    for (panel->first_col = 0; panel->first_col < table->n_cols; panel->first_col += strip) {
        panel->n_cols = table->n_cols - panel->first_col < strip ? table->n_cols - panel->first_col : strip;
        kernels->decode(table, 0, first, n_tokens, panel);
        dg_prefetch(panel, &(dg_features){table, 0, next}, kernels->lanes);
        kernels->multiply(panel, rows, thread->sums, out, out_stride, n_tokens);
    }
    panel->prefetch = NULL;
}

/* thread->logits (range->n, DG_VOCABULARY_BLOCK) = z */
static void block_logits(const dg_head_job *job, dg_thread *thread, const row_range *range, int64_t block) {
    const dg_backend *backend = job->backend;
    const int32_t n_tokens = dg_tokens_of_block(job, block), lanes = backend->kernels->lanes;
    for (int32_t i = 0; i < n_tokens && job->z == NULL; i += lanes) {
        const int64_t first = block * DG_VOCABULARY_BLOCK + i;
        dg_panel_logits(job, thread, &range->rows, first, n_tokens - i < lanes ? n_tokens - i : lanes, first + lanes,
                        thread->logits + i, DG_VOCABULARY_BLOCK);
    }
    for (int32_t r = 0; r < range->n; r++) {
        float *z = thread->logits + r * DG_VOCABULARY_BLOCK;
        if (job->z == NULL)
            backend->kernels->softcap(z, n_tokens, backend->model->logit_softcap, job->temperature);
        else
            memcpy(z, job->z + (int64_t)(range->first + r) * n_vocab_of(job) + block * DG_VOCABULARY_BLOCK,
                   (size_t)n_tokens * sizeof *z);
    }
}

static void do_block(const dg_head_job *job, dg_thread *thread, const row_range *range, int64_t block) {
    dg_backend *backend = job->backend;
    const int32_t n_tokens = dg_tokens_of_block(job, block);
    block_logits(job, thread, range, block);
    dg_block_statistics *statistics = backend->block_statistics + range->first * job->n_blocks + block;
    for (int32_t r = 0; r < range->n; r++) {
        const float *z = thread->logits + r * DG_VOCABULARY_BLOCK;
        if (job->statistics)
            backend->kernels->head_statistics(z, n_tokens, (int32_t)block * DG_VOCABULARY_BLOCK,
                                              &statistics[r * job->n_blocks]);
        if (job->logits != NULL)
            memcpy(job->logits + (int64_t)(range->first + r) * n_vocab_of(job) + block * DG_VOCABULARY_BLOCK, z,
                   (size_t)n_tokens * sizeof *z);
    }
}

/* The blocks from first_block on, as many as make a span. */
static void do_span(const dg_head_job *job, dg_thread *thread, const row_range *range, int64_t first_block) {
    dg_backend *backend = job->backend;
    const dg_model *model = backend->model;
    const int64_t first = first_block * DG_VOCABULARY_BLOCK, left = model->n_vocab - first;
    const dg_head_span span = {.table = &model->token_embd,
                               .first = first,
                               .n_tokens = left < DG_VOCABULARY_SPAN ? (int32_t)left : DG_VOCABULARY_SPAN,
                               .rows = &range->rows,
                               .z = job->z != NULL ? job->z + range->first * (int64_t)model->n_vocab : NULL,
                               .z_stride = model->n_vocab,
                               .softcap = model->logit_softcap,
                               .temperature = job->temperature,
                               .statistics = backend->block_statistics + range->first * job->n_blocks + first_block,
                               .statistics_stride = job->n_blocks,
                               .softmax = job->soft != NULL ? backend->online_softmax + range->first : NULL,
                               .negligible = (double)backend->params.soft_embedding_bound / (double)job->n_blocks,
                               .sums = backend->soft_sums + place_of(job, range->first) * backend->kernels->lanes,
                               .n_sums = job->n_sums,
                               .scratch = thread->tile_scratch};
    backend->kernels->head_span(&span);
}

static int64_t blocks_at_once(const dg_head_job *job) {
    return job->by_spans ? DG_VOCABULARY_SPAN / DG_VOCABULARY_BLOCK : 1;
}

static void do_blocks(const dg_head_job *job, dg_thread *thread, const row_range *range, int64_t first_block) {
    if (job->by_spans)
        do_span(job, thread, range, first_block);
    else
        do_block(job, thread, range, first_block);
}

/* ---- The whole vocabulary ------------------------------------------------------------------------------------ */

static void do_blocks_for_all_rows(void *context, int64_t item, int thread) {
    const dg_head_job *job = context;
    const row_range all = rows_in_tiles(job, 0, job->rows.n_tiles);
    do_blocks(job, &job->backend->threads[thread], &all, item * blocks_at_once(job));
}

/* With spans rows are shared out, not tokens: then each row's sums are added up in the order of tokens whatever the
 * number of threads, and decoding the table once for each thread costs little beside its use for all of a thread's
 * rows.
 */
static void do_all_spans_for_some_rows(void *context, int64_t group, int thread) {
    const dg_head_job *job = context;
    const int64_t n = job->rows.n_tiles;
    const int32_t first = (int32_t)(n * group / job->n_groups), end = (int32_t)(n * (group + 1) / job->n_groups);
    const row_range some = rows_in_tiles(job, first, end - first);
    for (int64_t block = 0; block < job->n_blocks; block += blocks_at_once(job))
        do_span(job, &job->backend->threads[thread], &some, block);
}

static void finish_soft(void *context, int64_t row, int thread) {
    const dg_head_job *job = context;
    const dg_backend *backend = job->backend;
    const int64_t n_embd = backend->model->n_embd, lanes = backend->kernels->lanes;
    const float factor = (float)(sqrt((double)n_embd) / backend->online_softmax[row].denominator);
    for (int64_t c = 0; c < n_embd; c += lanes)
        backend->kernels->scale(backend->soft_sums + c * job->n_sums + place_of(job, row) * lanes, factor,
                                n_embd - c < lanes ? n_embd - c : lanes, job->soft + row * n_embd + c);
}

static void run_head(dg_head_job *job) {
    dg_backend *backend = job->backend;
    job->n_blocks = vocabulary_blocks(backend->model);
    job->by_spans = dg_form_of(backend->kernels, &backend->model->token_embd).weight_tiles && job->logits == NULL;
    job->n_sums = job->by_spans ? (int64_t)job->rows.n_tiles * backend->kernels->tile_rows : job->n;
    if (job->soft == NULL) {
        const int64_t at_once = blocks_at_once(job);
        dg_pool_run(backend->pool, (job->n_blocks + at_once - 1) / at_once, do_blocks_for_all_rows, job);
        return;
    }
    memset(backend->soft_sums, 0, (size_t)(job->n_sums * padded_embd(backend)) * sizeof(float));
    for (int32_t r = 0; r < job->n; r++) backend->online_softmax[r] = (dg_online_softmax){.max = -INFINITY};
    job->statistics = true;
    if (job->by_spans) {
        job->n_groups = dg_pool_size(backend->pool);
        if (job->n_groups > job->rows.n_tiles) job->n_groups = job->rows.n_tiles;
        dg_pool_run(backend->pool, job->n_groups, do_all_spans_for_some_rows, job);
    } else {
        dg_sum_soft_embeddings(job);
    }
    dg_pool_run(backend->pool, job->n, finish_soft, job);
}

/* ---- The draw ------------------------------------------------------------------------------------------------ */

/* The first token of vocabulary block `block` at which the running sum of exp(z − max), which enters it at `before`,
 * exceeds `wanted`; the last with a positive share where rounding lets none. */
static int32_t draw_in_block(const dg_head_job *job, dg_thread *thread, int32_t row, int64_t block, float max,
                             double before, double wanted) {
    const row_range range = rows_in_tiles(job, row / job->rows.per_tile, 1);
    const int32_t n_tokens = dg_tokens_of_block(job, block), first = (int32_t)block * DG_VOCABULARY_BLOCK;
    block_logits(job, thread, &range, block);
    float e[DG_VOCABULARY_BLOCK];
    job->backend->kernels->exponentials(thread->logits + (row - range.first) * DG_VOCABULARY_BLOCK, n_tokens, max, e);
    int32_t last = 0;
    for (int32_t i = 0; i < n_tokens; i++) {
        before += (double)e[i];
        if (e[i] > 0) last = i;
        if (before > wanted) return first + i;
    }
    return first + last;
}

/* Brings a row's blocks together, in the order of tokens. */
static void finish_row(void *context, int64_t row, int thread) {
    const dg_head_job *job = context;
    const dg_block_statistics *blocks = job->backend->block_statistics + row * job->n_blocks;
    float max = blocks[0].max;
    double sum = 0, weighted = 0;
    job->argmax[row] = blocks[0].argmax;
    for (int64_t t = 1; t < job->n_blocks; t++)
        if (blocks[t].max > max) {
            max = blocks[t].max;
            job->argmax[row] = blocks[t].argmax;
        }
    for (int64_t t = 0; t < job->n_blocks; t++) {
        double below = (double)blocks[t].max - (double)max, shrink = exp(below);
        sum += shrink * (double)blocks[t].sum;
        weighted += shrink * ((double)blocks[t].weighted + below * (double)blocks[t].sum);
    }
    job->entropies[row] = (float)fmax(log(sum) - weighted / sum, 0.0);

    double wanted = (double)job->uniforms[row] * sum, before = 0;
    int64_t chosen = 0;
    for (int64_t t = 0; t < job->n_blocks; t++) {
        double share = exp((double)blocks[t].max - (double)max) * (double)blocks[t].sum;
        if (share > 0) chosen = t;
        if (before + share > wanted) break;
        before += share;
    }
    job->candidates[row] =
        draw_in_block(job, &job->backend->threads[thread], (int32_t)row, chosen, max, before, wanted);
}

/* ---- The operations ------------------------------------------------------------------------------------------ */

/* Scratch of the head is for canvas_length rows: more are done in turns. */
static int32_t rows_in_turn(const dg_backend *backend, int32_t n, int32_t first) {
    const int32_t most = backend->model->canvas_length;
    return n - first < most ? n - first : most;
}

void dg_cpu_logits(dg_backend *backend, const float *x, int32_t n, float *host_logits) {
    const dg_model *model = backend->model;
    for (int32_t first = 0, turn; first < n; first += turn) {
        turn = rows_in_turn(backend, n, first);
        dg_head_job job = {.backend = backend,
                           .rows = pack_head(backend, x + (int64_t)first * model->n_embd, turn),
                           .n = turn,
                           .temperature = 1.0f,
                           .logits = host_logits + (int64_t)first * model->n_vocab};
        run_head(&job);
    }
}

void dg_cpu_soft_embedding(dg_backend *backend, const float *host_z, int32_t n, float *soft) {
    const dg_model *model = backend->model;
    for (int32_t first = 0, turn; first < n; first += turn) {
        turn = rows_in_turn(backend, n, first);
        dg_head_job job = {.backend = backend,
                           .rows = dg_rows_in(backend->kernels, backend->packed, (dg_form){.integer = false}, turn,
                                              model->n_embd, 0, dg_rows_n_tiles(backend->kernels, turn)),
                           .n = turn,
                           .z = host_z + (int64_t)first * model->n_vocab,
                           .soft = soft + (int64_t)first * model->n_embd};
        run_head(&job);
    }
}

void dg_cpu_sample(dg_backend *backend, const float *x, int32_t n, float temperature, const float *uniforms,
                   const dg_head_result *result, float *soft) {
    const int64_t n_embd = backend->model->n_embd;
    for (int32_t first = 0, turn; first < n; first += turn) {
        turn = rows_in_turn(backend, n, first);
        dg_head_job job = {.backend = backend,
                           .rows = pack_head(backend, x + first * n_embd, turn),
                           .n = turn,
                           .temperature = temperature,
                           .statistics = true,
                           .uniforms = uniforms + first,
                           .argmax = result->argmax + first,
                           .candidates = result->candidates + first,
                           .entropies = result->entropies + first,
                           .soft = soft != NULL ? soft + first * n_embd : NULL};
        run_head(&job);
        dg_pool_run(backend->pool, turn, finish_row, &job);
    }
}

void dg_cpu_begin_canvas(dg_backend *backend, dg_canvas *host_canvas) { backend->canvas = host_canvas; }

void dg_cpu_denoise(dg_backend *backend, const float *x, float *soft) {
    dg_canvas *canvas = backend->canvas;
    const dg_head_result result = {backend->argmax, backend->candidates, canvas->entropies};
    const int32_t n = canvas->rules.n;
    for (int32_t i = 0; i < n; i++)
        backend->uniforms[i] = dg_candidate_uniform(&canvas->rules, canvas->progress.step + 1, i);
    dg_cpu_sample(backend, x, n, canvas->progress.next_temperature, backend->uniforms, &result, soft);
    dg_canvas_settle(canvas, backend->argmax, backend->candidates, backend->order);
}
