/* Reads the input as a list of changes to the model that DGEMMA_FUZZ_MODEL names, writes the changed model with sizes
 * and offsets that are right, opens it, and where it is accepted encodes a prompt and denoises two steps.
 *
 * A mutation of the bytes of a GGUF file nearly always ends in the container's reader (fuzz_gguf). Here what is mutated
 * is the list: six bytes a change, so whatever libFuzzer makes of it is a file whose container is whole, and the keys,
 * the tensors' shapes and the values behind them are what is tried. */
#include <string.h>
#include <unistd.h>

#include "dgemma.h"
#include "target.h"

enum { MAX_KEYS = 96, MAX_TENSORS = 128, MAX_CHANGES = 24, CHANGE_BYTES = 6, ALIGNMENT = 32, MAX_FILE = 1 << 22 };

typedef struct entry {
    char name[96];
    dg_value value; /* `data` is this entry's own */
    uint8_t *data;
    bool dropped;
} entry;

typedef struct part {
    dg_tensor_info info; /* `name` is unused, `data` the base's */
    char name[96];
    bool dropped;
    uint32_t at[4]; /* places in its data that are changed, and what is put there */
    uint32_t bits[4];
    int n_changed;
} part;

static dg_file *base;
static entry keys[MAX_KEYS];
static part parts[MAX_TENSORS];
static int n_keys, n_parts;
static char path[64];
static uint8_t *image; /* (MAX_FILE) */
static size_t n_image;

static const uint64_t extremes[] = {0,         1,          2,          3,          7,          255,
                                    65536,     0x7fffffff, 0x80000000, 0xffffffff, 0x7f800000, 0xffc00000,
                                    INT64_MAX, UINT64_MAX, 0x3f800000, 64};

static void begin(void) {
    const char *name = getenv("DGEMMA_FUZZ_MODEL");
    dg_error error = {0};
    image = malloc(MAX_FILE);
    snprintf(path, sizeof path, "%s/fuzz-%ld.gguf", access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp",
             (long)getpid());
    if (image == NULL || name == NULL || dg_file_open(name, &base, &error) != DG_OK ||
        dg_file_n_keys(base) > MAX_KEYS || dg_file_n_tensors(base) > MAX_TENSORS) {
        fprintf(stderr, "DGEMMA_FUZZ_MODEL should name a small model: %s\n", error.message);
        exit(2);
    }
}

/* ---- The list of changes -------------------------------------------------------------------------------------- */

static void restore(void) {
    n_keys = (int)dg_file_n_keys(base);
    n_parts = (int)dg_file_n_tensors(base);
    for (int i = 0; i < n_keys; i++) {
        const char *name;
        keys[i].dropped = false;
        dg_file_key(base, i, &name, &keys[i].value);
        snprintf(keys[i].name, sizeof keys[i].name, "%s", name);
        keys[i].data = malloc(keys[i].value.n_bytes + 16);
        PROMISE(keys[i].data != NULL);
        memset(keys[i].data + keys[i].value.n_bytes, 0, 16);
        if (keys[i].value.n_bytes > 0) memcpy(keys[i].data, keys[i].value.data, keys[i].value.n_bytes);
    }
    for (int i = 0; i < n_parts; i++) {
        parts[i] = (part){0};
        dg_file_tensor(base, i, &parts[i].info);
        snprintf(parts[i].name, sizeof parts[i].name, "%s", parts[i].info.name);
    }
}

static size_t size_of(dg_value_type type) {
    static const uint8_t sizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    return sizes[type];
}

static void change_key(entry *k, int what, uint32_t argument) {
    const size_t size = size_of(k->value.element_type);
    switch (what) {
    case 0:
        k->dropped = true;
        break;
    case 1: /* another type of number, of the same bytes as far as they go */
        if (size == 0 || size_of((dg_value_type)(argument % 13)) == 0) break;
        if (k->value.type != DG_VALUE_ARRAY) k->value.type = (dg_value_type)(argument % 13);
        k->value.element_type = (dg_value_type)(argument % 13);
        k->value.n = k->value.type == DG_VALUE_ARRAY ? (int64_t)(k->value.n_bytes / size_of(k->value.element_type)) : 1;
        k->value.n_bytes = (size_t)k->value.n * size_of(k->value.element_type);
        break;
    case 2: /* an extreme number */
        if (size == 0 || k->value.n == 0) break;
        memcpy(k->data + size * ((argument >> 8) % (uint32_t)k->value.n), &extremes[argument % 16], size);
        break;
    case 3: /* any byte; of strings too */
        if (k->value.n_bytes > 0) k->data[(argument >> 8) % k->value.n_bytes] = (uint8_t)argument;
        break;
    case 4: /* fewer elements */
        if (size == 0 || k->value.type != DG_VALUE_ARRAY || k->value.n == 0) break;
        k->value.n = (int64_t)(argument % (uint32_t)k->value.n);
        k->value.n_bytes = (size_t)k->value.n * size;
        break;
    case 5: /* one value in place of many */
        if (size == 0) break;
        k->value.type = k->value.element_type;
        k->value.n = 1;
        k->value.n_bytes = size;
        break;
    case 6: /* another's name */
        snprintf(k->name, sizeof k->name, "%s", keys[argument % (uint32_t)n_keys].name);
        break;
    default: /* in place of many: a string */
        if (k->value.element_type != DG_VALUE_STRING || k->value.type == DG_VALUE_ARRAY) break;
        k->value.n_bytes = argument % (uint32_t)(k->value.n_bytes + 1);
    }
}

static void change_part(part *p, int what, uint32_t argument) {
    static const char *const names[] = {
        "self_cond_norm.weight", "blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight",     "blk.0.attn_v.weight",
        "blk.0.attn_q.scale",    "token_embd.scale",           "blk.0.ffn_gate_up_exps.scale", "output.weight"};
    const int dim = (int)(argument >> 8) % 4;
    switch (what) {
    case 0:
        p->dropped = true;
        break;
    case 1:
        p->info.shape[dim % p->info.n_dims] = (int64_t)(extremes[argument % 16] & 0xffff);
        break;
    case 2:
        p->info.n_dims = 1 + (int)(argument % 4);
        break;
    case 3:
        p->info.type = (int32_t)(argument % 41);
        break;
    case 4:
        snprintf(p->name, sizeof p->name, "%s", names[argument % 8]);
        break;
    case 5:
        snprintf(p->name, sizeof p->name, "%s", parts[argument % (uint32_t)n_parts].name);
        break;
    default: /* a number of its data */
        if (p->n_changed == 4) break;
        p->at[p->n_changed] = argument >> 4;
        p->bits[p->n_changed++] = (uint32_t)extremes[argument % 16];
    }
}

static void apply(const uint8_t *input, size_t n_bytes) {
    for (size_t i = 0; i < MAX_CHANGES && (i + 1) * CHANGE_BYTES <= n_bytes; i++) {
        const uint8_t *c = input + i * CHANGE_BYTES;
        const uint32_t argument = (uint32_t)c[3] | (uint32_t)c[4] << 8 | (uint32_t)c[5] << 16;
        if (c[0] % 2 == 0)
            change_key(&keys[c[1] % n_keys], c[2] % 8, argument);
        else
            change_part(&parts[c[1] % n_parts], c[2] % 8, argument);
    }
}

/* ---- The file ------------------------------------------------------------------------------------------------- */

static void put(const void *data, size_t n) {
    if (n_image + n > MAX_FILE) n = MAX_FILE - n_image;
    if (n > 0) memcpy(image + n_image, data, n);
    n_image += n;
}
static void put_u32(uint32_t number) { put(&number, 4); }
static void put_u64(uint64_t number) { put(&number, 8); }
static void put_name(const char *name) {
    put_u64(strlen(name));
    put(name, strlen(name));
}
static void align(void) {
    static const uint8_t zeros[ALIGNMENT];
    put(zeros, (ALIGNMENT - n_image % ALIGNMENT) % ALIGNMENT);
}

/* What its shape and type take; what it has where the type is none. */
static uint64_t bytes_of(const part *p) {
    dg_type_info type;
    if (dg_type_describe(p->info.type, &type, NULL) != DG_OK) return p->info.n_bytes;
    uint64_t n = 1;
    for (int i = 0; i < p->info.n_dims; i++) n *= (uint64_t)p->info.shape[i] & 0xffff;
    n = n / (uint64_t)type.block_size * (uint64_t)type.block_bytes;
    return n < MAX_FILE ? n : p->info.n_bytes;
}

static void put_data(const part *p) {
    const size_t begin = n_image, n = (size_t)bytes_of(p);
    for (size_t done = 0; done < n && n_image < MAX_FILE;) {
        const size_t piece = n - done < p->info.n_bytes ? n - done : (size_t)p->info.n_bytes;
        put(p->info.data, piece);
        done += piece;
    }
    for (int i = 0; i < p->n_changed && n_image - begin >= 4; i++)
        memcpy(image + begin + p->at[i] % ((n_image - begin) / 4) * 4, &p->bits[i], 4);
    align();
}

static void build(void) {
    uint64_t n_kept_keys = 0, n_kept_parts = 0, offset = 0;
    for (int i = 0; i < n_keys; i++) n_kept_keys += !keys[i].dropped;
    for (int i = 0; i < n_parts; i++) n_kept_parts += !parts[i].dropped;
    n_image = 0;
    put("GGUF", 4);
    put_u32(3);
    put_u64(n_kept_parts);
    put_u64(n_kept_keys);
    for (int i = 0; i < n_keys; i++) {
        const dg_value *v = &keys[i].value;
        if (keys[i].dropped) continue;
        put_name(keys[i].name);
        put_u32((uint32_t)v->type);
        if (v->type == DG_VALUE_ARRAY) put_u32((uint32_t)v->element_type);
        if (v->type == DG_VALUE_ARRAY) put_u64((uint64_t)v->n);
        if (v->type == DG_VALUE_STRING) put_u64(v->n_bytes);
        put(keys[i].data, v->n_bytes);
    }
    for (int i = 0; i < n_parts; i++) {
        if (parts[i].dropped) continue;
        put_name(parts[i].name);
        put_u32((uint32_t)parts[i].info.n_dims);
        for (int dim = parts[i].info.n_dims - 1; dim >= 0; dim--) put_u64((uint64_t)parts[i].info.shape[dim]);
        put_u32((uint32_t)parts[i].info.type);
        put_u64(offset);
        offset += (bytes_of(&parts[i]) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    }
    align();
    for (int i = 0; i < n_parts; i++)
        if (!parts[i].dropped) put_data(&parts[i]);
}

/* ---- What is asked of it -------------------------------------------------------------------------------------- */

static void use(dg_model *model) {
    dg_session_params params = dg_session_params_default();
    dg_model_info info = {.size = sizeof info};
    dg_session *session;
    dg_draft draft;
    dg_error error = {0};
    const int32_t prompt[] = {1, 0, 1, 1, 0};
    dg_model_describe(model, &info);
    PROMISE(info.n_layers >= 1 && info.n_vocab >= 2 && info.canvas_length < info.context_length);
    for (int i = 0; i < info.n_end_tokens; i++) PROMISE(info.end_tokens[i] >= 0 && info.end_tokens[i] < info.n_vocab);
    if (info.canvas_length > 512 || info.n_layers > 64) return;
    params.n_ctx =
        info.context_length < 2 * info.canvas_length + 64 ? info.context_length : 2 * info.canvas_length + 64;
    params.n_batch = 4;
    params.n_threads = 1;
    if (dg_session_create(model, &params, &session, &error) != DG_OK) {
        PROMISE(error.message[0] != '\0');
        return;
    }
    dg_status status = dg_session_prefill(session, prompt, 5, NULL, NULL, &error);
    if (status == DG_OK) status = dg_canvas_begin(session, NULL, &error);
    for (int i = 0; i < 2 && status == DG_OK; i++) {
        status = dg_canvas_step(session, &draft, &error);
        for (int32_t j = 0; status == DG_OK && j < info.canvas_length; j++)
            PROMISE(draft.tokens[j] >= 0 && draft.tokens[j] < info.n_vocab);
        if (status == DG_OK && draft.done) break;
    }
    PROMISE(status == DG_OK || error.message[0] != '\0');
    dg_session_free(session);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t n_bytes) {
    dg_error error = {0};
    dg_model *model;
    if (base == NULL) begin();
    restore();
    apply(input, n_bytes);
    build();
    for (int i = 0; i < n_keys; i++) free(keys[i].data);
    FILE *out = fopen(path, "wb");
    PROMISE(out != NULL && fwrite(image, 1, n_image, out) == n_image && fclose(out) == 0);
    dg_model_params params = dg_model_params_default();
    params.backend = DG_BACKEND_CPU;
    const dg_status status = dg_model_open(path, &params, &model, &error);
    PROMISE(dg_model_check(path, NULL) == status);
    PROMISE(n_bytes >= CHANGE_BYTES || status == DG_OK); /* nothing was changed */
    if (status == DG_OK) {
        use(model);
        dg_model_close(model);
    } else {
        PROMISE(model == NULL && error.status == status && error.message[0] != '\0');
        PROMISE(status == DG_ERROR_MODEL_FILE || status == DG_ERROR_OUT_OF_MEMORY);
    }
    unlink(path);
    return 0;
}
