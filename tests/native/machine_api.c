/* What native/base/machine.c reads of control groups, for tests/engine/test_machine.py. */
#include "base/machine.h"

__attribute__((visibility("default"))) uint64_t test_cgroup_cpus(const char *groups, const char *root);
__attribute__((visibility("default"))) uint64_t test_cgroup_memory(const char *groups, const char *root);

uint64_t test_cgroup_cpus(const char *groups, const char *root) { return dg_cgroup_cpus(groups, root); }
uint64_t test_cgroup_memory(const char *groups, const char *root) { return dg_cgroup_memory(groups, root); }
