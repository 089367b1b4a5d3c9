#include "model/keys.h"

#include <string.h>

#include "base/error.h"

#define TOKENIZER "tokenizer.ggml."
#define TEMPLATE "tokenizer.chat_template" /* and others of this beginning, by name */

typedef enum kind { TEXT, BOOLEAN, TOKEN, INTEGER, TEXTS, INTEGERS, NUMBERS } kind;

static const struct {
    const char *name;
    kind kind;
    bool a_token_each; /* the list has an entry for every token */
} keys[] = {
    {"general.architecture", TEXT, false},
    {"general.name", TEXT, false},
    {"general.license", TEXT, false},
    {"quantize.imatrix.file", TEXT, false},
    {TOKENIZER "model", TEXT, false},
    {TOKENIZER "pre", TEXT, false},
    {TOKENIZER "tokens", TEXTS, true},
    {TOKENIZER "token_type", INTEGERS, true},
    {TOKENIZER "scores", NUMBERS, true},
    {TOKENIZER "merges", TEXTS, false},
    {TOKENIZER "bos_token_id", TOKEN, false},
    {TOKENIZER "eos_token_id", TOKEN, false},
    {TOKENIZER "unknown_token_id", INTEGER, false},
    {TOKENIZER "padding_token_id", INTEGER, false},
    {TOKENIZER "mask_token_id", INTEGER, false},
    {TOKENIZER "add_bos_token", BOOLEAN, false},
    {TOKENIZER "add_space_prefix", BOOLEAN, false},
};

static dg_status wrong(const dg_file *file, const char *key, const char *expected, const dg_value *found,
                       dg_error *error) {
    return dg_fail(error, DG_ERROR_MODEL_FILE,
                   "%s: key \"%s\": expected %s, found %s: the file is damaged, or from a converter with a fault: "
                   "convert the checkpoint anew",
                   dg_file_path(file), key, expected, dg_value_type_name(found));
}

static bool is_list_of(const dg_value *value, kind kind) {
    int64_t ignored;
    if (value->type != DG_VALUE_ARRAY) return false;
    if (kind == TEXTS) return value->element_type == DG_VALUE_STRING;
    if (value->n == 0 || dg_value_integer(value, 0, &ignored)) return true;
    return kind == NUMBERS && (value->element_type == DG_VALUE_FLOAT32 || value->element_type == DG_VALUE_FLOAT64);
}

static dg_status check_token(const dg_file *file, const char *key, const dg_value *value, int64_t n_tokens,
                             dg_error *error) {
    int64_t id;
    if (value->type == DG_VALUE_ARRAY || !dg_value_integer(value, 0, &id))
        return wrong(file, key, "an integer", value, error);
    if (n_tokens >= 0 && (id < 0 || id >= n_tokens))
        return dg_fail(error, DG_ERROR_MODEL_FILE, "%s: key \"%s\": token %lld is outside the vocabulary of %lld",
                       dg_file_path(file), key, (long long)id, (long long)n_tokens);
    return DG_OK;
}

/* n_tokens: −1 where the file has no tokens. */
static dg_status check(const dg_file *file, const char *key, kind kind, bool a_token_each, const dg_value *value,
                       int64_t n_tokens, dg_error *error) {
    static const char *const lists[] = {
        [TEXTS] = "an array of string", [INTEGERS] = "an array of integers", [NUMBERS] = "an array of numbers"};
    switch (kind) {
    case TEXT:
        return value->type == DG_VALUE_STRING ? DG_OK : wrong(file, key, "a string", value, error);
    case BOOLEAN:
        return value->type == DG_VALUE_BOOL ? DG_OK : wrong(file, key, "a bool", value, error);
    case TOKEN:
        return check_token(file, key, value, n_tokens, error);
    case INTEGER: /* of a token that nobody looks up */
        return check_token(file, key, value, -1, error);
    default:
        if (!is_list_of(value, kind)) return wrong(file, key, lists[kind], value, error);
        if (a_token_each && n_tokens >= 0 && value->n != n_tokens)
            return dg_fail(error, DG_ERROR_MODEL_FILE, "%s: key \"%s\" has %lld entries for %lld tokens",
                           dg_file_path(file), key, (long long)value->n, (long long)n_tokens);
        return DG_OK;
    }
}

dg_status dg_keys_check(const dg_file *file, dg_error *error) {
    dg_value value;
    int64_t n_tokens = -1;
    if (dg_file_find_key(file, TOKENIZER "tokens", &value)) n_tokens = value.n;
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        if (dg_file_find_key(file, keys[i].name, &value))
            DG_TRY(check(file, keys[i].name, keys[i].kind, keys[i].a_token_each, &value, n_tokens, error));
    for (int64_t i = 0; i < dg_file_n_keys(file); i++) {
        const char *name;
        dg_file_key(file, i, &name, &value);
        if (strncmp(name, TEMPLATE, sizeof TEMPLATE - 1) != 0) continue;
        const bool names = strcmp(name, TEMPLATE "s") == 0; /* tokenizer.chat_templates: which others there are */
        DG_TRY(check(file, name, names ? TEXTS : TEXT, false, &value, n_tokens, error));
    }
    return DG_OK;
}
