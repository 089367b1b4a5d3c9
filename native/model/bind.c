/* Every tensor of a GGUF file finds its place in a dg_model by one table (docs/format.md). */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "gguf/gguf.h"
#include "model/hparams.h"
#include "model/model.h"

#define MAX_NAME 128

/* A frequency divided by this or more turns by less than 1e-14 over any context: it is no rotation. */
#define NO_ROTATION 1e20f

typedef enum slot_kind {
    VECTOR,   /* float32 (n_rows) */
    MATRIX,   /* any type (n_rows, n_cols) */
    MATRICES, /* any type (n_experts, n_rows, n_cols) */
    TABLE     /* float32 (n_rows, n_cols) */
} slot_kind;

/* One row of the binding table: the tensor's name, its shape, and where it goes. */
typedef struct slot {
    const char *name; /* without ".weight", unless it names another suffix */
    slot_kind kind;
    int64_t n_rows, n_cols;
    void *target; /* const float ** for VECTOR and TABLE, dg_weight * otherwise */
    bool optional;
} slot;

typedef struct binder {
    const dg_file *file;
    dg_model *model;
    bool has_encoder_scalars; /* in any layer, and so expected in all */
    bool *bound;              /* (n_tensors) those that have found their place */
    dg_error *error;
} binder;

static void shape_text(char *text, size_t size, const int64_t *shape, int n_dims) {
    size_t used = 0;
    text[0] = '\0';
    for (int i = 0; i < n_dims && used < size; i++)
        used += (size_t)snprintf(text + used, size - used, i == 0 ? "%lld" : " x %lld", (long long)shape[i]);
}

/* Finds a tensor and checks its shape. `info->data` is NULL where an optional one is absent. */
static dg_status find(binder *b, const char *name, const int64_t *shape, int n_dims, bool optional,
                      dg_tensor_info *info) {
    char expected[64], actual[128];
    if (!dg_file_find_tensor(b->file, name, info)) {
        *info = (dg_tensor_info){0};
        if (optional) return DG_OK;
        return dg_fail(b->error, DG_ERROR_MODEL_FILE, "%s: tensor %s is missing", dg_file_path(b->file), name);
    }
    bool same = info->n_dims == n_dims;
    for (int i = 0; i < n_dims; i++) same &= info->shape[i] == shape[i];
    if (!same) {
        shape_text(expected, sizeof expected, shape, n_dims);
        shape_text(actual, sizeof actual, info->shape, info->n_dims);
        return dg_fail(b->error, DG_ERROR_MODEL_FILE, "%s: tensor %s is %s; expected %s", dg_file_path(b->file), name,
                       actual, expected);
    }
    if ((uintptr_t)info->data % sizeof(float) != 0)
        return dg_fail(b->error, DG_ERROR_MODEL_FILE,
                       "%s: tensor %s lies at an odd address; expected general.alignment "
                       "of at least 4",
                       dg_file_path(b->file), name);
    b->bound[dg_file_tensor_index(b->file, name)] = true;
    b->model->n_parameters += shape[0] * (n_dims > 1 ? shape[1] : 1) * (n_dims > 2 ? shape[2] : 1);
    return DG_OK;
}

static dg_status find_floats(binder *b, const char *name, const int64_t *shape, int n_dims, bool optional,
                             const float **floats) {
    dg_tensor_info info;
    DG_TRY(find(b, name, shape, n_dims, optional, &info));
    *floats = info.data;
    if (info.data == NULL) return DG_OK;
    if (info.type != DG_TYPE_F32)
        return dg_fail(b->error, DG_ERROR_MODEL_FILE,
                       "%s: tensor %s is of type %d; norms, scales and the router are "
                       "expected in f32",
                       dg_file_path(b->file), name, info.type);
    if (n_dims == 1)
        for (int64_t i = 0; i < shape[0]; i++)
            if (!isfinite((*floats)[i]))
                return dg_fail(b->error, DG_ERROR_MODEL_FILE, "%s: tensor %s: element %lld is not a finite number",
                               dg_file_path(b->file), name, (long long)i);
    return DG_OK;
}

static dg_status bind_slot(binder *b, const char *prefix, const slot *s) {
    char name[MAX_NAME], scale_name[MAX_NAME];
    const bool suffixed = strchr(s->name, '.') != NULL;
    snprintf(name, sizeof name, "%s%s%s", prefix, s->name, suffixed ? "" : ".weight");
    snprintf(scale_name, sizeof scale_name, "%s%s.scale", prefix, s->name);

    const int32_t n_experts = b->model->n_experts;
    const int64_t shape[3] = {n_experts, s->n_rows, s->n_cols};
    if (s->kind == VECTOR) return find_floats(b, name, shape + 1, 1, s->optional, s->target);
    if (s->kind == TABLE) return find_floats(b, name, shape + 1, 2, s->optional, s->target);

    dg_weight *weight = s->target;
    dg_tensor_info info;
    const bool stacked = s->kind == MATRICES;
    DG_TRY(find(b, name, stacked ? shape : shape + 1, stacked ? 3 : 2, s->optional, &info));
    if (info.data == NULL) return DG_OK;
    dg_type_info type;
    DG_TRY(dg_type_describe(info.type, &type, b->error));
    if (!type.decodes)
        return dg_fail(b->error, DG_ERROR_MODEL_FILE, "%s: tensor %s is of type %s, which this engine does not run",
                       dg_file_path(b->file), name, type.name);
    *weight = (dg_weight){.index = (int32_t)dg_file_tensor_index(b->file, name),
                          .data = info.data,
                          .type = info.type,
                          .n_matrices = stacked ? n_experts : 1,
                          .n_rows = s->n_rows,
                          .n_cols = s->n_cols,
                          .matrix_bytes = info.n_bytes / (uint64_t)(stacked ? n_experts : 1)};
    b->model->weight_bytes += info.n_bytes;
    /* The multiplier of the experts' down projection is folded into their router scale, which has its name. */
    if (strcmp(s->name, "ffn_down_exps") == 0) return DG_OK;
    const int64_t n_scales = weight->n_matrices;
    return find_floats(b, scale_name, &n_scales, 1, true, &weight->scale);
}

static dg_status bind_slots(binder *b, const char *prefix, const slot *slots, size_t n) {
    for (size_t i = 0; i < n; i++) DG_TRY(bind_slot(b, prefix, &slots[i]));
    return DG_OK;
}

#define COUNT(array) (sizeof(array) / sizeof *(array))

static dg_status bind_globals(binder *b) {
    dg_model *m = b->model;
    dg_tensor_info unused;
    const bool other = !dg_file_find_tensor(b->file, "self_cond_pre_norm.weight", &unused) &&
                       dg_file_find_tensor(b->file, "self_cond_norm.weight", &unused);
    const char *named_norm = other ? "self_cond_norm" : "self_cond_pre_norm";
    const slot slots[] = {
        {"token_embd", MATRIX, m->n_vocab, m->n_embd, &m->token_embd, false},
        {"output_norm", VECTOR, m->n_embd, 1, &m->output_norm, false},
        {named_norm, VECTOR, m->n_embd, 1, &m->self_conditioning.norm, false},
        {"self_cond_gate", MATRIX, m->n_ff, m->n_embd, &m->self_conditioning.gate, false},
        {"self_cond_up", MATRIX, m->n_ff, m->n_embd, &m->self_conditioning.up, false},
        {"self_cond_down", MATRIX, m->n_embd, m->n_ff, &m->self_conditioning.down, false},
    };
    m->self_conditioning.index = m->n_layers;
    return bind_slots(b, "", slots, COUNT(slots));
}

static dg_status bind_layer(binder *b, int32_t index) {
    dg_model *m = b->model;
    dg_layer *l = &m->layers[index];
    const int64_t embd = m->n_embd, ff = m->n_ff, ff_expert = m->n_ff_expert, n_experts = m->n_experts;
    const int64_t q_dim = (int64_t)m->n_heads * l->head_dim, kv_dim = (int64_t)l->n_kv_heads * l->head_dim;
    const float *encoder_scalar = NULL, *decoder_scalar = NULL;
    char prefix[32];
    l->index = l->mlp.index = l->moe.index = index;
    snprintf(prefix, sizeof prefix, "blk.%d.", index);

    dg_tensor_info unused;
    char fused[MAX_NAME];
    snprintf(fused, sizeof fused, "%sffn_gate_up_exps.weight", prefix);
    const bool is_fused = dg_file_find_tensor(b->file, fused, &unused);

    const slot slots[] = {
        {"attn_norm", VECTOR, embd, 1, &l->attn_norm, false},
        {"attn_q", MATRIX, q_dim, embd, &l->attn_q, false},
        {"attn_k", MATRIX, kv_dim, embd, &l->attn_k, false},
        {"attn_v", MATRIX, kv_dim, embd, &l->attn_v, !l->sliding},
        {"attn_q_norm", VECTOR, l->head_dim, 1, &l->attn_q_norm, false},
        {"attn_k_norm", VECTOR, l->head_dim, 1, &l->attn_k_norm, false},
        {"attn_output", MATRIX, embd, q_dim, &l->attn_output, false},
        {"post_attention_norm", VECTOR, embd, 1, &l->post_attention_norm, false},
        {"ffn_norm", VECTOR, embd, 1, &l->mlp.norm, false},
        {"ffn_gate", MATRIX, ff, embd, &l->mlp.gate, false},
        {"ffn_up", MATRIX, ff, embd, &l->mlp.up, false},
        {"ffn_down", MATRIX, embd, ff, &l->mlp.down, false},
        {"pre_ffw_norm_2", VECTOR, embd, 1, &l->moe.norm, false},
        {"ffn_gate_inp", TABLE, n_experts, embd, &l->moe.router, false},
        {"ffn_gate_inp.scale", VECTOR, embd, 1, &l->moe.router_scale, false},
        {"ffn_gate_up_exps", MATRICES, 2 * ff_expert, embd, &l->moe.gate_up, !is_fused},
        {"ffn_gate_exps", MATRICES, ff_expert, embd, &l->moe.gate, is_fused},
        {"ffn_up_exps", MATRICES, ff_expert, embd, &l->moe.up, is_fused},
        {"ffn_down_exps", MATRICES, embd, ff_expert, &l->moe.down, false},
        {"ffn_down_exps.scale", VECTOR, n_experts, 1, &l->moe.expert_scale, false},
        {"post_ffw_norm", VECTOR, embd, 1, &l->post_ffn_norm, false},
        {"post_ffw_norm_1", VECTOR, embd, 1, &l->post_mlp_norm, false},
        {"post_ffw_norm_2", VECTOR, embd, 1, &l->post_moe_norm, false},
        {"layer_output_scale", VECTOR, 1, 1, &decoder_scalar, false},
        {"enc_layer_output_scale", VECTOR, 1, 1, &encoder_scalar, !b->has_encoder_scalars},
    };
    DG_TRY(bind_slots(b, prefix, slots, COUNT(slots)));
    l->decoder_scalar = *decoder_scalar;
    l->encoder_scalar = encoder_scalar != NULL ? *encoder_scalar : *decoder_scalar;
    if (is_fused && l->moe.gate.data != NULL)
        return dg_fail(b->error, DG_ERROR_MODEL_FILE, "%s: layer %d has its experts' gates twice: fused and alone",
                       dg_file_path(b->file), index);
    return DG_OK;
}

/* rope_freqs divides the frequencies of the full layers: 1 where they rotate, a huge number where they do not. */
static dg_status bind_rope_freqs(binder *b) {
    dg_model *m = b->model;
    const dg_layer *full = NULL;
    for (int32_t i = 0; i < m->n_layers; i++)
        if (!m->layers[i].sliding) full = &m->layers[i];
    if (full == NULL) return DG_OK;

    const int64_t n_pairs = full->head_dim / 2;
    const float *divisors;
    DG_TRY(find_floats(b, "rope_freqs.weight", &n_pairs, 1, false, &divisors));
    int64_t n_rotated = 0;
    while (n_rotated < n_pairs && divisors[n_rotated] == 1.0f) n_rotated++;
    for (int64_t i = n_rotated; i < n_pairs; i++)
        if (divisors[i] < NO_ROTATION)
            return dg_fail(
                b->error, DG_ERROR_MODEL_FILE,
                "%s: tensor rope_freqs.weight: element %lld is %g; expected a run of ones, then numbers from "
                "%g on",
                dg_file_path(b->file), (long long)i, divisors[i], NO_ROTATION);
    for (int32_t i = 0; i < m->n_layers; i++)
        if (!m->layers[i].sliding) m->layers[i].n_rot = (int32_t)(2 * n_rotated);
    return DG_OK;
}

static dg_status check_nothing_is_left(const binder *b) {
    const int64_t n = dg_file_n_tensors(b->file);
    for (int64_t i = 0; i < n; i++) {
        dg_tensor_info info;
        if (b->bound[i]) continue;
        dg_file_tensor(b->file, i, &info);
        return dg_fail(b->error, DG_ERROR_MODEL_FILE,
                       "%s: tensor %s has no place in this architecture: the file is newer than this engine, or not "
                       "what it says",
                       dg_file_path(b->file), info.name);
    }
    return DG_OK;
}

/* Files of llama.cpp's #24427 have one scalar a layer, for both passes; those of #24423 have two. */
static bool has_encoder_scalars(const binder *b) {
    bool found = false;
    for (int32_t i = 0; i < b->model->n_layers && !found; i++) {
        char name[MAX_NAME];
        snprintf(name, sizeof name, "blk.%d.enc_layer_output_scale.weight", i);
        found = dg_file_tensor_index(b->file, name) >= 0;
    }
    return found;
}

static dg_status bind_tensors(binder *b) {
    b->has_encoder_scalars = has_encoder_scalars(b);
    if (!b->has_encoder_scalars)
        snprintf(b->model->file_note, sizeof b->model->file_note,
                 "the file has no enc_layer_output_scale: layer_output_scale serves the encoder too, which may answer "
                 "worse than the model can; a file with both is made by dgemma convert");
    DG_TRY(bind_globals(b));
    for (int32_t i = 0; i < b->model->n_layers; i++) DG_TRY(bind_layer(b, i));
    DG_TRY(bind_rope_freqs(b));
    return check_nothing_is_left(b);
}

static dg_status read_model(dg_file *file, dg_model *m, dg_error *error) {
    DG_TRY(dg_hparams_read(file, m, error));
    binder b = {.file = file, .model = m, .error = error};
    b.bound = calloc((size_t)dg_file_n_tensors(file), sizeof *b.bound);
    if (b.bound == NULL) return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory for %d layers", m->n_layers);
    dg_status status = bind_tensors(&b);
    free(b.bound);
    return status;
}

dg_status dg_model_bind(dg_file *file, dg_model **out, dg_error *error) {
    *out = NULL;
    dg_model *m = calloc(1, sizeof *m);
    if (m == NULL) return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory for a model");
    dg_status status = read_model(file, m, error);
    if (status != DG_OK) {
        free(m->layers);
        free(m);
        return status;
    }
    m->file = file;
    atomic_init(&m->n_references, 1);
    *out = m;
    return DG_OK;
}
