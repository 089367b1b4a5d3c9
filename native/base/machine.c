#define _GNU_SOURCE /* sched_getaffinity */
#include "base/machine.h"

#include <inttypes.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_PATH 4096
#define NO_LIMIT UINT64_MAX
#define GROUPS "/proc/self/cgroup"
#define GROUPS_ROOT "/sys/fs/cgroup"
#define DEVICES "/sys/devices"

static uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* ---- Control groups ------------------------------------------------------------------------------------------ */

/* Reads up to two numbers from a file of one line; returns how many there are. "max" and −1 are none. */
static int read_numbers(const char *folder, const char *name, uint64_t numbers[2]) {
    char path[MAX_PATH];
    if (snprintf(path, sizeof path, "%s/%s", folder, name) >= (int)sizeof path) return 0;
    FILE *file = fopen(path, "r");
    if (file == NULL) return 0;
    int n = fscanf(file, "%" SCNu64 " %" SCNu64, &numbers[0], &numbers[1]);
    fclose(file);
    if (n > 0 && (int64_t)numbers[0] < 0) n = 0; /* scanf takes −1 for the largest number */
    return n < 0 ? 0 : n;
}

typedef uint64_t (*read_limit)(const char *folder);

/* Version 2: "200000 100000", or "max 100000". Version 1 has a file for each number. */
static uint64_t read_cpus(const char *folder) {
    uint64_t quota[2], period[2];
    int n = read_numbers(folder, "cpu.max", quota);
    if (n == 0 && read_numbers(folder, "cpu.cfs_quota_us", quota) > 0) {
        n = 1 + (read_numbers(folder, "cpu.cfs_period_us", period) > 0);
        quota[1] = period[0];
    }
    return n == 2 && quota[1] > 0 && quota[0] < NO_LIMIT / 1000 ? quota[0] * 1000 / quota[1] : NO_LIMIT;
}

static uint64_t read_memory(const char *folder) {
    uint64_t numbers[2];
    if (read_numbers(folder, "memory.max", numbers) > 0) return numbers[0];
    if (read_numbers(folder, "memory.limit_in_bytes", numbers) > 0) return numbers[0];
    return NO_LIMIT;
}

/* The smallest limit of the group `group` and of those above it, which bind as well. In a container the path may not
 * lead anywhere, and the mount's root is the container's own group: it is always asked. */
static uint64_t limit_of_group(const char *mount, const char *group, read_limit read) {
    char folder[MAX_PATH];
    const size_t n_mount = strlen(mount);
    if (snprintf(folder, sizeof folder, "%s%s", mount, group) >= (int)sizeof folder) return read(mount);
    uint64_t limit = NO_LIMIT;
    for (;;) {
        limit = smaller(limit, read(folder));
        char *slash = strrchr(folder, '/');
        if (slash == NULL || slash < folder + n_mount) return limit;
        *slash = '\0';
    }
}

/* Lines of `groups` are number:controllers:path; the controllers are empty in version 2, and name the folder where they
 * are mounted in version 1 ("cpu,cpuacct", with links from "cpu"). */
static uint64_t limit_of(const char *groups, const char *root, const char *controller, read_limit read) {
    char line[MAX_PATH], mount[MAX_PATH];
    uint64_t limit = NO_LIMIT;
    FILE *file = fopen(groups, "r");
    if (file == NULL) return NO_LIMIT;
    while (fgets(line, sizeof line, file) != NULL) {
        line[strcspn(line, "\n")] = '\0';
        char *names = strchr(line, ':'), *path = names != NULL ? strchr(names + 1, ':') : NULL;
        if (path == NULL) continue;
        *path++ = '\0';
        names++;
        if (*names == '\0') {
            limit = smaller(limit, limit_of_group(root, path, read));
            continue;
        }
        for (char *rest = NULL, *name = strtok_r(names, ",", &rest); name != NULL; name = strtok_r(NULL, ",", &rest))
            if (strcmp(name, controller) == 0 &&
                snprintf(mount, sizeof mount, "%s/%s", root, controller) < (int)sizeof mount)
                limit = smaller(limit, limit_of_group(mount, path, read));
    }
    fclose(file);
    return limit;
}

uint64_t dg_cgroup_cpus(const char *groups, const char *root) { return limit_of(groups, root, "cpu", read_cpus); }

uint64_t dg_cgroup_memory(const char *groups, const char *root) {
    return limit_of(groups, root, "memory", read_memory);
}

/* ---- Processors ---------------------------------------------------------------------------------------------- */

/* A number in the file `name` of logical processor `cpu`; −1 where there is none. */
static int read_processor(const char *devices, int cpu, const char *name) {
    char path[MAX_PATH];
    if (snprintf(path, sizeof path, "%s/system/cpu/cpu%d/%s", devices, cpu, name) >= (int)sizeof path) return -1;
    FILE *file = fopen(path, "r");
    int value = -1;
    if (file == NULL) return -1;
    if (fscanf(file, "%d", &value) != 1) value = -1;
    fclose(file);
    return value;
}

/* Whether a list such as "0-7,12" names `cpu`; false where there is no such file. */
static bool list_names(const char *devices, const char *name, int cpu) {
    char path[MAX_PATH];
    bool found = false;
    if (snprintf(path, sizeof path, "%s/%s", devices, name) >= (int)sizeof path) return false;
    FILE *file = fopen(path, "r");
    if (file == NULL) return false;
    for (int first, last, next; !found && fscanf(file, "%d", &first) == 1;) {
        last = first;
        next = fgetc(file);
        if (next == '-') {
            if (fscanf(file, "%d", &last) != 1) break;
            next = fgetc(file);
        }
        found = first <= cpu && cpu <= last;
        if (next != ',') break;
    }
    fclose(file);
    return found;
}

/* What the processor does in a second, against others of the machine. ARM systems say it, newer Linux for x86, too;
 * before, Intel's efficiency cores are those of a device of their own. */
static int capacity_of(const char *devices, int cpu) {
    enum { FULL = 1024, EFFICIENT = 512 };
    const int capacity = read_processor(devices, cpu, "cpu_capacity");
    if (capacity > 0) return capacity;
    return list_names(devices, "cpu_atom/cpus", cpu) ? EFFICIENT : FULL;
}

int dg_performance_cores(const char *devices, const int *cpus, int n_cpus) {
    int largest = 0, n = 0;
    int *seen = malloc(((size_t)n_cpus + 1) * sizeof *seen);
    if (seen == NULL) return 0;
    for (int i = 0; i < n_cpus; i++) {
        const int capacity = capacity_of(devices, cpus[i]);
        if (capacity > largest) largest = capacity;
    }
    for (int i = 0; i < n_cpus; i++) {
        if (capacity_of(devices, cpus[i]) * 4 < largest * 3) continue;
        const int core = read_processor(devices, cpus[i], "topology/core_id");
        const int package = read_processor(devices, cpus[i], "topology/physical_package_id");
        const int key = core < 0 ? -1 - cpus[i] : (package < 0 ? 0 : package) * 65536 + core;
        int k = 0;
        while (k < n && seen[k] != key) k++;
        if (k == n) seen[n++] = key;
    }
    free(seen);
    return n;
}

int dg_logical_processors(void) {
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
#endif
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online < 1 ? 1 : (int)online;
}

int dg_physical_cores(void) {
    int n = 0;
#if defined(__linux__)
    cpu_set_t allowed;
    int cpus[CPU_SETSIZE], n_cpus = 0;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0)
        for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
            if (CPU_ISSET(cpu, &allowed)) cpus[n_cpus++] = cpu;
    n = dg_performance_cores(DEVICES, cpus, n_cpus);
#endif
    if (n == 0) n = dg_logical_processors();
    uint64_t granted = dg_cgroup_cpus(GROUPS, GROUPS_ROOT); /* in thousandths */
    if (granted < (uint64_t)n * 1000) n = (int)((granted + 999) / 1000);
    return n < 1 ? 1 : n;
}

/* ---- Memory -------------------------------------------------------------------------------------------------- */

uint64_t dg_available_memory(void) {
    uint64_t available = NO_LIMIT, kilobytes;
    char line[128];
    FILE *file = fopen("/proc/meminfo", "r");
    while (file != NULL && fgets(line, sizeof line, file) != NULL)
        if (sscanf(line, "MemAvailable: %" SCNu64, &kilobytes) == 1) available = kilobytes * 1024;
    if (file != NULL) fclose(file);
    return smaller(available, dg_cgroup_memory(GROUPS, GROUPS_ROOT));
}
