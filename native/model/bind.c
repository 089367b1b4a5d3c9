/* From a GGUF file to a dg_model: hyperparameters, then every tensor by one table (docs/format.md). */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/error.h"
#include "gguf/gguf.h"
#include "model/model.h"

#define ARCHITECTURE "diffusion-gemma"
#define KEY(name) ARCHITECTURE "." name
#define ANY INT32_MAX /* of a hyperparameter: whatever fits */
#define MAX_NAME 128

/* A frequency divided by this or more turns by less than 1e-14 over any context: it is no rotation. */
#define NO_ROTATION 1e20f

/* ---- Hyperparameters ----------------------------------------------------------------------------------------- */

static dg_status check_architecture(const dg_file *file, dg_error *error) {
    const char *text;
    size_t n;
    DG_TRY(dg_file_get_string(file, "general.architecture", &text, &n, error));
    if (!dg_string_equals(text, n, ARCHITECTURE))
        return dg_fail(error, DG_ERROR_MODEL_FILE,
                       "%s: the architecture is '%.*s'; this engine runs '" ARCHITECTURE "' only", dg_file_path(file),
                       n > 64 ? 64 : (int)n, text);
    return DG_OK;
}

static bool has(const dg_file *file, const char *key) { return dg_file_find_key(file, key, NULL); }

/* Keys that other programs write for models of this family, and whose other values this model does not have. */
static dg_status check_unsupported(const dg_file *file, dg_error *error) {
    static const char *const zero[] = {KEY("attention.shared_kv_layers"), KEY("embedding_length_per_layer_input")};
    int32_t ignored;
    for (size_t i = 0; i < sizeof zero / sizeof *zero; i++)
        if (has(file, zero[i])) DG_TRY(dg_file_get_i32(file, zero[i], 0, 0, &ignored, error));
    return DG_OK;
}

static dg_status read_sizes(const dg_file *file, dg_model *m, dg_error *error) {
    DG_TRY(dg_file_get_i32(file, KEY("block_count"), 1, 4096, &m->n_layers, error));
    DG_TRY(dg_file_get_i32(file, KEY("context_length"), 2, ANY, &m->context_length, error));
    DG_TRY(dg_file_get_i32(file, KEY("embedding_length"), 1, 1 << 20, &m->n_embd, error));
    DG_TRY(dg_file_get_i32(file, KEY("feed_forward_length"), 1, 1 << 20, &m->n_ff, error));
    DG_TRY(dg_file_get_i32(file, KEY("attention.head_count"), 1, 1 << 14, &m->n_heads, error));
    DG_TRY(dg_file_get_i32(file, KEY("attention.sliding_window"), 1, ANY, &m->sliding_window, error));
    DG_TRY(dg_file_get_f32(file, KEY("attention.layer_norm_rms_epsilon"), 0, 1, &m->rms_eps, error));
    DG_TRY(dg_file_get_i32(file, KEY("expert_count"), 1, 1 << 14, &m->n_experts, error));
    DG_TRY(dg_file_get_i32(file, KEY("expert_used_count"), 1, m->n_experts, &m->n_experts_used, error));
    DG_TRY(dg_file_get_i32(file, KEY("expert_feed_forward_length"), 1, 1 << 20, &m->n_ff_expert, error));
    DG_TRY(dg_file_get_f32(file, KEY("final_logit_softcapping"), 1e-3f, 1e6f, &m->logit_softcap, error));
    DG_TRY(dg_file_get_i32(file, "diffusion.canvas_length", 1, 1 << 16, &m->canvas_length, error));
    if (m->canvas_length >= m->context_length)
        return dg_fail(error, DG_ERROR_MODEL_FILE, "%s: a canvas of %d tokens does not fit a context of %d",
                       dg_file_path(file), m->canvas_length, m->context_length);
    return DG_OK;
}

/* The sampler's settings: optional, since published files lack them; these are the released model's. */
static dg_status read_sampling(const dg_file *file, dg_sampling *s, dg_error *error) {
    *s = (dg_sampling){.max_denoising_steps = 48,
                       .t_min = 0.4f,
                       .t_max = 0.8f,
                       .entropy_bound = 0.1f,
                       .stability_threshold = 1,
                       .confidence_threshold = 0.005f};
    if (has(file, "diffusion.eb_max_steps"))
        DG_TRY(dg_file_get_i32(file, "diffusion.eb_max_steps", 1, 100000, &s->max_denoising_steps, error));
    if (has(file, "diffusion.eb_t_min"))
        DG_TRY(dg_file_get_f32(file, "diffusion.eb_t_min", 1e-6f, 1e6f, &s->t_min, error));
    if (has(file, "diffusion.eb_t_max"))
        DG_TRY(dg_file_get_f32(file, "diffusion.eb_t_max", s->t_min, 1e6f, &s->t_max, error));
    if (has(file, "diffusion.eb_entropy_bound"))
        DG_TRY(dg_file_get_f32(file, "diffusion.eb_entropy_bound", 1e-12f, 1e12f, &s->entropy_bound, error));
    if (has(file, "diffusion.eb_stability_threshold"))
        DG_TRY(dg_file_get_i32(file, "diffusion.eb_stability_threshold", 0, 64, &s->stability_threshold, error));
    if (has(file, "diffusion.eb_confidence_threshold"))
        DG_TRY(
            dg_file_get_f32(file, "diffusion.eb_confidence_threshold", 1e-12f, 1e12f, &s->confidence_threshold, error));
    return DG_OK;
}

static dg_status add_end_token(const dg_file *file, dg_model *m, int64_t token, dg_error *error) {
    const int32_t capacity = (int32_t)(sizeof m->end_tokens / sizeof *m->end_tokens);
    if (token < 0 || token >= m->n_vocab)
        return dg_fail(error, DG_ERROR_MODEL_FILE, "%s: end token %lld is outside the vocabulary of %d",
                       dg_file_path(file), (long long)token, m->n_vocab);
    for (int32_t i = 0; i < m->n_end_tokens; i++)
        if (m->end_tokens[i] == token) return DG_OK;
    if (m->n_end_tokens == capacity)
        return dg_fail(error, DG_ERROR_MODEL_FILE, "%s: more than %d end tokens", dg_file_path(file), capacity);
    m->end_tokens[m->n_end_tokens++] = (int32_t)token;
    return DG_OK;
}

/* Published files name one end token, while the model ends a turn with others too: those are found by name. */
static dg_status read_end_tokens(const dg_file *file, dg_model *m, dg_error *error) {
    static const char *const ends_by_name[] = {"<turn|>", "<|tool_response>"};
    dg_value tokens, ids;
    int32_t token;
    if (has(file, "tokenizer.ggml.eos_token_id")) {
        DG_TRY(dg_file_get_i32(file, "tokenizer.ggml.eos_token_id", 0, ANY, &token, error));
        DG_TRY(add_end_token(file, m, token, error));
    }
    if (dg_file_find_key(file, "tokenizer.ggml.eos_token_ids", &ids)) {
        int32_t list[16];
        if (ids.n > 16)
            return dg_fail(error, DG_ERROR_MODEL_FILE, "%s: key tokenizer.ggml.eos_token_ids: %lld ids; at most 16",
                           dg_file_path(file), (long long)ids.n);
        DG_TRY(dg_file_get_i32s(file, "tokenizer.ggml.eos_token_ids", 0, ANY, list, ids.n, error));
        for (int64_t i = 0; i < ids.n; i++) DG_TRY(add_end_token(file, m, list[i], error));
        return DG_OK;
    }
    if (!has(file, "tokenizer.ggml.tokens")) return DG_OK;
    DG_TRY(dg_file_get_array(file, "tokenizer.ggml.tokens", DG_VALUE_STRING, &tokens, error));
    size_t offset = 0, n;
    const char *text;
    for (int64_t id = 0; dg_value_next_string(&tokens, &offset, &text, &n); id++)
        for (size_t i = 0; i < sizeof ends_by_name / sizeof *ends_by_name; i++)
            if (dg_string_equals(text, n, ends_by_name[i])) DG_TRY(add_end_token(file, m, id, error));
    return DG_OK;
}

/* Head sizes, windows and rotations, layer by layer. */
static dg_status read_layers(const dg_file *file, dg_model *m, dg_error *error) {
    dg_status status = DG_OK;
    int32_t head_dim, head_dim_swa, value_dim, value_dim_swa;
    float rope_base, rope_base_swa;
    const int32_t largest_head = 1 << 14;
    DG_TRY(dg_file_get_i32(file, KEY("attention.key_length"), 2, largest_head, &head_dim, error));
    DG_TRY(dg_file_get_i32(file, KEY("attention.value_length"), head_dim, head_dim, &value_dim, error));
    DG_TRY(dg_file_get_i32(file, KEY("attention.key_length_swa"), 2, largest_head, &head_dim_swa, error));
    DG_TRY(dg_file_get_i32(file, KEY("attention.value_length_swa"), head_dim_swa, head_dim_swa, &value_dim_swa, error));
    DG_TRY(dg_file_get_f32(file, KEY("rope.freq_base"), 1, 1e12f, &rope_base, error));
    DG_TRY(dg_file_get_f32(file, KEY("rope.freq_base_swa"), 1, 1e12f, &rope_base_swa, error));
    if (head_dim % 2 != 0 || head_dim_swa % 2 != 0)
        return dg_fail(error, DG_ERROR_MODEL_FILE, "%s: head sizes %d and %d; expected even numbers",
                       dg_file_path(file), head_dim, head_dim_swa);

    bool *sliding = calloc((size_t)m->n_layers, sizeof *sliding);
    int32_t *n_kv_heads = calloc((size_t)m->n_layers, sizeof *n_kv_heads);
    if (sliding == NULL || n_kv_heads == NULL)
        status = dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory for %d layers", m->n_layers);
    if (status == DG_OK)
        status = dg_file_get_bools(file, KEY("attention.sliding_window_pattern"), sliding, m->n_layers, error);
    if (status == DG_OK)
        status = dg_file_get_i32s(file, KEY("attention.head_count_kv"), 1, m->n_heads, n_kv_heads, m->n_layers, error);
    for (int32_t i = 0; i < m->n_layers && status == DG_OK; i++) {
        if (m->n_heads % n_kv_heads[i] != 0)
            status = dg_fail(error, DG_ERROR_MODEL_FILE, "%s: layer %d: %d heads over %d KV heads do not divide",
                             dg_file_path(file), i, m->n_heads, n_kv_heads[i]);
        m->layers[i].sliding = sliding[i];
        m->layers[i].n_kv_heads = n_kv_heads[i];
        m->layers[i].head_dim = sliding[i] ? head_dim_swa : head_dim;
        m->layers[i].rope_base = sliding[i] ? rope_base_swa : rope_base;
        m->layers[i].n_rot = m->layers[i].head_dim; /* in full layers until rope_freqs is read */
    }
    free(sliding);
    free(n_kv_heads);
    return status;
}

/* ---- Tensors ------------------------------------------------------------------------------------------------- */

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
    const void **bound; /* (n_tensors) data of the tensors that have found their place */
    int64_t n_bound;
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
    b->bound[b->n_bound++] = info->data;
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
    *weight = (dg_weight){.data = info.data,
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
    const slot slots[] = {
        {"token_embd", MATRIX, m->n_vocab, m->n_embd, &m->token_embd, false},
        {"output_norm", VECTOR, m->n_embd, 1, &m->output_norm, false},
        {"self_cond_pre_norm", VECTOR, m->n_embd, 1, &m->self_conditioning.norm, false},
        {"self_cond_gate", MATRIX, m->n_ff, m->n_embd, &m->self_conditioning.gate, false},
        {"self_cond_up", MATRIX, m->n_ff, m->n_embd, &m->self_conditioning.up, false},
        {"self_cond_down", MATRIX, m->n_embd, m->n_ff, &m->self_conditioning.down, false},
    };
    return bind_slots(b, "", slots, COUNT(slots));
}

static dg_status bind_layer(binder *b, int32_t index) {
    dg_model *m = b->model;
    dg_layer *l = &m->layers[index];
    const int64_t embd = m->n_embd, ff = m->n_ff, ff_expert = m->n_ff_expert, n_experts = m->n_experts;
    const int64_t q_dim = (int64_t)m->n_heads * l->head_dim, kv_dim = (int64_t)l->n_kv_heads * l->head_dim;
    const float *encoder_scalar = NULL, *decoder_scalar = NULL;
    char prefix[32];
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
        {"enc_layer_output_scale", VECTOR, 1, 1, &encoder_scalar, false},
    };
    DG_TRY(bind_slots(b, prefix, slots, COUNT(slots)));
    l->decoder_scalar = *decoder_scalar;
    l->encoder_scalar = *encoder_scalar;
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
    for (int64_t i = 0; i < n && b->n_bound < n; i++) {
        dg_tensor_info info;
        bool known = false;
        dg_file_tensor(b->file, i, &info);
        for (int64_t j = 0; j < b->n_bound && !known; j++) known = b->bound[j] == info.data;
        if (!known)
            return dg_fail(
                b->error, DG_ERROR_MODEL_FILE,
                "%s: tensor %s has no place in this architecture: the file is newer than this engine, or not "
                "what it says",
                dg_file_path(b->file), info.name);
    }
    return DG_OK;
}

static dg_status bind_tensors(binder *b) {
    DG_TRY(bind_globals(b));
    for (int32_t i = 0; i < b->model->n_layers; i++) DG_TRY(bind_layer(b, i));
    DG_TRY(bind_rope_freqs(b));
    return check_nothing_is_left(b);
}

/* ---- All of it ----------------------------------------------------------------------------------------------- */

/* The vocabulary's size stands in no key: it is the embedding's number of rows. */
static dg_status read_n_vocab(const dg_file *file, dg_model *m, dg_error *error) {
    dg_tensor_info info;
    dg_value tokens;
    if (!dg_file_find_tensor(file, "token_embd.weight", &info))
        return dg_fail(error, DG_ERROR_MODEL_FILE, "%s: tensor token_embd.weight is missing", dg_file_path(file));
    if (info.shape[0] < 2 || info.shape[0] > 1 << 28)
        return dg_fail(error, DG_ERROR_MODEL_FILE, "%s: a vocabulary of %lld tokens; expected 2 to %d",
                       dg_file_path(file), (long long)info.shape[0], 1 << 28);
    m->n_vocab = (int32_t)info.shape[0];
    if (has(file, "tokenizer.ggml.tokens")) {
        DG_TRY(dg_file_get_array(file, "tokenizer.ggml.tokens", DG_VALUE_STRING, &tokens, error));
        if (tokens.n != m->n_vocab)
            return dg_fail(error, DG_ERROR_MODEL_FILE,
                           "%s: %lld tokens in the tokenizer, but %d rows in "
                           "token_embd.weight",
                           dg_file_path(file), (long long)tokens.n, m->n_vocab);
    }
    return DG_OK;
}

static dg_status read_model(dg_file *file, dg_model *m, dg_error *error) {
    DG_TRY(check_architecture(file, error));
    DG_TRY(check_unsupported(file, error));
    DG_TRY(read_sizes(file, m, error));
    DG_TRY(read_n_vocab(file, m, error));
    DG_TRY(read_sampling(file, &m->sampling, error));
    DG_TRY(read_end_tokens(file, m, error));
    m->layers = calloc((size_t)m->n_layers, sizeof *m->layers);
    binder b = {.file = file, .model = m, .error = error};
    b.bound = calloc((size_t)dg_file_n_tensors(file), sizeof *b.bound);
    dg_status status = DG_OK;
    if (m->layers == NULL || b.bound == NULL)
        status = dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory for %d layers", m->n_layers);
    if (status == DG_OK) status = read_layers(file, m, error);
    if (status == DG_OK) status = bind_tensors(&b);
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
