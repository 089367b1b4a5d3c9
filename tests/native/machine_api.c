/* What native/base/machine.c reads of control groups and cores, for tests/engine/test_machine.py. */
#include "base/machine.h"

__attribute__((visibility("default"))) uint64_t test_cgroup_cpus(const char *groups, const char *root);
__attribute__((visibility("default"))) uint64_t test_cgroup_memory(const char *groups, const char *root);
__attribute__((visibility("default"))) int test_performance_cores(const char *devices, const int *cpus, int n_cpus);

uint64_t test_cgroup_cpus(const char *groups, const char *root) { return dg_cgroup_cpus(groups, root); }
uint64_t test_cgroup_memory(const char *groups, const char *root) { return dg_cgroup_memory(groups, root); }
int test_performance_cores(const char *devices, const int *cpus, int n_cpus) {
    return dg_performance_cores(devices, cpus, n_cpus);
}
