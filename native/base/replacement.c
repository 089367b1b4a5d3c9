#define _DEFAULT_SOURCE /* flock, lstat, fsync */
#include "base/replacement.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/error.h"

/* A hidden name is ".", the target's name as far as it fits, ".", 16 hexadecimal digits, ".tmp". */
#define DIGITS 16
#define SUFFIX ".tmp"
#define NAME_MAX_BYTES 255
#define MAX_KEPT (NAME_MAX_BYTES - 2 - DIGITS - (int)(sizeof SUFFIX - 1))
#define ATTEMPTS 64

static const char *name_in(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash != NULL ? slash + 1 : path;
}

/* Bytes of the target's name that its hidden names begin with; no character is cut in two. */
static int kept_bytes(const char *name) {
    size_t n = strlen(name);
    if (n > MAX_KEPT)
        for (n = MAX_KEPT; n > 0 && ((unsigned char)name[n] & 0xC0) == 0x80;) n--;
    return (int)n;
}

static bool is_hidden_name_of(const char *name, const char *target, int kept) {
    const size_t n = strlen(name);
    if (n != (size_t)kept + 2 + DIGITS + sizeof SUFFIX - 1) return false;
    return name[0] == '.' && memcmp(name + 1, target, (size_t)kept) == 0 && name[kept + 1] == '.' &&
           strspn(name + kept + 2, "0123456789abcdef") == DIGITS && strcmp(name + n - sizeof SUFFIX + 1, SUFFIX) == 0;
}

/* Whoever writes holds a lock on the file, which ends with its process: one without a lock is nobody's. */
static void remove_if_stale(int folder, const char *name) {
    struct stat opened, named;
    const int fd = openat(folder, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) return;
    if (flock(fd, LOCK_EX | LOCK_NB) == 0 && fstat(fd, &opened) == 0 && S_ISREG(opened.st_mode) &&
        fstatat(folder, name, &named, AT_SYMLINK_NOFOLLOW) == 0 && named.st_ino == opened.st_ino &&
        named.st_dev == opened.st_dev)
        unlinkat(folder, name, 0);
    close(fd);
}

static void remove_stale(const char *path, char *folder_path) {
    const char *name = name_in(path);
    const int kept = kept_bytes(name);
    snprintf(folder_path, strlen(path) + 2, "%.*s", name == path ? 1 : (int)(name - path), name == path ? "." : path);
    DIR *folder = opendir(folder_path);
    if (folder == NULL) return;
    for (struct dirent *entry; (entry = readdir(folder)) != NULL;)
        if (is_hidden_name_of(entry->d_name, name, kept)) remove_if_stale(dirfd(folder), entry->d_name);
    closedir(folder);
}

/* A name that nobody else has: the file system says so. The digits only make a second attempt unlikely. */
static uint64_t digits_of(int attempt, const void *unique) {
    struct timespec time;
    clock_gettime(CLOCK_REALTIME, &time);
    uint64_t state = (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
    state = (state ^ (uint64_t)getpid() << 40 ^ (uint64_t)(uintptr_t)unique ^ (uint64_t)attempt) * 0x9E3779B97F4A7C15u;
    return state ^ state >> 29;
}

/* Opens and locks the hidden file; −1 with errno otherwise. */
static int open_fresh(dg_replacement *r, size_t size) {
    const char *name = name_in(r->path);
    for (int attempt = 0; attempt < ATTEMPTS; attempt++) {
        struct stat info;
        snprintf(r->beside, size, "%.*s.%.*s.%016llx" SUFFIX, (int)(name - r->path), r->path, kept_bytes(name), name,
                 (unsigned long long)digits_of(attempt, r));
        const int fd = open(r->beside, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0666);
        if (fd < 0 && errno == EEXIST) continue;
        if (fd < 0) return -1;
        /* Before it was locked, another writer may have taken it for a leftover. A file system without locks has no
         * writers that look for them either. */
        (void)flock(fd, LOCK_EX | LOCK_NB);
        const bool known = fstat(fd, &info) == 0;
        if (known && info.st_nlink > 0) return fd;
        if (!known) unlink(r->beside);
        close(fd);
        if (!known) return -1;
    }
    errno = EEXIST;
    return -1;
}

static dg_status check_target(const char *path, dg_error *error) {
    struct stat info;
    if (*name_in(path) == '\0') return dg_fail(error, DG_ERROR_IO, "%s: not the name of a file", path);
    if (lstat(path, &info) != 0 || S_ISREG(info.st_mode) || S_ISLNK(info.st_mode)) return DG_OK;
    return dg_fail(error, DG_ERROR_IO, "%s: %s, which is not written over; expected a file or a new name", path,
                   S_ISDIR(info.st_mode) ? "a folder" : "a device or pipe");
}

static void forget(dg_replacement *r) {
    free(r->path);
    free(r->beside);
    *r = (dg_replacement){0};
}

dg_status dg_replacement_begin(const char *path, dg_replacement *r, dg_error *error) {
    *r = (dg_replacement){0};
    DG_TRY(check_target(path, error));
    const size_t size = strlen(path) + 2 + DIGITS + sizeof SUFFIX + 1;
    r->path = strdup(path);
    r->beside = malloc(size);
    if (r->path == NULL || r->beside == NULL) {
        forget(r);
        return dg_fail(error, DG_ERROR_OUT_OF_MEMORY, "no memory to write %s", path);
    }
    remove_stale(path, r->beside);
    const int fd = open_fresh(r, size);
    if (fd >= 0) r->file = fdopen(fd, "w+b");
    if (r->file != NULL) return DG_OK;
    const int reason = errno;
    if (fd >= 0) {
        unlink(r->beside);
        close(fd);
    }
    forget(r);
    return dg_fail(error, DG_ERROR_IO, "%s: cannot write: %s", path, strerror(reason));
}

dg_status dg_replacement_commit(dg_replacement *r, dg_error *error) {
    /* Renamed while it is open, and so locked. */
    if (fflush(r->file) == 0 && fsync(fileno(r->file)) == 0 && rename(r->beside, r->path) == 0) {
        fclose(r->file); /* has nothing left to write */
        forget(r);
        return DG_OK;
    }
    dg_fail(error, DG_ERROR_IO, "%s: cannot write: %s", r->path, strerror(errno));
    dg_replacement_abandon(r);
    return DG_ERROR_IO;
}

void dg_replacement_abandon(dg_replacement *r) {
    if (r->file != NULL) {
        unlink(r->beside);
        fclose(r->file);
    }
    forget(r);
}
