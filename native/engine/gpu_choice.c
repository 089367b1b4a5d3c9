#define _GNU_SOURCE /* strcasestr, strncasecmp */
#include "engine/gpu_choice.h"

#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/error.h"

#define LONGEST 96 /* of one name */

static bool given(const char *text) { return text != NULL && text[0] != '\0'; }

/* Copies what stands before the next comma, without spaces around it. False at the end. */
static bool next_item(const char **text, char item[LONGEST]) {
    if (*text == NULL) return false;
    const char *comma = strchr(*text, ','), *begin = *text;
    const char *end = comma != NULL ? comma : begin + strlen(begin);
    while (begin < end && isspace((unsigned char)*begin)) begin++;
    while (end > begin && isspace((unsigned char)end[-1])) end--;
    snprintf(item, LONGEST, "%.*s", (int)(end - begin), begin);
    *text = comma != NULL ? comma + 1 : NULL;
    return true;
}

/* "0: NVIDIA GeForce RTX 4090, 1: …" */
static void list(const dg_gpu_info *found, int32_t n_found, char *text, size_t size) {
    size_t length = 0;
    text[0] = '\0';
    for (int32_t i = 0; i < n_found && length < size; i++)
        length += (size_t)snprintf(text + length, size - length, "%s%d: %s", i > 0 ? ", " : "", found[i].number,
                                   found[i].name);
}

static bool is_number(const char *name) { return name[strspn(name, "0123456789")] == '\0' && name[0] != '\0'; }

/* Whether `name` stands for the GPU: its number, also as llama.cpp writes it ("CUDA1"), the beginning of its uuid, or a
 * part of its name. */
static bool stands_for(const char *name, const dg_gpu_info *gpu) {
    const char *number = strncasecmp(name, "cuda", 4) == 0 ? name + 4 : name;
    if (is_number(number)) return strtol(number, NULL, 10) == gpu->number;
    if (strncasecmp(name, "GPU-", 4) == 0) return strncasecmp(name, gpu->uuid, strlen(name)) == 0;
    return strcasestr(gpu->name, name) != NULL;
}

static dg_status find(const dg_gpu_info *found, int32_t n_found, const char *name, const dg_gpu_info **gpu,
                      dg_error *error) {
    char known[512];
    int32_t n = 0;
    list(found, n_found, known, sizeof known);
    for (int32_t i = 0; i < n_found && name[0] != '\0'; i++) {
        if (!stands_for(name, &found[i])) continue;
        *gpu = &found[i];
        n++;
    }
    if (n == 0)
        return dg_fail(error, DG_ERROR_ARGUMENT,
                       "device \"%s\" is none of the GPUs here (%s): give a number, a uuid or a part of the name", name,
                       known);
    if (n > 1)
        return dg_fail(error, DG_ERROR_ARGUMENT, "device \"%s\" stands for %d GPUs (%s): give a number or a uuid", name,
                       n, known);
    if ((*gpu)->obstacle[0] != '\0')
        return dg_fail(error, DG_ERROR_BACKEND, "device \"%s\" cannot be used: %s", name, (*gpu)->obstacle);
    return DG_OK;
}

static dg_status take_named(const dg_gpu_info *found, int32_t n_found, const char *names, dg_gpu_choice *choice,
                            dg_error *error) {
    char name[LONGEST];
    while (next_item(&names, name)) {
        const dg_gpu_info *gpu = NULL;
        DG_TRY(find(found, n_found, name, &gpu, error));
        for (int32_t i = 0; i < choice->n; i++)
            if (choice->gpus[i] == gpu) return dg_fail(error, DG_ERROR_ARGUMENT, "device \"%s\" is named twice", name);
        choice->gpus[choice->n++] = gpu; /* none twice, so no more than were found */
    }
    return DG_OK;
}

/* In the order in which CUDA counts them, or by what is free, the most first. */
static void take_usable(const dg_gpu_info *found, int32_t n_found, bool by_memory, dg_gpu_choice *choice) {
    for (int32_t i = 0; i < n_found; i++) {
        if (found[i].obstacle[0] != '\0') continue;
        int32_t at = choice->n++;
        for (; by_memory && at > 0 && choice->gpus[at - 1]->free_bytes < found[i].free_bytes; at--)
            choice->gpus[at] = choice->gpus[at - 1];
        choice->gpus[at] = &found[i];
    }
}

/* A GPU whose proportion is 0 is left out. */
static dg_status read_split(const char *text, dg_gpu_choice *choice, dg_error *error) {
    const char *rest = text;
    char item[LONGEST];
    float proportions[DG_MAX_GPUS] = {0};
    int32_t n = 0, n_left = 0;
    while (next_item(&rest, item)) {
        char *end;
        const double proportion = strtod(item, &end);
        if (end == item || *end != '\0' || !isfinite(proportion) || proportion < 0)
            return dg_fail(error, DG_ERROR_ARGUMENT,
                           "tensor split \"%s\": expected numbers that are not negative, separated by commas, such as "
                           "\"3,1\", or \"auto\"",
                           text);
        if (n == choice->n)
            return dg_fail(error, DG_ERROR_ARGUMENT, "tensor split \"%s\" is for more GPUs than the %d that there are",
                           text, choice->n);
        proportions[n++] = (float)proportion;
    }
    for (int32_t i = 0; i < n; i++) {
        if (!(proportions[i] > 0)) continue;
        choice->gpus[n_left] = choice->gpus[i];
        choice->proportions[n_left++] = proportions[i];
    }
    choice->n = n_left;
    if (n_left == 0)
        return dg_fail(error, DG_ERROR_ARGUMENT,
                       "tensor split \"%s\" leaves all GPUs out; for the CPU, use the backend \"cpu\"", text);
    return DG_OK;
}

dg_status dg_choose_gpus(const dg_gpu_info *found, int32_t n_found, const char *device, const char *tensor_split,
                         dg_gpu_choice *choice, dg_error *error) {
    const bool automatic = !given(tensor_split) || strcmp(tensor_split, "auto") == 0;
    *choice = (dg_gpu_choice){.all = given(tensor_split)};
    if (given(device))
        DG_TRY(take_named(found, n_found, device, choice, error));
    else
        take_usable(found, n_found, automatic, choice);
    if (choice->n == 0)
        return dg_fail(error, DG_ERROR_BACKEND, "%s", n_found > 0 ? found[0].obstacle : "no GPU: none found");
    return automatic ? DG_OK : read_split(tensor_split, choice, error);
}
