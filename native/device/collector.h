/* Sums of the squared activations that a weight's columns meet: what an importance matrix is made of.
 *
 * Owned by a session while it collects; a backend adds to it where an operation has the activations as floats. */
#ifndef DG_COLLECTOR_H
#define DG_COLLECTOR_H

#include "model/model.h"

typedef struct dg_squares {
    const char *name; /* of the tensor, in the file's memory */
    const dg_weight *weight;
    double *sums;    /* (n_matrices, n_cols) Σ x² */
    int64_t *counts; /* (n_matrices) rows x that were added */
} dg_squares;

typedef struct dg_collector dg_collector;

/* Room for every weight of `model`, all zero. */
dg_status dg_collector_create(const dg_model *model, dg_collector **collector, dg_error *error);
void dg_collector_free(dg_collector *collector);

/* The weights' sums, in the order of the file's tensors; `n` receives their number. */
const dg_squares *dg_collector_squares(const dg_collector *collector, int32_t *n);

/* Where the activations of `weight` are added up; NULL where collector is NULL. */
dg_squares *dg_collector_of(dg_collector *collector, const dg_weight *weight);

/* Adds columns first_col … first_col + n − 1 of one row x; the row counts with its first column. Different columns or
 * matrices may be added to from different threads. */
void dg_squares_add(dg_squares *squares, int64_t matrix, int64_t first_col, const float *x, int64_t n);

#endif
