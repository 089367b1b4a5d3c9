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
#include "engine/session.h"
#include "gguf/gguf.h"

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
    bool saving;
    uint64_t checksum;
    void *row;
    dg_error *error;
} transfer;

static dg_status move_bytes(transfer *t, void *data, size_t n) {
    size_t done = t->saving ? fwrite(data, 1, n, t->file) : fread(data, 1, n, t->file);
    if (done != n) {
        if (t->saving) return dg_fail(t->error, DG_ERROR_IO, "%s: cannot write: %s", t->path, strerror(errno));
        return dg_fail(t->error, DG_ERROR_MODEL_FILE, "%s: the file ends too early: it is damaged", t->path);
    }
    t->checksum = hash(t->checksum, data, n);
    return DG_OK;
}

/* Keys or values of one layer: positions first … n_past − 1 of every head. */
static dg_status move_rows(transfer *t, const dg_kv_cache *cache, const dg_kv *kv, void *memory, int32_t n_kv_heads,
                           int32_t first, uint64_t row_bytes) {
    for (int32_t head = 0; head < n_kv_heads && row_bytes > 0; head++)
        for (int32_t position = first; position < cache->n_past; position++) {
            int64_t slot = (int64_t)head * kv->capacity + position % kv->capacity;
            char *place = (char *)memory + (uint64_t)slot * row_bytes;
            if (t->saving) cache->ops->download(cache->backend, t->row, place, row_bytes);
            DG_TRY(move_bytes(t, t->row, row_bytes));
            if (!t->saving) cache->ops->upload(cache->backend, place, t->row, row_bytes);
        }
    return DG_OK;
}

static dg_status move_cache(transfer *t, dg_kv_cache *cache) {
    DG_TRY(move_bytes(t, cache->tokens, (size_t)cache->n_past * sizeof *cache->tokens));
    for (int32_t i = 0; i < cache->model->n_layers; i++) {
        const dg_layer *layer = &cache->model->layers[i];
        const dg_kv *kv = &cache->layers[i];
        int32_t first = layer->sliding ? cache->first_held : 0;
        DG_TRY(move_rows(t, cache, kv, kv->k, layer->n_kv_heads, first, dg_kv_k_row_bytes(cache, layer)));
        DG_TRY(move_rows(t, cache, kv, kv->v, layer->n_kv_heads, first, dg_kv_v_row_bytes(cache, layer)));
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

dg_status dg_session_save(dg_session *session, const char *path, dg_error *error) {
    dg_status status = DG_OK;
    if (path == NULL) return dg_fail(error, DG_ERROR_ARGUMENT, "no path to save the session to");
    DG_TRY(dg_file_check(session->model->file, error)); /* the fingerprint reads some of its weights */
    header h = describe(session);
    DG_TRY(dg_file_check(session->model->file, error));
    size_t length = strlen(path) + 32;
    char *beside = malloc(length);
    transfer t = {.path = path,
                  .saving = true,
                  .checksum = hash_header(&h),
                  .row = allocate_row(&session->cache),
                  .error = error};
    if (beside == NULL || t.row == NULL) {
        status = dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory to save a session");
        goto out;
    }
    /* Written beside the target and renamed when whole, so that a failure leaves an older file as it was. */
    snprintf(beside, length, "%s.%ld.tmp", path, (long)getpid());
    t.file = fopen(beside, "wb");
    if (t.file == NULL) {
        status = dg_fail(error, DG_ERROR_IO, "%s: cannot write: %s", beside, strerror(errno));
        goto out;
    }
    if (fwrite(&h, sizeof h, 1, t.file) != 1)
        status = dg_fail(error, DG_ERROR_IO, "%s: cannot write: %s", path, strerror(errno));
    if (status == DG_OK) status = move_cache(&t, &session->cache);
    if (status == DG_OK) status = session->cache.ops->finish(session->backend, error);
    h.checksum = t.checksum;
    if (status == DG_OK && (fseek(t.file, 0, SEEK_SET) != 0 || fwrite(&h, sizeof h, 1, t.file) != 1 ||
                            fflush(t.file) != 0 || fsync(fileno(t.file)) != 0))
        status = dg_fail(error, DG_ERROR_IO, "%s: cannot write: %s", path, strerror(errno));
    if (fclose(t.file) != 0 && status == DG_OK)
        status = dg_fail(error, DG_ERROR_IO, "%s: cannot write: %s", path, strerror(errno));
    if (status == DG_OK && rename(beside, path) != 0)
        status = dg_fail(error, DG_ERROR_IO, "%s: cannot rename: %s", path, strerror(errno));
    if (status != DG_OK) remove(beside);
out:
    free(beside);
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

static dg_status read_tokens_in_range(const dg_session *session, const char *path, dg_error *error) {
    for (int32_t i = 0; i < session->cache.n_past; i++)
        if (session->cache.tokens[i] < 0 || session->cache.tokens[i] >= session->model->n_vocab)
            return dg_fail(error, DG_ERROR_MODEL_FILE, "%s: token %d is outside the vocabulary: it is damaged", path,
                           session->cache.tokens[i]);
    return DG_OK;
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
static dg_status check_content(const header *h, const char *path, FILE *file, dg_error *error) {
    enum { CHUNK = 1 << 16 };
    unsigned char *chunk = malloc(CHUNK);
    if (chunk == NULL) return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory to read %s", path);
    uint64_t state = hash_header(h);
    for (size_t n = CHUNK; n == CHUNK;) {
        n = fread(chunk, 1, CHUNK, file);
        state = hash(state, chunk, n);
    }
    free(chunk);
    if (state != h->checksum || ferror(file))
        return dg_fail(error, DG_ERROR_MODEL_FILE, "%s: the checksum does not fit: it is damaged", path);
    if (fseek(file, (long)sizeof *h, SEEK_SET) != 0)
        return dg_fail(error, DG_ERROR_IO, "%s: cannot read: %s", path, strerror(errno));
    return DG_OK;
}

dg_status dg_session_load(dg_session *session, const char *path, dg_error *error) {
    dg_kv_cache *cache = &session->cache;
    dg_status status = DG_OK;
    header h;
    if (path == NULL) return dg_fail(error, DG_ERROR_ARGUMENT, "no path to load a session from");
    DG_TRY(dg_file_check(session->model->file, error));
    transfer t = {.path = path, .saving = false, .row = allocate_row(cache), .error = error};
    if (t.row == NULL) return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory to load a session");
    status = open_regular(path, &t.file, error);
    if (status != DG_OK) goto out;
    if (fread(&h, sizeof h, 1, t.file) != 1) {
        status = dg_fail(error, DG_ERROR_MODEL_FILE, "%s is not a session file", path);
        goto out;
    }
    status = check_header(session, &h, path, error);
    if (status == DG_OK) status = check_content(&h, path, t.file, error);
    if (status != DG_OK) goto out;

    /* The file is whole. From here on the session's own cache is being replaced: should reading fail now, it is left
     * empty. Rows older than the rings reach land in slots that newer rows then take, since they come in order of
     * position. */
    session->denoiser.active = false;
    cache->n_past = h.n_past;
    cache->first_held = h.first_held;
    status = move_cache(&t, cache);
    if (status == DG_OK && fgetc(t.file) != EOF)
        status = dg_fail(error, DG_ERROR_MODEL_FILE, "%s is longer than its cache: it is damaged", path);
    if (status == DG_OK) status = read_tokens_in_range(session, path, error);
    if (status == DG_OK) status = cache->ops->finish(session->backend, error);
    cache->first_held = first_that_fits(cache, h.first_held, h.n_past);
    if (status != DG_OK) cache->n_past = cache->first_held = 0;
out:
    if (t.file != NULL) fclose(t.file);
    free(t.row);
    return status;
}
