#include "cuda/layout.h"

#include <stdlib.h>
#include <string.h>

#include "base/error.h"

#define ALIGNMENT 256

static uint64_t align_up(uint64_t n) { return (n + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }
static int64_t max_i64(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* ---- Weights -------------------------------------------------------------------------------------------------- */

bool dg_cuda_tile_of(int32_t type, dg_cuda_tile *tile) {
    switch (type) {
#define CASE(number, Format, columns, tile_bytes, header)                                                              \
    case number:                                                                                                       \
        *tile = (dg_cuda_tile){columns, tile_bytes, header};                                                           \
        return true;
        DG_CUDA_FORMATS(CASE)
#undef CASE
    default:
        return false;
    }
}

uint64_t dg_cuda_matrix_bytes(int32_t type, int64_t n_rows, int64_t n_cols) {
    dg_cuda_tile tile;
    if (!dg_cuda_tile_of(type, &tile)) return 0;
    const int64_t tiles = ceil_div(n_cols, tile.n_cols);
    return (uint64_t)(ceil_div(n_rows, DG_CUDA_TILE_ROWS) *
                      (tiles * tile.bytes + ceil_div(tiles, 4) * tile.header_bytes));
}

static void add(dg_cuda_weights *plan, dg_cuda_item item) {
    item.offset = plan->bytes;
    plan->bytes += align_up(item.bytes);
    if (plan->n < plan->capacity) plan->items[plan->n] = item;
    plan->n++;
}

static void add_matrix(dg_cuda_weights *plan, const char *what, const void *source, int32_t type, int32_t stored_type,
                       int64_t n_matrices, int64_t n_rows, int64_t n_cols, uint64_t matrix_bytes) {
    uint64_t bytes = dg_cuda_matrix_bytes(stored_type, n_rows, n_cols) * (uint64_t)n_matrices;
    add(plan, (dg_cuda_item){source, type, stored_type, n_matrices, n_rows, n_cols, matrix_bytes / (uint64_t)n_rows,
                             matrix_bytes, 0, bytes, what});
}

static void add_vector(dg_cuda_weights *plan, const float *source, int64_t n) {
    if (source == NULL) return;
    uint64_t bytes = (uint64_t)n * sizeof(float);
    add(plan, (dg_cuda_item){source, DG_TYPE_F32, DG_TYPE_F32, 1, 1, n, 0, bytes, 0, bytes, "a vector"});
}

/* `fp4`: the weight may be stored for the units that multiply FP4. */
static void add_weight(dg_cuda_weights *plan, const char *what, const dg_weight *w, bool fp4) {
    if (w->data == NULL) return;
    const int32_t stored = fp4 && w->type == DG_TYPE_NVFP4 ? DG_CUDA_TYPE_FP4 : w->type;
    add_matrix(plan, what, w->data, w->type, stored, w->n_matrices, w->n_rows, w->n_cols, w->matrix_bytes);
    add_vector(plan, w->scale, w->n_matrices);
}

static void add_mlp(dg_cuda_weights *plan, const dg_mlp *m, int64_t n_embd) {
    add_vector(plan, m->norm, n_embd);
    add_weight(plan, "the gate of an MLP", &m->gate, plan->fp4);
    add_weight(plan, "the up projection of an MLP", &m->up, plan->fp4);
    add_weight(plan, "the down projection of an MLP", &m->down, plan->fp4);
}

/* The rows for down are quantized before their largest value is known, which two FP4 terms need (formats/fp4.cuh). */
static void add_moe(dg_cuda_weights *plan, const dg_model *model, const dg_moe *moe) {
    add_matrix(plan, "the router", moe->router, DG_TYPE_F32, DG_TYPE_F32, 1, model->n_experts, model->n_embd,
               (uint64_t)model->n_experts * (uint64_t)model->n_embd * sizeof(float));
    add_vector(plan, moe->router_scale, model->n_embd);
    add_vector(plan, moe->norm, model->n_embd);
    add_weight(plan, "the experts' gates and up projections", &moe->gate_up, plan->fp4);
    add_weight(plan, "the experts' gates", &moe->gate, plan->fp4);
    add_weight(plan, "the experts' up projections", &moe->up, plan->fp4);
    add_weight(plan, "the experts' down projections", &moe->down, false);
    add_vector(plan, moe->expert_scale, model->n_experts);
}

static void add_layer(dg_cuda_weights *plan, const dg_model *model, const dg_layer *layer) {
    const int64_t n_embd = model->n_embd;
    add_vector(plan, layer->attn_norm, n_embd);
    add_weight(plan, "attn_q", &layer->attn_q, plan->fp4);
    add_weight(plan, "attn_k", &layer->attn_k, plan->fp4);
    add_weight(plan, "attn_v", &layer->attn_v, plan->fp4);
    add_vector(plan, layer->attn_q_norm, layer->head_dim);
    add_vector(plan, layer->attn_k_norm, layer->head_dim);
    add_weight(plan, "attn_output", &layer->attn_output, plan->fp4);
    add_vector(plan, layer->post_attention_norm, n_embd);
    add_mlp(plan, &layer->mlp, n_embd);
    if (layer->moe.place == layer->place) add_moe(plan, model, &layer->moe);
    add_vector(plan, layer->post_mlp_norm, n_embd);
    add_vector(plan, layer->post_moe_norm, n_embd);
    add_vector(plan, layer->post_ffn_norm, n_embd);
}

static void add_model(dg_cuda_weights *plan, const dg_model *model, int32_t place) {
    int32_t n_rot = 0;
    plan->n = 0;
    plan->bytes = 0;
    if (place == 0) {
        add_weight(plan, "token_embd", &model->token_embd, false); /* also read row by row */
        add_vector(plan, model->output_norm, model->n_embd);
        add_mlp(plan, &model->self_conditioning, model->n_embd);
    }
    for (int32_t i = 0; i < model->n_layers; i++) {
        if (model->layers[i].place == place) add_layer(plan, model, &model->layers[i]);
        if (model->layers[i].n_rot > n_rot) n_rot = model->layers[i].n_rot;
    }
    plan->frequencies = plan->bytes;
    plan->frequency_stride = n_rot / 2;
    plan->bytes += align_up((uint64_t)model->n_layers * (uint64_t)plan->frequency_stride * sizeof(float));
}

uint64_t dg_cuda_weight_bytes(const dg_model *model, int32_t place) {
    dg_cuda_weights plan = {0};
    add_model(&plan, model, place);
    return plan.bytes;
}

dg_status dg_cuda_plan_weights(const dg_model *model, int32_t place, bool fp4, dg_cuda_weights *plan, dg_error *error) {
    *plan = (dg_cuda_weights){.fp4 = fp4};
    add_model(plan, model, place); /* counts */
    plan->items = calloc((size_t)plan->n, sizeof *plan->items);
    if (plan->items == NULL) return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory to plan the weights on the GPU");
    plan->capacity = plan->n;
    add_model(plan, model, place);
    return DG_OK;
}

/* ---- Scratch -------------------------------------------------------------------------------------------------- */

typedef struct carving {
    char *base;
    uint64_t offset;
} carving;

static void *carve(carving *c, int64_t n, size_t size) {
    void *piece = c->base != NULL ? c->base + c->offset : NULL;
    c->offset += align_up((uint64_t)n * size);
    return piece;
}

static float *carve_floats(carving *c, int64_t n) { return carve(c, n, sizeof(float)); }
static int32_t *carve_ints(carving *c, int64_t n) { return carve(c, n, sizeof(int32_t)); }

/* Another of several things in one place, of which it takes as much as the largest. */
static void share(carving *c, uint64_t place, uint64_t *end) {
    if (c->offset > *end) *end = c->offset;
    c->offset = place;
}

/* Kinds of activations (formats.cuh) that some weights need. */
typedef struct kinds {
    bool int8, terms, floats, halves;
} kinds;

bool dg_cuda_hopper_wanted(void) {
    const char *wanted = getenv("DGEMMA_CUDA_HOPPER");
    return wanted != NULL && strcmp(wanted, "1") == 0;
}

static void need(kinds *k, const dg_weight *w) {
    if (w->data == NULL) return;
    const bool is_float = DG_CUDA_IS_FLOAT(w->type);
    k->floats |= is_float;
    k->int8 |= !is_float;
    /* Only loading decides whether it is stored for FP4 units. */
    k->terms |= w->type == DG_TYPE_NVFP4;
}

static void need_mlp(kinds *k, const dg_mlp *m) {
    need(k, &m->gate);
    need(k, &m->up);
    need(k, &m->down);
}

static dg_cuda_activations carve_activations(carving *c, kinds wanted, int64_t n_rows, int64_t n_cols) {
    const int64_t k_tiles = ceil_div(n_cols, 64);
    dg_cuda_activations x = {0};
    if (wanted.int8) {
        x.codes = carve(c, n_rows * k_tiles * 64, 1);
        x.scales = carve_floats(c, n_rows * k_tiles * 2);
        x.sums = carve_floats(c, n_rows * k_tiles * 2);
    }
    if (wanted.floats) x.values = carve_floats(c, n_rows * n_cols);
    if (wanted.terms) {
        x.terms = carve(c, n_rows * k_tiles * 64, 1);
        x.term_scales = carve(c, n_rows * k_tiles * 2, sizeof(uint32_t));
        x.term_multipliers = carve_floats(c, n_rows);
    }
    if (wanted.halves) {
        x.halves = carve(c, n_rows * k_tiles * 64, sizeof(uint16_t));
        x.half_multipliers = carve_floats(c, n_rows);
    }
    return x;
}

int64_t dg_cuda_moe_work_entries(const dg_model *model, int64_t n) {
    int64_t choices = n * model->n_experts_used;
    int64_t started = choices < model->n_experts ? choices : model->n_experts;
    return started + choices / DG_CUDA_WORK_TOKENS;
}

/* `gate`, `hidden`: kinds that gates with up projections, and down projections need. */
static void carve_experts(carving *c, const dg_model *model, kinds gate, kinds hidden, int64_t rows,
                          dg_cuda_scratch *s) {
    dg_cuda_moe_scratch *moe = &s->experts.moe;
    const int64_t choices = rows * model->n_experts_used;
    moe->ids = carve_ints(c, choices);
    moe->shares = carve_floats(c, choices);
    moe->slots = carve_ints(c, choices);
    moe->slot_tokens = carve_ints(c, choices);
    moe->work = carve_ints(c, 3 * dg_cuda_moe_work_entries(model, rows) + 1);
    moe->hidden = carve_activations(c, hidden, choices, model->n_ff_expert);
    s->experts.x = carve_activations(c, gate, rows, model->n_embd);
    /* The router has done its work when the first results come. */
    const uint64_t place = c->offset;
    uint64_t end = place;
    s->experts.router = carve_activations(c, (kinds){.floats = true}, rows, model->n_embd);
    s->experts.partials = carve_floats(c, s->experts.partials_floats);
    share(c, place, &end);
    moe->out = carve_floats(c, choices * model->n_embd);
    share(c, place, &end);
    c->offset = end;
}

static void carve_head(carving *c, const dg_model *model, int64_t n, dg_cuda_head_scratch *head) {
    head->rows = carve(c, n, sizeof(dg_cuda_head_row));
    head->look_weights = carve_floats(c, n * DG_CUDA_MAX_LOOKS * DG_CUDA_VOCABULARY_BLOCK);
    head->any_dense = carve_ints(c, ceil_div(n, DG_CUDA_SOFT_TOKENS));
    head->soft_sums = carve_floats(c, DG_CUDA_SOFT_SPLITS * n * model->n_embd);
    /* The dense soft embedding begins when the draw has read the statistics. */
    const uint64_t place = c->offset;
    uint64_t end = place;
    head->statistics = carve(c, n * ceil_div(model->n_vocab, DG_CUDA_VOCABULARY_BLOCK), 4 * sizeof(float));
    share(c, place, &end);
    head->chunk = carve(c, n * DG_CUDA_VOCABULARY_CHUNK, sizeof(uint16_t));
    share(c, place, &end);
    c->offset = end;
}

uint64_t dg_cuda_lay_out_canvas(int32_t n, char *base, dg_cuda_canvas *canvas) {
    const size_t row = (size_t)n * sizeof(int32_t);
    const size_t pinned = sizeof *canvas->rules, progress = pinned + row, ids = progress + sizeof *canvas->progress;
    if (base != NULL)
        *canvas = (dg_cuda_canvas){.rules = (dg_canvas_rules *)base,
                                   .pinned = (int32_t *)(base + pinned),
                                   .progress = (dg_canvas_progress *)(base + progress),
                                   .ids = (int32_t *)(base + ids),
                                   .draft = (int32_t *)(base + ids + row),
                                   .entropies = (float *)(base + ids + 2 * row),
                                   .argmax = (int32_t *)(base + ids + 3 * row),
                                   .candidates = (int32_t *)(base + ids + 4 * row),
                                   .replayed = (int32_t *)(base + ids + 5 * row)};
    return ids + 7 * row;
}

uint64_t dg_cuda_lay_out_scratch(const dg_backend_params *params, int32_t n_multiprocessors, char *base,
                                 dg_cuda_scratch *s) {
    const dg_model *model = params->model;
    const int64_t rows = params->max_rows;
    kinds x = {.halves = dg_cuda_hopper_wanted()}, gate = {0}, hidden = {0};
    int64_t heads = 0, qkv = 0, attention = 0;
    bool experts = false;
    if (params->place == 0) {
        need(&x, &model->token_embd);
        need_mlp(&x, &model->self_conditioning);
    }
    for (int32_t i = 0; i < model->n_layers; i++) {
        const dg_layer *layer = &model->layers[i];
        if (layer->place != params->place) continue;
        heads = max_i64(heads, (int64_t)model->n_heads * layer->head_dim);
        qkv = max_i64(qkv, layer->attn_q.n_rows + layer->attn_k.n_rows + layer->attn_v.n_rows);
        attention = max_i64(attention, DG_CUDA_ATTENTION_PARTIALS * rows * model->n_heads * (layer->head_dim + 2));
        need(&x, &layer->attn_q);
        need(&x, &layer->attn_k);
        need(&x, &layer->attn_v);
        need(&x, &layer->attn_output);
        need_mlp(&x, &layer->mlp);
        if (layer->moe.place != params->place) continue;
        experts = true;
        need(&gate, &layer->moe.gate_up);
        need(&gate, &layer->moe.gate);
        need(&gate, &layer->moe.up);
        need(&hidden, &layer->moe.down);
    }
    const int64_t results = max_i64(max_i64(qkv, model->n_embd), 2 * model->n_ff);
    /* Where a product is split over columns, the blocks never exceed two waves; see matmul.cu. */
    const int64_t common = DG_CUDA_PRODUCT_ROWS * DG_CUDA_PRODUCT_TOKENS;
    const int64_t block = x.halves ? DG_CUDA_HOPPER_ROWS * DG_CUDA_HOPPER_TOKENS : common;
    const int64_t split = 2 * n_multiprocessors * block;
    const int64_t logits = rows * model->n_experts;

    carving c = {base, 0};
    *s = (dg_cuda_scratch){0};
    s->ids = carve_ints(&c, rows);
    s->x = carve_activations(&c, x, rows, max_i64(model->n_embd, max_i64(heads, model->n_ff)));
    char *canvas = carve(&c, (int64_t)dg_cuda_lay_out_canvas(model->canvas_length, NULL, NULL), 1);
    dg_cuda_lay_out_canvas(model->canvas_length, canvas, &s->canvas);

    const uint64_t place = c.offset;
    uint64_t end = place;
    s->products.partials_floats = max_i64(rows * results, split);
    s->products.partials = carve_floats(&c, s->products.partials_floats);
    s->products.kept_floats = max_i64(rows * max_i64(model->n_embd, 2 * model->n_ff), split);
    share(&c, place, &end);
    s->attention.partials_floats = attention;
    s->attention.partials = carve_floats(&c, attention);
    share(&c, place, &end);
    if (experts) {
        carve_floats(&c, s->products.kept_floats);
        s->experts.partials_floats =
            max_i64(logits, split < DG_CUDA_PRODUCT_SPLITS * logits ? split : DG_CUDA_PRODUCT_SPLITS * logits);
        carve_experts(&c, model, gate, hidden, rows, s);
    }
    share(&c, place, &end);
    if (params->place == 0) carve_head(&c, model, model->canvas_length, &s->head);
    share(&c, place, &end);
    return end;
}
