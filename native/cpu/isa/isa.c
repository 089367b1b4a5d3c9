/* Which kernels this machine can run, asked of the processor at run time. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "cpu/kernels/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(DG_HAS_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

extern const dg_cpu_kernels dg_cpu_kernels_scalar;
#if defined(__x86_64__)
extern const dg_cpu_kernels dg_cpu_kernels_avx2, dg_cpu_kernels_avxvnni, dg_cpu_kernels_avx512, dg_cpu_kernels_amx;

/* Which registers the operating system saves: a processor may have instructions that the system does not support. */
static uint64_t saved_state(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

typedef struct features {
    bool avx2, avxvnni, avx512, amx;
} features;

/* Linux lets a process use the tile registers only after it has asked, once for all of its threads; the answer to a
 * second question is the same. It refuses where a thread's signal stack is too small to save them. */
static bool may_use_tiles(void) {
#if defined(DG_HAS_AMX)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
#else
    return false;
#endif
}

static features detect(void) {
    features found = {0};
    uint32_t a, b, c, d, a1 = 0, b1 = 0, c1 = 0, d1 = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return found;
    bool fma = (c & bit_FMA) != 0 && (c & bit_F16C) != 0 && (c & bit_AVX) != 0;
    uint64_t saved = saved_state();
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
    if (a >= 1) __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1);
    const uint64_t ymm = 0x06, zmm = 0xe6;
    const uint32_t avx512_b = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* F, DQ, BW, VL */
    const uint32_t avx512_c = 1u << 1 | 1u << 11;                        /* VBMI, VNNI */
    found.avx2 = fma && (saved & ymm) == ymm && (b & 1u << 5) != 0;
    found.avxvnni = found.avx2 && (a1 & 1u << 4) != 0;
    found.avx512 = found.avx2 && (saved & zmm) == zmm && (b & avx512_b) == avx512_b && (c & avx512_c) == avx512_c &&
                   (a1 & 1u << 5) != 0; /* BF16 */
    const uint64_t tile_state = 0x60000;
    const uint32_t tile_d = 1u << 22 | 1u << 24 | 1u << 25; /* BF16, tiles, INT8 */
    found.amx = found.avx512 && (saved & tile_state) == tile_state && (d & tile_d) == tile_d && may_use_tiles();
    return found;
}
#elif defined(__aarch64__)
extern const dg_cpu_kernels dg_cpu_kernels_neon, dg_cpu_kernels_dotprod, dg_cpu_kernels_i8mm;
#endif

#define MAX_SETS 5

/* Worst first; those that this machine cannot run are left out. Returns how many there are. */
static int available(const dg_cpu_kernels *sets[MAX_SETS]) {
    int n = 0;
    sets[n++] = &dg_cpu_kernels_scalar;
#if defined(__x86_64__)
    features found = detect();
    if (found.avx2) sets[n++] = &dg_cpu_kernels_avx2;
    if (found.avxvnni) sets[n++] = &dg_cpu_kernels_avxvnni;
    if (found.avx512) sets[n++] = &dg_cpu_kernels_avx512;
#if defined(DG_HAS_AMX)
    if (found.amx) sets[n++] = &dg_cpu_kernels_amx;
#endif
#elif defined(__aarch64__)
    bool dotprod = true, i8mm = false;
#if defined(__linux__)
    const unsigned long capabilities = getauxval(AT_HWCAP), more = getauxval(AT_HWCAP2);
    dotprod = (capabilities & 1ul << 20) != 0; /* HWCAP_ASIMDDP */
    i8mm = dotprod && (more & 1ul << 13) != 0; /* HWCAP2_I8MM */
#endif
    sets[n++] = &dg_cpu_kernels_neon;
    if (dotprod) sets[n++] = &dg_cpu_kernels_dotprod;
    if (i8mm) sets[n++] = &dg_cpu_kernels_i8mm;
#endif
    return n;
}

const dg_cpu_kernels *dg_cpu_kernels_choose(void) {
    const dg_cpu_kernels *sets[MAX_SETS];
    const char *cap = getenv("DGEMMA_ISA");
    const int n = available(sets);
    if (cap != NULL)
        for (int i = 0; i < n; i++)
            if (strcmp(cap, sets[i]->name) == 0) return sets[i];
    return sets[n - 1];
}
