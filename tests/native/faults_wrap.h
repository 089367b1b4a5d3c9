/* Calls that may fail, between the engine and the C library (linker option --wrap): in dgemma_faults and dgemma_shrink
 * every one of them is counted, and a chosen one fails. */
#ifndef DG_FAULTS_WRAP_H
#define DG_FAULTS_WRAP_H

#include <stdbool.h>

/* The n-th call from now on fails, as the C library documents its failure; 0: none does. */
void faults_arm(long n);
/* Whether one has failed since then. */
bool faults_hit(void);
/* Allocations that are not freed yet. */
long faults_live_allocations(void);
/* The file at `path` is cut to `n_bytes` after the n-th fstat from now on has looked at its size. */
void faults_cut_after_fstat(int n, const char *path, long n_bytes);
/* Whether that has happened. */
bool faults_cut(void);

#endif
