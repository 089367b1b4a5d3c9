/* Dense products: packing, and panels handed out to threads. */
#include "cpu/cpu.h"

#include <string.h>

#include "quant/quant.h"

/* Of decoded codes: with their scales and a tile of activations they stay in a first-level cache of 32 KiB. */
#define STRIP_BYTES 24576

static uint64_t align_up(uint64_t n) { return (n + 63) / 64 * 64; }

int32_t dg_rows_n_tiles(const dg_cpu_kernels *kernels, int32_t n) {
    return (n + kernels->tile_rows - 1) / kernels->tile_rows;
}

uint64_t dg_rows_bytes(const dg_cpu_kernels *kernels, int64_t n_tiles, int64_t n_cols) {
    /* Floats take the most: a byte, and at most one scale and two sums for each 16 columns, are less. */
    return align_up((uint64_t)n_tiles * (uint64_t)kernels->tile_rows * (uint64_t)n_cols * sizeof(float)) + 4 * 64;
}

dg_rows dg_rows_in(const dg_cpu_kernels *kernels, void *memory, dg_form form, int32_t n, int64_t n_cols,
                   int64_t first_tile, int64_t n_tiles_in_all) {
    int32_t n_tiles = dg_rows_n_tiles(kernels, n);
    int32_t per_tile = n_tiles > 0 ? (n + n_tiles - 1) / n_tiles : 1;
    dg_rows rows = {.form = form, .n = n, .n_tiles = n_tiles, .per_tile = per_tile, .n_cols = n_cols};
    int64_t places = first_tile * kernels->tile_rows, places_in_all = n_tiles_in_all * kernels->tile_rows;
    if (form.weight_tiles) {
        rows.pairs = (uint16_t *)memory + places * n_cols;
        return rows;
    }
    if (!form.integer) {
        rows.values = (float *)memory + places * n_cols;
        return rows;
    }
    int64_t n_blocks = n_cols / DG_BLOCK, n_groups = n_cols / form.group;
    uint8_t *at = memory;
    rows.codes = (int8_t *)at + places * n_cols * dg_code_bytes(form);
    at += align_up((uint64_t)(places_in_all * n_cols * dg_code_bytes(form)));
    rows.scales = (float *)at + places * n_blocks;
    at += align_up((uint64_t)(places_in_all * n_blocks) * sizeof(float));
    rows.bias = (int32_t *)at + places * n_groups;
    at += align_up((uint64_t)(places_in_all * n_groups) * sizeof(int32_t));
    rows.sums = (float *)at + places * n_groups;
    return rows;
}

dg_form dg_form_of(const dg_cpu_kernels *kernels, const dg_weight *weight) { return kernels->form_of(weight->type); }

dg_form dg_common_form(const dg_cpu_kernels *kernels, const dg_weight *a, const dg_weight *b) {
    dg_form form = dg_form_of(kernels, a);
    return dg_form_equal(form, dg_form_of(kernels, b)) ? form : (dg_form){.integer = false};
}

/* ---- Packing ------------------------------------------------------------------------------------------------- */

typedef struct packing {
    dg_backend *backend;
    const float *x;    /* (n, rows.n_cols) */
    const float *norm; /* NULL: pack as it is */
    float factor;
    dg_rows rows;
} packing;

/* A tile at a time: its rows share cache lines, which two threads should not write in turns. */
static void pack_tile(void *context, int64_t tile, int thread) {
    const packing *p = context;
    const dg_cpu_kernels *kernels = p->backend->kernels;
    const int64_t n_cols = p->rows.n_cols;
    const int32_t first = (int32_t)tile * p->rows.per_tile;
    const int32_t n = p->rows.n - first < p->rows.per_tile ? p->rows.n - first : p->rows.per_tile;
    const float *rows[DG_MAX_TILE_ROWS];
    for (int32_t i = 0; i < n; i++) {
        rows[i] = p->x + (first + i) * n_cols;
        if (p->norm == NULL) continue;
        float *normed = p->backend->threads[thread].tile_rows + i * n_cols;
        kernels->rms_norm(rows[i], p->norm, n_cols, p->backend->model->rms_eps, normed);
        if (p->factor != 1.0f) kernels->scale(normed, p->factor, n_cols, normed);
        rows[i] = normed;
    }
    if (p->rows.form.weight_tiles)
        kernels->pack_tile(&p->rows, (int32_t)tile, rows, n);
    else
        for (int32_t i = 0; i < n; i++) kernels->pack(&p->rows, first + i, 0, rows[i], n_cols);
}

dg_rows dg_pack_normed(dg_backend *backend, dg_form form, const float *x, int32_t n, int64_t n_cols, const float *norm,
                       float factor) {
    int32_t n_tiles = dg_rows_n_tiles(backend->kernels, n);
    packing p = {backend, x, norm, factor, dg_rows_in(backend->kernels, backend->packed, form, n, n_cols, 0, n_tiles)};
    dg_pool_run(backend->pool, n_tiles, pack_tile, &p);
    return p.rows;
}

dg_rows dg_pack(dg_backend *backend, dg_form form, const float *x, int32_t n, int64_t n_cols) {
    return dg_pack_normed(backend, form, x, n, n_cols, NULL, 1.0f);
}

void dg_copy_packed(const dg_cpu_kernels *kernels, const dg_rows *from, int32_t from_row, const dg_rows *to,
                    int32_t to_row) {
    const int64_t n_blocks = from->n_cols / DG_BLOCK, places = kernels->tile_rows;
    const int n_groups = DG_BLOCK / from->form.group;
    const int64_t block_bytes = DG_BLOCK * dg_code_bytes(from->form);
    int64_t a = from_row / from->per_tile * n_blocks * places + from_row % from->per_tile;
    int64_t b = to_row / to->per_tile * n_blocks * places + to_row % to->per_tile;
    for (int64_t i = 0; i < n_blocks; i++, a += places, b += places) {
        memcpy(to->codes + b * block_bytes, from->codes + a * block_bytes, (size_t)block_bytes);
        to->scales[b] = from->scales[a];
    }
    a = (from_row / from->per_tile * n_blocks * n_groups) * places + from_row % from->per_tile;
    b = (to_row / to->per_tile * n_blocks * n_groups) * places + to_row % to->per_tile;
    for (int64_t i = 0; i < n_blocks * n_groups; i++, a += places, b += places) {
        to->bias[b] = from->bias[a];
        if (from->form.has_mins) to->sums[b] = from->sums[a];
    }
}

/* ---- Products ------------------------------------------------------------------------------------------------ */

int64_t dg_strip_cols(const dg_cpu_kernels *kernels, dg_form form, int64_t n_cols) {
    const int64_t unit = 256; /* the largest block of any type */
    const int64_t bytes = form.integer ? dg_code_bytes(form) : (int64_t)sizeof(float);
    int64_t most = STRIP_BYTES / bytes / kernels->lanes / unit * unit;
    if (most < unit) most = unit;
    const int64_t n_strips = (n_cols + most - 1) / most;
    return (n_cols / n_strips + unit - 1) / unit * unit;
}

void dg_prefetch(dg_panel *panel, const dg_features *f, int32_t lanes) {
    panel->prefetch = NULL;
    if (f->w == NULL) return;
    const int64_t n_cols = f->w->n_cols, row_bytes = (int64_t)dg_row_bytes(f->w->type, n_cols);
    const int64_t left = f->w->n_rows - f->first;
    if (left <= 0) return;
    const int64_t n_bytes = (left < lanes ? left : lanes) * row_bytes;
    const int64_t begin = n_bytes * panel->first_col / n_cols;
    panel->prefetch =
        (const uint8_t *)f->w->data + (uint64_t)f->matrix * f->w->matrix_bytes + f->first * row_bytes + begin;
    panel->prefetch_bytes = n_bytes * (panel->first_col + panel->n_cols) / n_cols - begin;
}

static void multiply_tiled_features(const dg_cpu_kernels *kernels, dg_thread *thread, const dg_features *features,
                                    int64_t n, const dg_features *next, const dg_rows *rows, float *out,
                                    int64_t out_stride) {
    const int64_t at_once = n < DG_TILED_FEATURES ? n : DG_TILED_FEATURES;
    dg_features now = *features;
    dg_panel *panel = &thread->panel;
    panel->first_col = 0;
    panel->n_cols = rows->n_cols;
    for (int64_t done = 0; done < n; done += at_once) {
        const int64_t first = now.first, left = n - done;
        now.first += at_once;
        dg_prefetch(panel, done + at_once < n ? &now : next, (int32_t)at_once);
        kernels->multiply_tiled(now.w, now.matrix, first, (int32_t)(left < at_once ? left : at_once), panel, rows,
                                thread->tile_scratch, out + done, out_stride);
    }
    panel->prefetch = NULL;
}

void dg_multiply_features(const dg_cpu_kernels *kernels, dg_thread *thread, const dg_features *features, int64_t n,
                          const dg_features *next, const dg_rows *rows, float *out, int64_t out_stride) {
    if (rows->form.weight_tiles) {
        multiply_tiled_features(kernels, thread, features, n, next, rows, out, out_stride);
        return;
    }
    const int32_t lanes = kernels->lanes;
    const int64_t n_cols = rows->n_cols, strip = dg_strip_cols(kernels, rows->form, n_cols);
    dg_features now = *features;
    dg_panel *panel = &thread->panel;
    panel->form = rows->form;
    for (int64_t done = 0; done < n; done += lanes) {
        const int32_t n_lanes = n - done < lanes ? (int32_t)(n - done) : lanes;
        const int64_t first = now.first;
        now.first += lanes;
        for (panel->first_col = 0; panel->first_col < n_cols; panel->first_col += strip) {
            panel->n_cols = n_cols - panel->first_col < strip ? n_cols - panel->first_col : strip;
            kernels->decode(now.w, now.matrix, first, n_lanes, panel);
            dg_prefetch(panel, done + lanes < n ? &now : next, lanes);
            kernels->multiply(panel, rows, thread->sums, out + done, out_stride, n_lanes);
        }
    }
    panel->prefetch = NULL;
}

void dg_multiply_gated(dg_backend *backend, int thread_index, const dg_gated *gated, int64_t first,
                       const dg_features *next, const dg_rows *rows, const dg_rows *hidden) {
    const dg_cpu_kernels *kernels = backend->kernels;
    dg_thread *thread = &backend->threads[thread_index];
    const int64_t n = gated->n_ff - first < DG_FEATURES ? gated->n_ff - first : DG_FEATURES;
    const dg_features gate = {gated->gate, gated->matrix, gated->gate_first + first};
    const dg_features up = {gated->up, gated->matrix, gated->up_first + first};
    dg_multiply_features(kernels, thread, &gate, n, &up, rows, thread->gate, DG_FEATURES);
    dg_multiply_features(kernels, thread, &up, n, next, rows, thread->up, DG_FEATURES);
    for (int32_t r = 0; r < rows->n; r++) {
        float *gate_row = thread->gate + (int64_t)r * DG_FEATURES, *up_row = thread->up + (int64_t)r * DG_FEATURES;
        kernels->gelu_multiply(gate_row, up_row, n, gate_row);
        if (gated->hidden_squares != NULL) dg_squares_add(gated->hidden_squares, gated->matrix, first, gate_row, n);
        kernels->pack(hidden, r, first, gate_row, n);
    }
}

typedef struct product {
    dg_backend *backend;
    const dg_weight *w;
    const dg_rows *rows;
    float *out;
    int64_t piece; /* features */
} product;

static void multiply_piece(void *context, int64_t item, int thread) {
    const product *p = context;
    const dg_features now = {p->w, 0, item * p->piece};
    const dg_features next = {p->w, 0, (item + dg_pool_size(p->backend->pool)) * p->piece};
    const int64_t left = p->w->n_rows - now.first;
    dg_multiply_features(p->backend->kernels, &p->backend->threads[thread], &now, left < p->piece ? left : p->piece,
                         &next, p->rows, p->out + now.first, p->w->n_rows);
}

void dg_matmul(dg_backend *backend, const dg_weight *w, const dg_rows *rows, float *out) {
    const int64_t lanes = backend->kernels->lanes;
    product p = {backend, w, rows, out, rows->form.weight_tiles ? DG_TILED_FEATURES : lanes};
    /* some pieces for each thread, so that all finish at about the same time */
    while (p.piece > lanes && w->n_rows < 4 * p.piece * dg_pool_size(backend->pool)) p.piece /= 2;
    dg_pool_run(backend->pool, (w->n_rows + p.piece - 1) / p.piece, multiply_piece, &p);
}

/* ---- The gated MLP ------------------------------------------------------------------------------------------- */

typedef struct gated_layer {
    dg_backend *backend;
    dg_gated gated;
    const dg_rows *rows;
    const dg_rows *hidden;
} gated_layer;

static void multiply_hidden(void *context, int64_t item, int thread) {
    const gated_layer *g = context;
    const dg_features next = {g->gated.gate, 0, (item + dg_pool_size(g->backend->pool)) * DG_FEATURES};
    dg_multiply_gated(g->backend, thread, &g->gated, item * DG_FEATURES, &next, g->rows, g->hidden);
}

void dg_cpu_mlp(dg_backend *backend, const dg_mlp *mlp, const float *x, int32_t n, float *out) {
    const dg_cpu_kernels *kernels = backend->kernels;
    const int64_t n_ff = mlp->gate.n_rows;
    dg_rows rows =
        dg_pack_normed(backend, dg_common_form(kernels, &mlp->gate, &mlp->up), x, n, mlp->gate.n_cols, mlp->norm, 1.0f);
    dg_rows hidden = dg_rows_in(kernels, backend->packed_hidden, dg_form_of(kernels, &mlp->down), n, n_ff, 0,
                                dg_rows_n_tiles(kernels, n));
    gated_layer g = {.backend = backend,
                     .gated = {.gate = &mlp->gate,
                               .up = &mlp->up,
                               .n_ff = n_ff,
                               .hidden_squares = dg_collector_of(backend->collector, &mlp->down)},
                     .rows = &rows,
                     .hidden = &hidden};
    dg_collect_rows(backend, &mlp->gate, x, n, mlp->norm);
    dg_collect_rows(backend, &mlp->up, x, n, mlp->norm);
    dg_pool_run(backend->pool, (n_ff + DG_FEATURES - 1) / DG_FEATURES, multiply_hidden, &g);
    dg_matmul(backend, &mlp->down, &hidden, out);
}
