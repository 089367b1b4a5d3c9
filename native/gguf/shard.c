/* Opening one file, making its tensors available, and finding names in it. */
#include "gguf/shard.h"
#include "base/error.h"
#include "base/pages.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* One pread: long enough to be fast, short enough that progress is seen and cancelling is prompt. */
static const uint64_t READ_BYTES = (uint64_t)64 << 20;

static struct timespec time_of_change(const struct stat *status) {
#ifdef __APPLE__
    return status->st_mtimespec;
#else
    return status->st_mtim;
#endif
}

dg_status dg_shard_open(dg_shard *shard, const char *path, dg_error *error) {
    shard->path = strdup(path);
    if (shard->path == NULL) return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "%s: no memory to open it", path);
    /* Without O_NONBLOCK opening a FIFO would wait for a writer. */
    shard->fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (shard->fd < 0) return dg_fail(error, DG_ERROR_IO, "%s: cannot be opened: %s", path, strerror(errno));
    struct stat status;
    if (fstat(shard->fd, &status) != 0)
        return dg_fail(error, DG_ERROR_IO, "%s: cannot be read: %s", path, strerror(errno));
    if (S_ISDIR(status.st_mode))
        return dg_fail(error, DG_ERROR_MODEL_FILE,
                       "%s: a folder, expected a GGUF file; a checkpoint is converted with `dgemma convert`", path);
    if (!S_ISREG(status.st_mode))
        return dg_fail(error, DG_ERROR_MODEL_FILE, "%s: not a regular file: copy the model to one", path);
    shard->n_bytes = (uint64_t)status.st_size;
    shard->modified = time_of_change(&status);
    return dg_shard_parse(shard, error);
}

void dg_shard_close(dg_shard *shard) {
    if (shard->mapping != NULL) munmap(shard->mapping, (size_t)shard->n_bytes);
    if (shard->fd >= 0) close(shard->fd);
    free(shard->memory);
    free(shard->tensors);
    free(shard->keys_by_name);
    free(shard->keys);
    free(shard->metadata);
    free(shard->path);
}

dg_status dg_shard_pread(const dg_shard *shard, void *bytes, uint64_t n, uint64_t offset, dg_error *error) {
    while (n > 0) {
        size_t chunk = n > READ_BYTES ? (size_t)READ_BYTES : (size_t)n;
        ssize_t n_read = pread(shard->fd, bytes, chunk, (off_t)offset);
        if (n_read < 0 && errno == EINTR) continue;
        if (n_read < 0)
            return dg_fail(error, DG_ERROR_IO, "%s: byte %" PRIu64 ": cannot be read: %s", shard->path, offset,
                           strerror(errno));
        if (n_read == 0)
            return dg_fail(error, DG_ERROR_MODEL_FILE,
                           "%s: byte %" PRIu64 ": the file became shorter while it was read, it "
                           "had %" PRIu64 " bytes: wait until it is written completely",
                           shard->path, offset, shard->n_bytes);
        bytes = (uint8_t *)bytes + n_read;
        offset += (uint64_t)n_read;
        n -= (uint64_t)n_read;
    }
    return DG_OK;
}

dg_status dg_shard_map(dg_shard *shard, dg_error *error) {
    if (shard->n_tensors == 0) return DG_OK;
    if (shard->n_bytes > SIZE_MAX)
        return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "%s: %" PRIu64 " bytes do not fit this machine's address space",
                       shard->path, shard->n_bytes);
    void *mapping = mmap(NULL, (size_t)shard->n_bytes, PROT_READ, MAP_SHARED, shard->fd, 0);
    if (mapping == MAP_FAILED)
        return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "%s: cannot be mapped: %s; try without mmap", shard->path,
                       strerror(errno));
    dg_pages_advise(mapping, shard->n_bytes);
    shard->mapping = mapping;
    shard->data = (const uint8_t *)mapping + shard->data_offset;
    return dg_shard_check(shard, error);
}

dg_status dg_shard_read(dg_shard *shard, uint64_t *done, uint64_t total, dg_progress_callback progress, void *user,
                        dg_error *error) {
    if (shard->n_tensors == 0) return DG_OK;
    uint64_t n_bytes = shard->n_bytes - shard->data_offset;
    shard->memory = dg_pages_allocate(n_bytes);
    if (shard->memory == NULL)
        return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "%s: no memory for its %" PRIu64 " bytes of tensors: use mmap",
                       shard->path, n_bytes);
    for (uint64_t at = 0; at < n_bytes;) {
        uint64_t n = n_bytes - at < READ_BYTES ? n_bytes - at : READ_BYTES;
        DG_TRY(dg_shard_pread(shard, (uint8_t *)shard->memory + at, n, shard->data_offset + at, error));
        at += n;
        *done += n;
        if (progress != NULL && !progress((float)((double)*done / (double)total), user))
            return dg_fail(error, DG_ERROR_CANCELLED, "%s: reading was cancelled", shard->path);
    }
    shard->data = shard->memory;
    close(shard->fd);
    shard->fd = -1;
    return DG_OK;
}

bool dg_shard_mend(dg_shard *shard, const void *address) {
    char *start = shard->mapping;
    if (start == NULL || (const char *)address < start || (const char *)address >= start + shard->n_bytes) return false;
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), at = (size_t)((const char *)address - start) / page * page;
    if (mmap(start + at, (size_t)shard->n_bytes - at, PROT_READ, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) ==
        MAP_FAILED)
        return false;
    atomic_store(&shard->mended, true);
    return true;
}

dg_status dg_shard_check(const dg_shard *shard, dg_error *error) {
    if (shard->mapping == NULL) return DG_OK;
    if (atomic_load(&shard->mended))
        return dg_fail(
            error, DG_ERROR_MODEL_FILE,
            "%s: a part of the file could not be read while in use: it became shorter, or its disk failed: open "
            "the model again, and replace files by renaming, not by overwriting",
            shard->path);
    struct stat status;
    if (fstat(shard->fd, &status) != 0)
        return dg_fail(error, DG_ERROR_IO, "%s: cannot be read any more: %s", shard->path, strerror(errno));
    struct timespec modified = time_of_change(&status);
    if ((uint64_t)status.st_size == shard->n_bytes && modified.tv_sec == shard->modified.tv_sec &&
        modified.tv_nsec == shard->modified.tv_nsec)
        return DG_OK;
    return dg_fail(error, DG_ERROR_MODEL_FILE,
                   "%s: the file was changed while in use (%" PRIu64 " bytes when opened, now "
                   "%" PRIu64 "): open the model again, and replace files by renaming, not by overwriting",
                   shard->path, shard->n_bytes, (uint64_t)status.st_size);
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const dg_name *)a)->name, ((const dg_name *)b)->name);
}

const char *dg_names_sort(dg_name *names, int64_t n) {
    qsort(names, (size_t)n, sizeof *names, by_name);
    for (int64_t i = 1; i < n; i++)
        if (strcmp(names[i - 1].name, names[i].name) == 0) return names[i].name;
    return NULL;
}

const dg_name *dg_names_find(const dg_name *names, int64_t n, const char *name) {
    dg_name wanted = {name, 0};
    return n == 0 ? NULL : bsearch(&wanted, names, (size_t)n, sizeof *names, by_name);
}

void dg_shard_key_at(const dg_shard *shard, int64_t index, const char **name, dg_value *value) {
    const dg_shard_key *key = &shard->keys[index];
    if (name != NULL) *name = (const char *)shard->metadata + key->name;
    if (value != NULL)
        *value = (dg_value){key->type, key->element_type, key->n, shard->metadata + key->data, (size_t)key->n_bytes};
}

bool dg_shard_find_key(const dg_shard *shard, const char *name, dg_value *value) {
    const dg_name *found = dg_names_find(shard->keys_by_name, shard->n_keys, name);
    if (found != NULL) dg_shard_key_at(shard, found->index, NULL, value);
    return found != NULL;
}
