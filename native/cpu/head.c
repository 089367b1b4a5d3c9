/* The head: logits, their statistics and the draw, and the soft embedding, in tiles over the vocabulary.
 *
 * Statistics are kept for each DG_HEAD_TOKENS tokens. The draw picks a tile by the tiles' shares of the normaliser,
 * then looks again only into that tile; a logit computed twice is the same to the last bit. */
#include "cpu/cpu.h"

#include <math.h>
#include <string.h>

#include "quant/quant.h"

typedef struct head_job {
    dg_backend *backend;
    dg_rows rows;          /* rms(x, output_norm) */
    int32_t n;
    float temperature;
    int64_t n_tiles;       /* of DG_HEAD_TOKENS */
    const float *uniforms; /* (n) */
    const float *z;        /* (n, n_vocab) logits made elsewhere, or NULL: from `rows` */
    int32_t *argmax, *candidates;
    float *entropies;
    float *out;            /* logits (n, n_vocab), or the soft embedding (n, n_embd) */
} head_job;

static int32_t n_vocab_of(const head_job *job) { return job->backend->model->n_vocab; }

static dg_rows pack_head(dg_backend *backend, const float *x, int32_t n) {
    const dg_model *model = backend->model;
    return dg_pack_normed(backend, dg_form_of(backend->kernels, &model->token_embd), x, n, model->n_embd,
                          model->output_norm, 1.0f);
}

static int32_t tokens_from(const head_job *job, int32_t first, int32_t wanted) {
    int32_t left = n_vocab_of(job) - first;
    return left < wanted ? left : wanted;
}

/* z (rows->n, n_tokens; stride out_stride) of tokens first … */
static void tile_logits(const head_job *job, dg_thread *thread, const dg_rows *rows, int32_t first, int32_t n_tokens,
                        float *z, int64_t z_stride) {
    const dg_backend *backend = job->backend;
    const dg_model *model = backend->model;
    dg_multiply_features(backend->kernels, &thread->panel, &model->token_embd, 0, first, n_tokens, rows, z, z_stride);
    for (int32_t r = 0; r < rows->n; r++)
        backend->kernels->softcap(z + r * z_stride, n_tokens, model->logit_softcap, job->temperature);
}

/* ---- Logits -------------------------------------------------------------------------------------------------- */

static void write_logits(void *context, int64_t tile, int thread) {
    const head_job *job = context;
    int32_t first = (int32_t)tile * DG_HEAD_TOKENS;
    tile_logits(job, &job->backend->threads[thread], &job->rows, first, tokens_from(job, first, DG_HEAD_TOKENS),
                job->out + first, n_vocab_of(job));
}

static int64_t head_tiles(const dg_model *model) { return (model->n_vocab + DG_HEAD_TOKENS - 1) / DG_HEAD_TOKENS; }

void dg_cpu_logits(dg_backend *backend, const float *x, int32_t n, float *host_logits) {
    head_job job = {
        .backend = backend, .rows = pack_head(backend, x, n), .n = n, .temperature = 1.0f, .out = host_logits};
    dg_pool_run(backend->pool, head_tiles(backend->model), write_logits, &job);
}

/* ---- Statistics and the draw --------------------------------------------------------------------------------- */

static void gather_statistics(void *context, int64_t tile, int thread) {
    const head_job *job = context;
    const dg_backend *backend = job->backend;
    float *z = backend->threads[thread].logits;
    int32_t first = (int32_t)tile * DG_HEAD_TOKENS, n_tokens = tokens_from(job, first, DG_HEAD_TOKENS);
    tile_logits(job, &backend->threads[thread], &job->rows, first, n_tokens, z, DG_HEAD_TOKENS);
    for (int32_t r = 0; r < job->n; r++)
        backend->kernels->head_statistics(z + r * DG_HEAD_TOKENS, n_tokens, first,
                                          &backend->head_tiles[r * job->n_tiles + tile]);
}

/* The packed rows that stand in the same tile as row r, and r's place among them. */
static dg_rows tile_of_row(const head_job *job, int32_t r, int32_t *place) {
    const dg_rows *all = &job->rows;
    const int64_t tile = r / all->per_tile, places = tile * job->backend->kernels->tile_rows;
    dg_rows one = *all;
    *place = r % all->per_tile;
    one.n = all->n - (int32_t)tile * all->per_tile;
    if (one.n > all->per_tile) one.n = all->per_tile;
    one.n_tiles = 1;
    if (!all->form.integer) {
        one.values += places * all->n_cols;
        return one;
    }
    one.codes += places * all->n_cols;
    one.scales += places * (all->n_cols / DG_BLOCK);
    one.bias += places * (all->n_cols / all->form.group);
    one.sums += places * (all->n_cols / all->form.group);
    return one;
}

/* The first token of tile `tile` at which the running sum of exp(z − max), which enters it at `before`, exceeds
 * `wanted`; the last with a positive share where rounding lets none. */
static int32_t draw_in_tile(const head_job *job, dg_thread *thread, int32_t r, int64_t tile, double max, double before,
                            double wanted) {
    const dg_cpu_kernels *kernels = job->backend->kernels;
    int32_t place, first = (int32_t)tile * DG_HEAD_TOKENS, n_tokens = tokens_from(job, first, DG_HEAD_TOKENS);
    dg_rows rows = tile_of_row(job, r, &place);
    float *z = thread->logits, e[DG_HEAD_TOKENS];
    tile_logits(job, thread, &rows, first, n_tokens, z, DG_HEAD_TOKENS);
    kernels->exponentials(z + place * DG_HEAD_TOKENS, n_tokens, (float)max, e);
    int32_t last = 0;
    for (int32_t i = 0; i < n_tokens; i++) {
        before += (double)e[i];
        if (e[i] > 0) last = i;
        if (before > wanted) return first + i;
    }
    return first + last;
}

/* Brings a row's tiles together, in the order of tokens. */
static void finish_row(void *context, int64_t item, int thread) {
    const head_job *job = context;
    dg_backend *backend = job->backend;
    const dg_head_tile *tiles = backend->head_tiles + item * job->n_tiles;
    double max = -INFINITY, sum = 0, weighted = 0;
    for (int64_t t = 0; t < job->n_tiles; t++)
        if ((double)tiles[t].max > max) {
            max = (double)tiles[t].max;
            job->argmax[item] = tiles[t].argmax;
        }
    for (int64_t t = 0; t < job->n_tiles; t++) {
        double below = (double)tiles[t].max - max, shrink = exp(below);
        sum += shrink * (double)tiles[t].sum;
        weighted += shrink * ((double)tiles[t].weighted + below * (double)tiles[t].sum);
    }
    job->entropies[item] = (float)fmax(log(sum) - weighted / sum, 0.0);
    backend->soft_max[item] = (float)max;
    backend->soft_sum[item] = (float)sum;

    double wanted = (double)job->uniforms[item] * sum, before = 0;
    int64_t chosen = 0;
    for (int64_t t = 0; t < job->n_tiles; t++) {
        double share = exp((double)tiles[t].max - max) * (double)tiles[t].sum;
        if (share > 0) chosen = t;
        if (before + share > wanted) break;
        before += share;
    }
    job->candidates[item] =
        draw_in_tile(job, &backend->threads[thread], (int32_t)item, chosen, max, before, wanted);
}

/* ---- The soft embedding -------------------------------------------------------------------------------------- */

/* Exponentials of the logits of n_tokens tokens, relative to each row's maximum, packed. */
static dg_rows pack_weights(const head_job *job, dg_thread *thread, int32_t first, int32_t n_tokens) {
    const dg_backend *backend = job->backend;
    const int32_t n_tiles = dg_rows_n_tiles(backend->kernels, job->n);
    dg_rows weights =
        dg_rows_in(backend->kernels, thread->weights, (dg_form){.integer = false}, job->n, n_tokens, 0, n_tiles);
    const float *z = thread->logits;
    int64_t stride = DG_SOFT_TOKENS;
    if (job->z != NULL) {
        z = job->z + first;
        stride = n_vocab_of(job);
    } else {
        tile_logits(job, thread, &job->rows, first, n_tokens, thread->logits, stride);
    }
    float e[DG_SOFT_TOKENS];
    for (int32_t r = 0; r < job->n; r++) {
        backend->kernels->exponentials(z + r * stride, n_tokens, backend->soft_max[r], e);
        backend->kernels->pack(&weights, r, 0, e, n_tokens);
    }
    return weights;
}

static void add_segment(void *context, int64_t segment, int thread_index) {
    const head_job *job = context;
    const dg_backend *backend = job->backend;
    dg_thread *thread = &backend->threads[thread_index];
    const dg_weight *table = &backend->model->token_embd;
    const dg_type_traits *traits = dg_type_traits_of(table->type);
    const int64_t n_embd = table->n_cols, row_bytes = (int64_t)dg_row_bytes(table->type, n_embd);
    const int64_t n_tiles = (n_vocab_of(job) + DG_SOFT_TOKENS - 1) / DG_SOFT_TOKENS;
    float *sums = backend->soft_sums + segment * job->n * n_embd;
    memset(sums, 0, (size_t)(job->n * n_embd) * sizeof *sums);
    for (int64_t tile = n_tiles * segment / DG_SOFT_SEGMENTS; tile < n_tiles * (segment + 1) / DG_SOFT_SEGMENTS;
         tile++) {
        int32_t first = (int32_t)tile * DG_SOFT_TOKENS, n_tokens = tokens_from(job, first, DG_SOFT_TOKENS);
        dg_rows weights = pack_weights(job, thread, first, n_tokens);
        for (int64_t column = 0; column < n_embd; column += DG_SOFT_COLUMNS) {
            int64_t n = n_embd - column < DG_SOFT_COLUMNS ? n_embd - column : DG_SOFT_COLUMNS;
            const uint8_t *src = (const uint8_t *)table->data + first * row_bytes +
                                 column / traits->block_size * traits->block_bytes;
            for (int32_t i = 0; i < n_tokens; i++)
                traits->decode(src + i * row_bytes, thread->embedding + i * DG_SOFT_COLUMNS, n);
            backend->kernels->accumulate(&weights, backend->ones, thread->embedding, DG_SOFT_COLUMNS, n, sums + column,
                                         n_embd);
        }
    }
}

static void add_segments(void *context, int64_t row, int thread) {
    const head_job *job = context;
    const dg_backend *backend = job->backend;
    const dg_weight *table = &backend->model->token_embd;
    const int64_t n_embd = table->n_cols;
    float *out = job->out + row * n_embd;
    float factor = sqrtf((float)n_embd) * (table->scale != NULL ? table->scale[0] : 1.0f) / backend->soft_sum[row];
    memset(out, 0, (size_t)n_embd * sizeof *out);
    for (int64_t s = 0; s < DG_SOFT_SEGMENTS; s++)
        backend->kernels->add_scaled(backend->soft_sums + (s * job->n + row) * n_embd, factor, n_embd, out);
}

static void sum_embeddings(head_job *job, float *soft) {
    job->out = soft;
    dg_pool_run(job->backend->pool, DG_SOFT_SEGMENTS, add_segment, job);
    dg_pool_run(job->backend->pool, job->n, add_segments, job);
}

static void measure_row(void *context, int64_t row, int thread) {
    const head_job *job = context;
    const int32_t n_vocab = n_vocab_of(job);
    const float *z = job->z + row * n_vocab;
    float max = z[0], e[DG_SOFT_TOKENS];
    double sum = 0;
    for (int32_t i = 1; i < n_vocab; i++) max = z[i] > max ? z[i] : max;
    for (int32_t first = 0; first < n_vocab; first += DG_SOFT_TOKENS) {
        int32_t n = tokens_from(job, first, DG_SOFT_TOKENS);
        job->backend->kernels->exponentials(z + first, n, max, e);
        for (int32_t i = 0; i < n; i++) sum += (double)e[i];
    }
    job->backend->soft_max[row] = max;
    job->backend->soft_sum[row] = (float)sum;
}

/* Scratch of the head is for canvas_length rows: more are done in turns. */
static int32_t rows_in_turn(const dg_backend *backend, int32_t n, int32_t first) {
    int32_t most = backend->model->canvas_length;
    return n - first < most ? n - first : most;
}

void dg_cpu_soft_embedding(dg_backend *backend, const float *host_z, int32_t n, float *soft) {
    const dg_model *model = backend->model;
    for (int32_t first = 0, turn; first < n; first += turn) {
        turn = rows_in_turn(backend, n, first);
        head_job job = {.backend = backend, .n = turn, .z = host_z + (int64_t)first * model->n_vocab};
        dg_pool_run(backend->pool, turn, measure_row, &job);
        sum_embeddings(&job, soft + (int64_t)first * model->n_embd);
    }
}

void dg_cpu_sample(dg_backend *backend, const float *x, int32_t n, float temperature, const float *host_uniforms,
                   const dg_head_result *result, float *soft) {
    const int64_t n_embd = backend->model->n_embd;
    for (int32_t first = 0, turn; first < n; first += turn) {
        turn = rows_in_turn(backend, n, first);
        head_job job = {.backend = backend,
                        .rows = pack_head(backend, x + first * n_embd, turn),
                        .n = turn,
                        .temperature = temperature,
                        .n_tiles = head_tiles(backend->model),
                        .uniforms = host_uniforms + first,
                        .argmax = result->host_argmax + first,
                        .candidates = result->host_candidates + first,
                        .entropies = result->host_entropies + first};
        dg_pool_run(backend->pool, job.n_tiles, gather_statistics, &job);
        dg_pool_run(backend->pool, turn, finish_row, &job);
        if (soft != NULL) sum_embeddings(&job, soft + first * n_embd);
    }
}
