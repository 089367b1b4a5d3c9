#include "model/hparams.h"

#include <stdlib.h>

#include "base/error.h"
#include "model/keys.h"

#define ARCHITECTURE "diffusion-gemma"
#define KEY(name) ARCHITECTURE "." name
#define ANY INT32_MAX /* of a hyperparameter: whatever fits */

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

/* One integer; or, as writers of other models do, one for each layer, all the same. */
static dg_status read_for_all_layers(const dg_file *file, const char *key, int32_t max, int32_t n_layers,
                                     int32_t *number, dg_error *error) {
    dg_value value;
    if (!dg_file_find_key(file, key, &value) || value.type != DG_VALUE_ARRAY || value.n != n_layers)
        return dg_file_get_i32(file, key, 1, max, number, error);
    int32_t *numbers = calloc((size_t)n_layers, sizeof *numbers);
    if (numbers == NULL) return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory for %d layers", n_layers);
    dg_status status = dg_file_get_i32s(file, key, 1, max, numbers, n_layers, error);
    for (int32_t i = 1; i < n_layers && status == DG_OK; i++)
        if (numbers[i] != numbers[0])
            status = dg_fail(error, DG_ERROR_MODEL_FILE,
                             "%s: key \"%s\" is %d in layer 0 and %d in layer %d; this engine runs models in which it "
                             "is the same everywhere",
                             dg_file_path(file), key, numbers[0], numbers[i], i);
    *number = numbers[0];
    free(numbers);
    return status;
}

static dg_status read_sizes(const dg_file *file, dg_model *m, dg_error *error) {
    DG_TRY(dg_file_get_i32(file, KEY("block_count"), 1, 4096, &m->n_layers, error));
    DG_TRY(dg_file_get_i32(file, KEY("context_length"), 2, ANY, &m->context_length, error));
    DG_TRY(dg_file_get_i32(file, KEY("embedding_length"), 1, 1 << 20, &m->n_embd, error));
    DG_TRY(read_for_all_layers(file, KEY("feed_forward_length"), 1 << 20, m->n_layers, &m->n_ff, error));
    DG_TRY(read_for_all_layers(file, KEY("attention.head_count"), 1 << 14, m->n_layers, &m->n_heads, error));
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

/* The sampler's settings: optional, since published files lack them; these are the released model's. */
static dg_status read_sampling(const dg_file *file, dg_sampling *s, dg_error *error) {
    *s = (dg_sampling){.max_denoising_steps = 48,
                       .t_min = 0.4f,
                       .t_max = 0.8f,
                       .entropy_bound = 0.1f,
                       .stability_threshold = 1,
                       .confidence_threshold = 0.005f};
    if (has(file, "diffusion.eb_max_steps"))
        DG_TRY(
            dg_file_get_i32(file, "diffusion.eb_max_steps", 1, DG_MAX_DENOISING_STEPS, &s->max_denoising_steps, error));
    if (has(file, "diffusion.eb_t_min"))
        DG_TRY(dg_file_get_f32(file, "diffusion.eb_t_min", 1e-6f, 1e6f, &s->t_min, error));
    if (has(file, "diffusion.eb_t_max"))
        DG_TRY(dg_file_get_f32(file, "diffusion.eb_t_max", s->t_min, 1e6f, &s->t_max, error));
    if (has(file, "diffusion.eb_entropy_bound"))
        DG_TRY(dg_file_get_f32(file, "diffusion.eb_entropy_bound", 1e-12f, 1e12f, &s->entropy_bound, error));
    if (has(file, "diffusion.eb_stability_threshold"))
        DG_TRY(dg_file_get_i32(file, "diffusion.eb_stability_threshold", 0, DG_MAX_STABILITY_THRESHOLD,
                               &s->stability_threshold, error));
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

/* Which layers are sliding: a bool each; one for all of them; or the period n of a pattern whose every n-th layer is
 * full (0: none is). */
static dg_status read_pattern(const dg_file *file, int32_t n_layers, bool *sliding, dg_error *error) {
    const char *key = KEY("attention.sliding_window_pattern");
    dg_value value;
    int64_t ignored;
    int32_t period;
    if (!dg_file_find_key(file, key, &value) || value.type == DG_VALUE_ARRAY || !dg_value_integer(&value, 0, &ignored))
        return dg_file_get_bools(file, key, sliding, n_layers, error);
    DG_TRY(dg_file_get_i32(file, key, 0, ANY, &period, error));
    for (int32_t i = 0; i < n_layers; i++) sliding[i] = period == 0 || i % period < period - 1;
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
    if (status == DG_OK) status = read_pattern(file, m->n_layers, sliding, error);
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

dg_status dg_hparams_read(const dg_file *file, dg_model *m, dg_error *error) {
    DG_TRY(check_architecture(file, error));
    DG_TRY(check_unsupported(file, error));
    DG_TRY(dg_keys_check(file, error));
    DG_TRY(read_sizes(file, m, error));
    DG_TRY(read_n_vocab(file, m, error));
    DG_TRY(read_sampling(file, &m->sampling, error));
    DG_TRY(read_end_tokens(file, m, error));
    m->layers = calloc((size_t)m->n_layers, sizeof *m->layers);
    if (m->layers == NULL) return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory for %d layers", m->n_layers);
    return read_layers(file, m, error);
}
