/* What this process may use of the machine: cores and memory, within the limits that the system sets it. */
#ifndef DG_MACHINE_H
#define DG_MACHINE_H

#include <stdint.h>

/* Threads for work that keeps a core busy, at least 1: the physical performance cores of this process's affinity mask,
 * and no more than the processor time that its control groups grant (a quota of 1.5 is two). */
int dg_physical_cores(void);

/* Physical cores among the logical processors cpus (n_cpus) that reach at least three quarters of the capacity of the
 * fastest of them: hyper-threads share a core's multipliers, and efficiency cores would hold the others up. `devices`
 * is a folder such as /sys/devices. 0 for no processors. */
int dg_performance_cores(const char *devices, const int *cpus, int n_cpus);

/* Logical processors in the affinity mask, at least 1: with more threads than these, spinning takes time from a thread
 * that has work. */
int dg_logical_processors(void);

/* Bytes of memory that can be had without swapping, cached files included; UINT64_MAX where nobody says. */
uint64_t dg_available_memory(void);

/* The smallest limit that a control group or one above it sets, for `groups`, a file such as /proc/self/cgroup, and
 * `root`, where control groups are mounted. The first: processors, in thousandths. Both: UINT64_MAX where there is no
 * limit. */
uint64_t dg_cgroup_cpus(const char *groups, const char *root);
uint64_t dg_cgroup_memory(const char *groups, const char *root);

#endif
