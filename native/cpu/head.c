/* The head: logits, their statistics and the draw, and the soft embedding, in tiles of DG_HEAD_TOKENS tokens.
 *
 * The draw picks a tile by the tiles' shares of the normaliser, then looks again only into that tile; a logit computed
 * twice is the same to the last bit.
 *
 * The soft embedding is summed in the same pass, with the embedding table as values of an attention whose keys it was a
 * moment ago. A tile is left out for a row to which it would add less than its part of the mass that may be dropped: as
 * a canvas settles, that is nearly all of them. */
#include "cpu/cpu.h"

#include <math.h>
#include <string.h>

#include "quant/quant.h"

typedef struct head_job {
    dg_backend *backend;
    dg_rows rows; /* rms(x, output_norm); without rows where z is given */
    int32_t n;
    float temperature;
    int64_t n_tiles;       /* of the vocabulary */
    const float *uniforms; /* (n) */
    const float *z;        /* (n, n_vocab) logits made elsewhere, or NULL */
    int32_t *argmax, *candidates;
    float *entropies;
    float *logits;    /* (n, n_vocab), or NULL: not wanted */
    float *soft;      /* (n, n_embd), or NULL: not wanted */
    bool statistics;  /* wanted */
    int32_t n_groups; /* of rows, when rows are shared out */
    bool by_spans;    /* rather than by tiles */
    int64_t n_sums;   /* places of rows in the sums of the soft embedding */
} head_job;

static int32_t n_vocab_of(const head_job *job) { return job->backend->model->n_vocab; }
static int64_t head_tiles(const dg_model *model) { return (model->n_vocab + DG_HEAD_TOKENS - 1) / DG_HEAD_TOKENS; }

static int32_t tokens_of(const head_job *job, int64_t tile) {
    int64_t left = n_vocab_of(job) - tile * DG_HEAD_TOKENS;
    return left < DG_HEAD_TOKENS ? (int32_t)left : DG_HEAD_TOKENS;
}

static dg_rows pack_head(dg_backend *backend, const float *x, int32_t n) {
    const dg_model *model = backend->model;
    dg_collect_rows(backend, &model->token_embd, x, n, model->output_norm);
    return dg_pack_normed(backend, dg_form_of(backend->kernels, &model->token_embd), x, n, model->n_embd,
                          model->output_norm, 1.0f);
}

/* Some of the rows: those of n_tiles tiles of packed rows. */
typedef struct row_range {
    dg_rows rows;
    int32_t first, n;
} row_range;

static row_range rows_in_tiles(const head_job *job, int32_t first_tile, int32_t n_tiles) {
    const dg_rows *all = &job->rows;
    row_range range = {*all, first_tile * all->per_tile, n_tiles * all->per_tile};
    const int64_t places = (int64_t)first_tile * job->backend->kernels->tile_rows;
    if (range.n > all->n - range.first) range.n = all->n - range.first;
    range.rows.n = range.n;
    range.rows.n_tiles = n_tiles;
    if (all->form.tiles) {
        range.rows.pairs += places * all->n_cols;
        return range;
    }
    if (!all->form.integer) {
        range.rows.values += places * all->n_cols;
        return range;
    }
    range.rows.codes += places * all->n_cols;
    range.rows.scales += places * (all->n_cols / DG_BLOCK);
    range.rows.bias += places * (all->n_cols / all->form.group);
    range.rows.sums += places * (all->n_cols / all->form.group);
    return range;
}

/* Where a row's sums are: with spans each tile of rows has all its places. */
static int64_t place_of(const head_job *job, int64_t row) {
    if (!job->by_spans) return row;
    return row / job->rows.per_tile * job->backend->kernels->tile_rows + row % job->rows.per_tile;
}

/* ---- One tile of the vocabulary ------------------------------------------------------------------------------ */

/* Rounding to 13 bits is well below what a quantised table has lost already; float tables are left as they are. */
static bool is_narrow(const dg_backend *backend) {
    return backend->kernels->has_narrow && dg_form_of(backend->kernels, &backend->model->token_embd).integer;
}

static int64_t padded_embd(const dg_backend *backend) {
    const int64_t lanes = backend->kernels->lanes;
    return (backend->model->n_embd + lanes - 1) / lanes * lanes;
}

/* thread->logits (range->n, DG_HEAD_TOKENS) = z, and where a soft embedding is wanted thread->values. */
static void tile_logits(const head_job *job, dg_thread *thread, const row_range *range, int64_t tile) {
    const dg_backend *backend = job->backend;
    const dg_cpu_kernels *kernels = backend->kernels;
    const dg_weight *table = &backend->model->token_embd;
    const int64_t n_padded = padded_embd(backend);
    const int32_t n_tokens = tokens_of(job, tile);
    const bool narrow = is_narrow(backend);
    dg_panel *panel = &thread->panel;
    panel->form = dg_form_of(kernels, table);
    const int64_t strip = dg_strip_cols(kernels, panel->form, table->n_cols);
    for (int32_t i = 0; i < n_tokens; i += kernels->lanes) {
        const int32_t n_lanes = n_tokens - i < kernels->lanes ? n_tokens - i : kernels->lanes;
        const int64_t first = tile * DG_HEAD_TOKENS + i;
        for (panel->first_col = 0; panel->first_col < table->n_cols; panel->first_col += strip) {
            panel->n_cols = table->n_cols - panel->first_col < strip ? table->n_cols - panel->first_col : strip;
            kernels->decode(table, 0, first, n_lanes, panel);
            if (job->z == NULL) {
                dg_announce(panel, &(dg_features){table, 0, first + kernels->lanes}, kernels->lanes);
                kernels->multiply(panel, &range->rows, thread->sums, thread->logits + i, DG_HEAD_TOKENS, n_lanes);
            }
            if (job->soft != NULL)
                kernels->spread(panel, n_lanes, narrow, n_padded, DG_HEAD_TOKENS,
                                (float *)thread->values + (narrow ? i / 2 : i) * kernels->lanes,
                                thread->value_scales + i / kernels->lanes);
        }
    }
    panel->next = NULL;
    for (int32_t r = 0; r < range->n; r++) {
        float *z = thread->logits + r * DG_HEAD_TOKENS;
        if (job->z == NULL)
            kernels->softcap(z, n_tokens, backend->model->logit_softcap, job->temperature);
        else
            memcpy(z, job->z + (int64_t)(range->first + r) * n_vocab_of(job) + tile * DG_HEAD_TOKENS,
                   (size_t)n_tokens * sizeof *z);
    }
}

/* Adds a tile to the soft embeddings of the rows to which it matters. */
static void add_tile(const head_job *job, dg_thread *thread, const row_range *range, int64_t tile,
                     const dg_head_tile *statistics, int64_t statistics_stride) {
    const dg_backend *backend = job->backend;
    const dg_cpu_kernels *kernels = backend->kernels;
    const int32_t n_tokens = tokens_of(job, tile), n_even = n_tokens + n_tokens % 2;
    const bool narrow = is_narrow(backend);
    const double negligible = (double)backend->params.soft_embedding_bound / (double)job->n_tiles;
    dg_soft_tile s = {.narrow = narrow,
                      .n_tokens = n_even,
                      .rows = thread->rows,
                      .factors = thread->factors,
                      .weights = thread->weights,
                      .weight_scales = thread->weight_scales,
                      .values = thread->values,
                      .value_scales = thread->value_scales,
                      .values_stride = DG_HEAD_TOKENS,
                      .n_cols = padded_embd(backend),
                      .n_sums = job->n_sums,
                      .sums = backend->soft_sums};
    for (int32_t r = 0; r < range->n; r++) {
        const dg_head_tile *t = &statistics[r * statistics_stride];
        dg_running *running = &backend->running[range->first + r];
        const float max = t->max > running->max ? t->max : running->max;
        const double factor = exp((double)running->max - (double)max);
        const double mass = exp((double)t->max - (double)max) * (double)t->sum;
        running->max = max;
        running->sum = running->sum * factor + mass;
        /* the sum can only grow: what is negligible now stays so */
        if (factor == 1.0 && mass <= negligible * running->sum) continue;
        float e[DG_HEAD_TOKENS];
        kernels->exponentials(thread->logits + r * DG_HEAD_TOKENS, n_tokens, max, e);
        if (n_even > n_tokens) e[n_tokens] = 0;
        thread->rows[s.n_rows] = range->first + r;
        thread->factors[s.n_rows] = (float)factor;
        thread->weight_scales[s.n_rows] = kernels->pack_weights(e, n_even, narrow, s.n_rows, thread->weights);
        s.n_rows++;
    }
    kernels->add_weighted(&s);
}

static void do_tile(const head_job *job, dg_thread *thread, const row_range *range, int64_t tile) {
    dg_backend *backend = job->backend;
    const int32_t n_tokens = tokens_of(job, tile);
    tile_logits(job, thread, range, tile);
    dg_head_tile *statistics = backend->head_tiles + range->first * job->n_tiles + tile;
    for (int32_t r = 0; r < range->n; r++) {
        const float *z = thread->logits + r * DG_HEAD_TOKENS;
        if (job->statistics)
            backend->kernels->head_statistics(z, n_tokens, (int32_t)tile * DG_HEAD_TOKENS,
                                              &statistics[r * job->n_tiles]);
        if (job->logits != NULL)
            memcpy(job->logits + (int64_t)(range->first + r) * n_vocab_of(job) + tile * DG_HEAD_TOKENS, z,
                   (size_t)n_tokens * sizeof *z);
    }
    if (job->soft != NULL) add_tile(job, thread, range, tile, statistics, job->n_tiles);
}

/* The tiles from first_tile on, as many as make a span. */
static void do_span(const head_job *job, dg_thread *thread, const row_range *range, int64_t first_tile) {
    dg_backend *backend = job->backend;
    const dg_model *model = backend->model;
    const int64_t first = first_tile * DG_HEAD_TOKENS, left = model->n_vocab - first;
    const dg_head_span span = {.table = &model->token_embd,
                               .first = first,
                               .n_tokens = left < DG_HEAD_SPAN ? (int32_t)left : DG_HEAD_SPAN,
                               .rows = &range->rows,
                               .z = job->z != NULL ? job->z + range->first * (int64_t)model->n_vocab : NULL,
                               .z_stride = model->n_vocab,
                               .softcap = model->logit_softcap,
                               .temperature = job->temperature,
                               .statistics = backend->head_tiles + range->first * job->n_tiles + first_tile,
                               .statistics_stride = job->n_tiles,
                               .running = job->soft != NULL ? backend->running + range->first : NULL,
                               .negligible = (double)backend->params.soft_embedding_bound / (double)job->n_tiles,
                               .sums = backend->soft_sums + place_of(job, range->first) * backend->kernels->lanes,
                               .n_sums = job->n_sums,
                               .scratch = thread->tiles};
    backend->kernels->head_span(&span);
}

static int64_t tiles_at_once(const head_job *job) { return job->by_spans ? DG_HEAD_SPAN / DG_HEAD_TOKENS : 1; }

static void do_tiles(const head_job *job, dg_thread *thread, const row_range *range, int64_t first_tile) {
    if (job->by_spans)
        do_span(job, thread, range, first_tile);
    else
        do_tile(job, thread, range, first_tile);
}

/* ---- The whole vocabulary ------------------------------------------------------------------------------------ */

static void do_tiles_for_all_rows(void *context, int64_t item, int thread) {
    const head_job *job = context;
    const row_range all = rows_in_tiles(job, 0, job->rows.n_tiles);
    do_tiles(job, &job->backend->threads[thread], &all, item * tiles_at_once(job));
}

/* Rows are shared out, not tokens: then each row's sums are added up in the order of tokens whatever the number of
 * threads, and decoding the table once for each thread costs little beside its use for all of a thread's rows. */
static void do_all_tiles_for_some_rows(void *context, int64_t group, int thread) {
    const head_job *job = context;
    const int64_t n = job->rows.n_tiles;
    const int32_t first = (int32_t)(n * group / job->n_groups), end = (int32_t)(n * (group + 1) / job->n_groups);
    const row_range some = rows_in_tiles(job, first, end - first);
    for (int64_t tile = 0; tile < job->n_tiles; tile += tiles_at_once(job))
        do_tiles(job, &job->backend->threads[thread], &some, tile);
}

static void finish_soft(void *context, int64_t row, int thread) {
    const head_job *job = context;
    const dg_backend *backend = job->backend;
    const int64_t n_embd = backend->model->n_embd, lanes = backend->kernels->lanes;
    const float factor = (float)(sqrt((double)n_embd) / backend->running[row].sum);
    for (int64_t c = 0; c < n_embd; c += lanes)
        backend->kernels->scale(backend->soft_sums + c * job->n_sums + place_of(job, row) * lanes, factor,
                                n_embd - c < lanes ? n_embd - c : lanes, job->soft + row * n_embd + c);
}

static void run_head(head_job *job) {
    dg_backend *backend = job->backend;
    job->n_tiles = head_tiles(backend->model);
    job->by_spans = dg_form_of(backend->kernels, &backend->model->token_embd).tiles && job->logits == NULL;
    job->n_sums = job->by_spans ? (int64_t)job->rows.n_tiles * backend->kernels->tile_rows : job->n;
    if (job->soft == NULL) {
        const int64_t at_once = tiles_at_once(job);
        dg_pool_run(backend->pool, (job->n_tiles + at_once - 1) / at_once, do_tiles_for_all_rows, job);
        return;
    }
    memset(backend->soft_sums, 0, (size_t)(job->n_sums * padded_embd(backend)) * sizeof(float));
    for (int32_t r = 0; r < job->n; r++) backend->running[r] = (dg_running){.max = -INFINITY};
    job->statistics = true;
    job->n_groups = dg_pool_size(backend->pool);
    if (job->n_groups > job->rows.n_tiles) job->n_groups = job->rows.n_tiles;
    dg_pool_run(backend->pool, job->n_groups, do_all_tiles_for_some_rows, job);
    dg_pool_run(backend->pool, job->n, finish_soft, job);
}

/* ---- The draw ------------------------------------------------------------------------------------------------ */

/* The first token of tile `tile` at which the running sum of exp(z − max), which enters it at `before`, exceeds
 * `wanted`; the last with a positive share where rounding lets none. */
static int32_t draw_in_tile(const head_job *job, dg_thread *thread, int32_t row, int64_t tile, float max, double before,
                            double wanted) {
    const row_range range = rows_in_tiles(job, row / job->rows.per_tile, 1);
    const int32_t n_tokens = tokens_of(job, tile), first = (int32_t)tile * DG_HEAD_TOKENS;
    head_job logits_only = *job;
    logits_only.soft = NULL;
    tile_logits(&logits_only, thread, &range, tile);
    float e[DG_HEAD_TOKENS];
    job->backend->kernels->exponentials(thread->logits + (row - range.first) * DG_HEAD_TOKENS, n_tokens, max, e);
    int32_t last = 0;
    for (int32_t i = 0; i < n_tokens; i++) {
        before += (double)e[i];
        if (e[i] > 0) last = i;
        if (before > wanted) return first + i;
    }
    return first + last;
}

/* Brings a row's tiles together, in the order of tokens. */
static void finish_row(void *context, int64_t row, int thread) {
    const head_job *job = context;
    const dg_head_tile *tiles = job->backend->head_tiles + row * job->n_tiles;
    float max = tiles[0].max;
    double sum = 0, weighted = 0;
    job->argmax[row] = tiles[0].argmax;
    for (int64_t t = 1; t < job->n_tiles; t++)
        if (tiles[t].max > max) {
            max = tiles[t].max;
            job->argmax[row] = tiles[t].argmax;
        }
    for (int64_t t = 0; t < job->n_tiles; t++) {
        double below = (double)tiles[t].max - (double)max, shrink = exp(below);
        sum += shrink * (double)tiles[t].sum;
        weighted += shrink * ((double)tiles[t].weighted + below * (double)tiles[t].sum);
    }
    job->entropies[row] = (float)fmax(log(sum) - weighted / sum, 0.0);

    double wanted = (double)job->uniforms[row] * sum, before = 0;
    int64_t chosen = 0;
    for (int64_t t = 0; t < job->n_tiles; t++) {
        double share = exp((double)tiles[t].max - (double)max) * (double)tiles[t].sum;
        if (share > 0) chosen = t;
        if (before + share > wanted) break;
        before += share;
    }
    job->candidates[row] = draw_in_tile(job, &job->backend->threads[thread], (int32_t)row, chosen, max, before, wanted);
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
        head_job job = {.backend = backend,
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
        head_job job = {.backend = backend,
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
        head_job job = {.backend = backend,
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
