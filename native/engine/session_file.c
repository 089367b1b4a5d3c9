/* Saving and loading a session's cache.
 *
 *   offset  size
 *        0     8  "dgemmaKV"
 *        8     4  version, 1
 *       12     4  type of the keys          16     4  type of the values
 *       20     4  n_past                    24     4  first position held of the sliding layers
 *       28     4  number of layers
 *       32     8  fingerprint of the model
 *       40     8  checksum of everything before and behind it
 *       48        token ids (n_past), int32
 *                 layer by layer: keys, then values, head by head, position by position
 *
 * Little endian. The cache's own rows are written as they are, so a file is read by the version that wrote it and by
 * machines of the same byte order. */
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/error.h"
#include "base/guard.h"
#include "base/replacement.h"
#include "engine/session.h"
#include "gguf/gguf.h"
#include "quant/quant.h"

#define VERSION 1

typedef struct header {
    char magic[8];
    int32_t version, type_k, type_v, n_past, first_held, n_layers;
    uint64_t fingerprint, checksum;
} header;

/* FNV-1a: guards against damage, not against forgery. */
static uint64_t hash(uint64_t state, const void *data, size_t n) {
    const unsigned char *bytes = data;
    for (size_t i = 0; i < n; i++) state = (state ^ bytes[i]) * 0x100000001B3u;
    return state;
}
#define HASH_SEED 0xCBF29CE484222325u

/* The checksum begins with the header's own fields. */
static uint64_t hash_header(const header *h) { return hash(HASH_SEED, h, offsetof(header, checksum)); }

/* Tells models apart: names, types and sizes of all tensors, and some bytes of each. */
static uint64_t fingerprint(const dg_model *model) {
    uint64_t state = HASH_SEED;
    const dg_guard *outer = dg_guard_enter(dg_file_guard(model->file));
    for (int64_t i = 0; i < dg_file_n_tensors(model->file); i++) {
        dg_tensor_info info;
        dg_file_tensor(model->file, i, &info);
        state = hash(state, info.name, strlen(info.name));
        state = hash(state, &info.type, sizeof info.type);
        state = hash(state, info.shape, sizeof info.shape);
        state = hash(state, info.data, info.n_bytes < 64 ? info.n_bytes : 64);
    }
    dg_guard_leave(outer);
    return state;
}

/* One end of the transfer: a file, the checksum so far, and one row of memory between device and file. */
typedef struct transfer {
    FILE *file;
    const char *path;
    enum { SAVING, CHECKING, LOADING } purpose; /* checking reads as loading does, and leaves the session alone */
    int32_t n_past, first_held;
    uint64_t checksum;
    void *row;
    dg_error *error;
} transfer;

static dg_status move_bytes(transfer *t, void *data, size_t n) {
    size_t done = t->purpose == SAVING ? fwrite(data, 1, n, t->file) : fread(data, 1, n, t->file);
    if (done != n) {
        if (t->purpose == SAVING)
            return dg_fail(t->error, DG_ERROR_IO, "%s: cannot write: %s", t->path, strerror(errno));
        if (ferror(t->file)) return dg_fail(t->error, DG_ERROR_IO, "%s: cannot read: %s", t->path, strerror(errno));
        return dg_fail(t->error, DG_ERROR_MODEL_FILE, "%s: the file ends too early: it is damaged", t->path);
    }
    t->checksum = hash(t->checksum, data, n);
    return DG_OK;
}

static dg_status move_tokens(transfer *t, dg_kv_cache *cache) {
    if (t->purpose != CHECKING) return move_bytes(t, cache->tokens, (size_t)t->n_past * sizeof *cache->tokens);
    for (int32_t i = 0; i < t->n_past; i++) {
        int32_t token;
        DG_TRY(move_bytes(t, &token, sizeof token));
        if (token < 0 || token >= cache->model->n_vocab)
            return dg_fail(t->error, DG_ERROR_MODEL_FILE, "%s: token %d is outside the vocabulary: it is damaged",
                           t->path, token);
    }
    return DG_OK;
}

/* Whether a row of a cache type has no NaN and no infinity: numbers whose exponent is all ones. Of Q8_0 only the scales
 * can be such, with which its blocks begin. */
static bool is_finite(const void *row, uint64_t n_bytes, int32_t type) {
    const unsigned char *bytes = row;
    const uint64_t stride = (uint64_t)dg_type_traits_of(type)->block_bytes;
    const uint32_t exponent = type == DG_TYPE_F32 ? 0x7F800000u : type == DG_TYPE_BF16 ? 0x7F80u : 0x7C00u;
    for (uint64_t at = 0; at < n_bytes; at += stride) {
        uint32_t number = 0; /* little endian, as the cache is */
        memcpy(&number, bytes + at, type == DG_TYPE_F32 ? 4 : 2);
        if ((number & exponent) == exponent) return false;
    }
    return true;
}

/* Keys or values of one layer: positions first … n_past − 1 of every head. */
static dg_status move_rows(transfer *t, const dg_kv_cache *cache, const dg_kv *kv, void *memory, int32_t n_kv_heads,
                           int32_t first, int32_t type, uint64_t row_bytes) {
    for (int32_t head = 0; head < n_kv_heads && row_bytes > 0; head++)
        for (int32_t position = first; position < t->n_past; position++) {
            int64_t slot = (int64_t)head * kv->capacity + position % kv->capacity;
            char *place = (char *)memory + (uint64_t)slot * row_bytes;
            if (t->purpose == SAVING) cache->ops->download(cache->backend, t->row, place, row_bytes);
            DG_TRY(move_bytes(t, t->row, row_bytes));
            if (t->purpose == LOADING) cache->ops->upload(cache->backend, place, t->row, row_bytes);
            if (t->purpose == CHECKING && !is_finite(t->row, row_bytes, type))
                return dg_fail(t->error, DG_ERROR_MODEL_FILE,
                               "%s: keys or values of position %d are not finite: it is damaged", t->path, position);
        }
    return DG_OK;
}

static dg_status move_cache(transfer *t, dg_kv_cache *cache) {
    DG_TRY(move_tokens(t, cache));
    for (int32_t i = 0; i < cache->model->n_layers; i++) {
        const dg_layer *layer = &cache->model->layers[i];
        const dg_kv *kv = &cache->layers[i];
        const int32_t first = layer->sliding ? t->first_held : 0, n_heads = layer->n_kv_heads;
        DG_TRY(move_rows(t, cache, kv, kv->k, n_heads, first, cache->type_k, dg_kv_k_row_bytes(cache, layer)));
        DG_TRY(move_rows(t, cache, kv, kv->v, n_heads, first, cache->type_v, dg_kv_v_row_bytes(cache, layer)));
    }
    return DG_OK;
}

static void *allocate_row(const dg_kv_cache *cache) {
    uint64_t largest = 1;
    for (int32_t i = 0; i < cache->model->n_layers; i++) {
        uint64_t k = dg_kv_k_row_bytes(cache, &cache->model->layers[i]);
        uint64_t v = dg_kv_v_row_bytes(cache, &cache->model->layers[i]);
        if (k > largest) largest = k;
        if (v > largest) largest = v;
    }
    return malloc(largest);
}

static header describe(const dg_session *session) {
    const dg_kv_cache *cache = &session->cache;
    header h = {.version = VERSION,
                .type_k = cache->type_k,
                .type_v = cache->type_v,
                .n_past = cache->n_past,
                .first_held = cache->first_held,
                .n_layers = cache->model->n_layers,
                .fingerprint = fingerprint(cache->model)};
    memcpy(h.magic, "dgemmaKV", 8);
    return h;
}

/* Header, cache, and the header again when the checksum is known. */
static dg_status write_all(dg_session *session, header *h, transfer *t) {
    if (fwrite(h, sizeof *h, 1, t->file) != 1)
        return dg_fail(t->error, DG_ERROR_IO, "%s: cannot write: %s", t->path, strerror(errno));
    DG_TRY(move_cache(t, &session->cache));
    DG_TRY(session->cache.ops->finish(session->backend, t->error));
    h->checksum = t->checksum;
    if (fseek(t->file, 0, SEEK_SET) != 0 || fwrite(h, sizeof *h, 1, t->file) != 1)
        return dg_fail(t->error, DG_ERROR_IO, "%s: cannot write: %s", t->path, strerror(errno));
    return DG_OK;
}

dg_status dg_session_save(dg_session *session, const char *path, dg_error *error) {
    dg_replacement file;
    if (path == NULL) return dg_fail(error, DG_ERROR_ARGUMENT, "no path to save the session to");
    DG_TRY(dg_file_check(session->model->file, error)); /* the fingerprint reads some of its weights */
    header h = describe(session);
    DG_TRY(dg_file_check(session->model->file, error));
    transfer t = {.path = path,
                  .purpose = SAVING,
                  .n_past = h.n_past,
                  .first_held = h.first_held,
                  .checksum = hash_header(&h),
                  .row = allocate_row(&session->cache),
                  .error = error};
    if (t.row == NULL) return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory to save a session");
    dg_status status = dg_replacement_begin(path, &file, error);
    if (status == DG_OK) {
        t.file = file.file;
        status = write_all(session, &h, &t);
        if (status == DG_OK)
            status = dg_replacement_commit(&file, error);
        else
            dg_replacement_abandon(&file);
    }
    free(t.row);
    return status;
}

static dg_status check_header(const dg_session *session, const header *h, const char *path, dg_error *error) {
    const header own = describe(session);
    DG_TRY(dg_file_check(session->model->file, error));
    const int32_t window = session->model->sliding_window, room = session->params.n_ctx - session->model->canvas_length;
    if (memcmp(h->magic, own.magic, sizeof own.magic) != 0 || h->version != own.version)
        return dg_fail(error, DG_ERROR_MODEL_FILE, "%s is not a session file of this version", path);
    if (h->fingerprint != own.fingerprint || h->n_layers != own.n_layers)
        return dg_fail(error, DG_ERROR_MODEL_FILE, "%s was saved with another model", path);
    if (h->type_k != own.type_k || h->type_v != own.type_v)
        return dg_fail(error, DG_ERROR_MODEL_FILE,
                       "%s has cache types %d and %d, this session %d and %d: create the "
                       "session with the same",
                       path, h->type_k, h->type_v, own.type_k, own.type_v);
    if (h->n_past < 0 || h->first_held < 0 || h->first_held > h->n_past)
        return dg_fail(error, DG_ERROR_MODEL_FILE, "%s: %d tokens, held from %d on: it is damaged", path, h->n_past,
                       h->first_held);
    if (h->n_past > room)
        return dg_fail(error, DG_ERROR_CONTEXT_LENGTH,
                       "%s holds %d tokens, and this session has room for %d: raise "
                       "n_ctx",
                       path, h->n_past, room);
    if (h->first_held > 0 && h->first_held > h->n_past - (window - 1))
        return dg_fail(error, DG_ERROR_MODEL_FILE, "%s holds less than a window of %d: it is damaged", path, window);
    return DG_OK;
}

/* A session with smaller batches has smaller rings: it holds what fits. */
static int32_t first_that_fits(const dg_kv_cache *cache, int32_t first_held, int32_t n_past) {
    for (int32_t i = 0; i < cache->model->n_layers; i++)
        if (cache->model->layers[i].sliding && n_past - first_held > cache->layers[i].capacity)
            first_held = (int32_t)(n_past - cache->layers[i].capacity);
    return first_held;
}

/* Opens a file for reading, and nothing else: opening a pipe would wait for its other end. */
static dg_status open_regular(const char *path, FILE **file, dg_error *error) {
    struct stat info;
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) return dg_fail(error, DG_ERROR_IO, "%s: cannot read: %s", path, strerror(errno));
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        close(fd);
        return dg_fail(error, DG_ERROR_IO, "%s: not a file; expected one that a session was saved to", path);
    }
    *file = fdopen(fd, "rb");
    if (*file == NULL) {
        close(fd);
        return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory to read %s", path);
    }
    return DG_OK;
}

/* Reads everything behind the header once, so that a damaged file is refused before the session is touched. */
static dg_status check_content(transfer t, const header *h, dg_kv_cache *cache) {
    t.purpose = CHECKING;
    DG_TRY(move_cache(&t, cache));
    if (fgetc(t.file) != EOF)
        return dg_fail(t.error, DG_ERROR_MODEL_FILE, "%s is longer than its cache: it is damaged", t.path);
    if (t.checksum != h->checksum)
        return dg_fail(t.error, DG_ERROR_MODEL_FILE, "%s: the checksum does not fit: it is damaged", t.path);
    if (fseek(t.file, (long)sizeof *h, SEEK_SET) != 0)
        return dg_fail(t.error, DG_ERROR_IO, "%s: cannot read: %s", t.path, strerror(errno));
    return DG_OK;
}

/* The file is whole. The session's own cache is being replaced: should reading fail now, it is left empty. Rows older
 * than the rings reach land in slots that newer rows then take, since they come in order of position. */
static dg_status replace_cache(dg_session *session, transfer *t) {
    dg_kv_cache *cache = &session->cache;
    session->denoiser.active = false;
    cache->n_past = cache->first_held = 0;
    DG_TRY(move_cache(t, cache));
    DG_TRY(cache->ops->finish(session->backend, t->error));
    cache->n_past = t->n_past;
    cache->first_held = first_that_fits(cache, t->first_held, t->n_past);
    return DG_OK;
}

dg_status dg_session_load(dg_session *session, const char *path, dg_error *error) {
    dg_kv_cache *cache = &session->cache;
    header h;
    if (path == NULL) return dg_fail(error, DG_ERROR_ARGUMENT, "no path to load a session from");
    DG_TRY(dg_file_check(session->model->file, error));
    transfer t = {.path = path, .purpose = LOADING, .row = allocate_row(cache), .error = error};
    if (t.row == NULL) return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory to load a session");
    dg_status status = open_regular(path, &t.file, error);
    if (status != DG_OK) goto out;
    if (fread(&h, sizeof h, 1, t.file) != 1) {
        status = dg_fail(error, DG_ERROR_MODEL_FILE, "%s is not a session file", path);
        goto out;
    }
    status = check_header(session, &h, path, error);
    if (status != DG_OK) goto out;
    t.n_past = h.n_past;
    t.first_held = h.first_held;
    t.checksum = hash_header(&h);
    status = check_content(t, &h, cache);
    if (status == DG_OK) status = replace_cache(session, &t);
out:
    if (t.file != NULL) fclose(t.file);
    free(t.row);
    return status;
}
