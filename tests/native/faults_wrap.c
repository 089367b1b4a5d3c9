#define _GNU_SOURCE
#include "faults_wrap.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static atomic_long left; /* calls up to and including the one that fails; 0: none does */
static atomic_bool hit;
static atomic_long live;
static atomic_int fstats_left;
static const char *cut_path;
static long cut_bytes;

void faults_arm(long n) {
    atomic_store(&hit, false);
    atomic_store(&left, n);
}
bool faults_hit(void) { return atomic_load(&hit); }
long faults_live_allocations(void) { return atomic_load(&live); }
void faults_cut_after_fstat(int n, const char *path, long n_bytes) {
    cut_path = path;
    cut_bytes = n_bytes;
    atomic_store(&fstats_left, n);
}
bool faults_cut(void) { return atomic_load(&fstats_left) == 0; }

/* Workers may call at the same moment: only one of them takes the last count. */
static bool fails(int number) {
    long before = atomic_load(&left);
    while (before > 0 && !atomic_compare_exchange_weak(&left, &before, before - 1)) {
    }
    if (before != 1) return false;
    atomic_store(&hit, true);
    errno = number;
    return true;
}

static void *counted(void *memory) {
    if (memory != NULL) atomic_fetch_add(&live, 1);
    return memory;
}

/* WRAP(result, name, (parameters), (arguments), number, failure) */
#define WRAP(type, name, parameters, arguments, number, failure)                                                       \
    type __real_##name parameters;                                                                                     \
    type __wrap_##name parameters;                                                                                     \
    type __wrap_##name parameters { return fails(number) ? (failure) : __real_##name arguments; }
#define WRAP_ALLOCATION(name, parameters, arguments)                                                                   \
    void *__real_##name parameters;                                                                                    \
    void *__wrap_##name parameters;                                                                                    \
    void *__wrap_##name parameters { return fails(ENOMEM) ? NULL : counted(__real_##name arguments); }

WRAP_ALLOCATION(malloc, (size_t n), (n))
WRAP_ALLOCATION(calloc, (size_t n, size_t size), (n, size))
WRAP_ALLOCATION(aligned_alloc, (size_t alignment, size_t n), (alignment, n))
WRAP(FILE *, fopen, (const char *path, const char *mode), (path, mode), EACCES, NULL)
WRAP(FILE *, fdopen, (int fd, const char *mode), (fd, mode), ENOMEM, NULL)
WRAP(size_t, fread, (void *data, size_t size, size_t n, FILE *file), (data, size, n, file), EIO, 0)
WRAP(size_t, fwrite, (const void *data, size_t size, size_t n, FILE *file), (data, size, n, file), ENOSPC, 0)
WRAP(int, fflush, (FILE * file), (file), ENOSPC, EOF)
WRAP(int, fseek, (FILE * file, long offset, int origin), (file, offset, origin), EIO, -1)
WRAP(ssize_t, pread, (int fd, void *data, size_t n, off_t offset), (fd, data, n, offset), EIO, -1)
WRAP(int, fsync, (int fd), (fd), EIO, -1)
WRAP(int, rename, (const char *from, const char *to), (from, to), EACCES, -1)
WRAP(void *, mmap, (void *at, size_t n, int protection, int flags, int fd, off_t offset),
     (at, n, protection, flags, fd, offset), ENOMEM, MAP_FAILED)

void *__real_realloc(void *memory, size_t n);
void *__wrap_realloc(void *memory, size_t n);
void *__wrap_realloc(void *memory, size_t n) {
    if (fails(ENOMEM)) return NULL;
    void *larger = __real_realloc(memory, n);
    return memory == NULL ? counted(larger) : larger;
}

char *__wrap_strdup(const char *text);
char *__wrap_strdup(const char *text) {
    char *copy = __wrap_malloc(strlen(text) + 1);
    return copy != NULL ? strcpy(copy, text) : NULL;
}

int __real_posix_memalign(void **memory, size_t alignment, size_t n);
int __wrap_posix_memalign(void **memory, size_t alignment, size_t n);
int __wrap_posix_memalign(void **memory, size_t alignment, size_t n) {
    if (fails(ENOMEM)) return ENOMEM;
    int number = __real_posix_memalign(memory, alignment, n);
    if (number == 0) counted(*memory);
    return number;
}

void __real_free(void *memory);
void __wrap_free(void *memory);
void __wrap_free(void *memory) {
    if (memory != NULL) atomic_fetch_sub(&live, 1);
    __real_free(memory);
}

int __real_fclose(FILE *file);
int __wrap_fclose(FILE *file);
int __wrap_fclose(FILE *file) { /* closes in any case, as the real one does */
    int status = __real_fclose(file);
    return fails(ENOSPC) ? EOF : status;
}

int __real_open(const char *path, int flags, ...);
int __wrap_open(const char *path, int flags, ...);
int __wrap_open(const char *path, int flags, ...) { /* the engine creates no file with it: no mode */
    return fails(EMFILE) ? -1 : __real_open(path, flags);
}

int __real_fstat(int fd, struct stat *status);
int __wrap_fstat(int fd, struct stat *status);
int __wrap_fstat(int fd, struct stat *status) {
    if (fails(EIO)) return -1;
    int result = __real_fstat(fd, status);
    if (atomic_load(&fstats_left) > 0 && atomic_fetch_sub(&fstats_left, 1) == 1 && truncate(cut_path, cut_bytes) != 0)
        abort();
    return result;
}

int __real_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *argument);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *argument);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *argument) {
    return fails(EAGAIN) ? EAGAIN : __real_pthread_create(thread, attributes, run, argument);
}
