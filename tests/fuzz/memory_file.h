/* A file that lies in memory, written anew for each input: on a disk most of the time would go into making files. */
#ifndef DG_FUZZ_MEMORY_FILE_H
#define DG_FUZZ_MEMORY_FILE_H

#include <fcntl.h>
#include <unistd.h>

#include "target.h"

typedef struct memory_file {
    int fd;
    char path[64];
} memory_file;

/* `ending` comes behind a name of this process's own: several may run at once. */
static inline memory_file memory_file_open(const char *ending) {
    memory_file file;
    const char *folder = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
    snprintf(file.path, sizeof file.path, "%s/fuzz-%ld%s", folder, (long)getpid(), ending);
    file.fd = open(file.path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    PROMISE(file.fd >= 0);
    return file;
}

static inline void memory_file_write(const memory_file *file, const void *bytes, size_t n) {
    PROMISE(ftruncate(file->fd, 0) == 0); /* nothing of the last one stays, nor its pages in a mapping */
    PROMISE(pwrite(file->fd, bytes, n, 0) == (ssize_t)n);
}

static inline void memory_file_remove(memory_file *file) {
    unlink(file->path);
    close(file->fd);
    file->fd = -1;
}

#endif
