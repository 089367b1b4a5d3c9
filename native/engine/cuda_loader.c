#define _GNU_SOURCE /* dladdr */

#include "engine/cuda_loader.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(_WIN32)

const dg_backend_ops *dg_cuda_load(char *note, size_t note_size) {
    snprintf(note, note_size, "the CUDA backend is not built on this system");
    return NULL;
}

#else

#include <dlfcn.h>

#define LIBRARY "libdgemma_cuda.so"

typedef const dg_backend_ops *(*find_backend)(const char *version, size_t model_bytes, size_t ops_bytes, char *note,
                                              size_t note_size);

/* Opens the library; NULL, and a reason in `note`, where there is none. */
static void *open_library(char *note, size_t note_size) {
    char path[4096];
    const char *given = getenv("DGEMMA_CUDA_LIBRARY");
    if (given != NULL && given[0] != '\0') {
        snprintf(path, sizeof path, "%s", given);
    } else {
        Dl_info self;
        if (dladdr((const void *)(uintptr_t)open_library, &self) == 0 || self.dli_fname == NULL) {
            snprintf(note, note_size, "this build has no CUDA backend");
            return NULL;
        }
        const char *slash = strrchr(self.dli_fname, '/');
        int folder = slash != NULL ? (int)(slash - self.dli_fname) + 1 : 0;
        snprintf(path, sizeof path, "%.*s%s", folder, self.dli_fname, LIBRARY);
        FILE *file = fopen(path, "rb");
        if (file == NULL) {
            /* the wheel dgemma-cuda is installed as a neighbour */
            snprintf(path, sizeof path, "%.*s../dgemma_cuda/%s", folder, self.dli_fname, LIBRARY);
            file = fopen(path, "rb");
        }
        if (file == NULL) {
            snprintf(note, note_size, "this build has no CUDA backend (there is no %s beside it)", LIBRARY);
            return NULL;
        }
        fclose(file);
    }
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        const char *reason = dlerror();
        snprintf(note, note_size, "the CUDA backend cannot be loaded: %s", reason != NULL ? reason : path);
    }
    return library;
}

const dg_backend_ops *dg_cuda_load(char *note, size_t note_size) {
    void *library = open_library(note, note_size);
    if (library == NULL) return NULL;
    void *symbol = dlsym(library, "dg_cuda_library");
    if (symbol == NULL) {
        snprintf(note, note_size,
                 dlsym(library, "dg_cuda_backend") != NULL
                     ? "%s is of an older dgemma than the engine, %s: install both from one release"
                     : "%s is not the CUDA backend of dgemma %s",
                 LIBRARY, dg_version());
        return NULL;
    }
    find_backend find;
    memcpy(&find, &symbol, sizeof find); /* C has no cast between the two kinds of pointer */
    return find(dg_version(), sizeof(dg_model), sizeof(dg_backend_ops), note, note_size);
}

#endif
