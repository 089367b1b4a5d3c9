/* What an operation of backend.h leaves in the scratch for the one that usually comes next, so that rows are gone
 * through once where two operations meet.
 *
 * Results that are sums (over splits, over experts) are added up by whoever reads them (`read`); in any other case they
 * are completed: the operation that they are in the way of writes them to where its caller expects them. What has been
 * prepared for a norm is recognized by that norm and by the rows; an operation that finds something else prepares
 * anew. So nothing depends on the order of operations but time. */
#ifndef DG_CUDA_HELD_CUH
#define DG_CUDA_HELD_CUH

#include "cuda/device.cuh"

/* Activations of rms(x) · norm. */
struct Prepared {
    const float *x, *norm;
    bool is(const float *rows, const float *weight) const { return x != nullptr && x == rows && norm == weight; }
};

class Held {
  public:
    Prepared dense = {nullptr, nullptr};   /* in scratch.x */
    Prepared experts = {nullptr, nullptr}; /* in scratch.experts.x, by the experts' norm, and scratch.experts.router */

    void forget_prepared() { dense = experts = {nullptr, nullptr}; }

    /* The rows (n, n_cols) that `out` stands for. */
    enum Place { kDense, kExperts, kAttention, kPlaces };
    void hold(Place place, float *out, const Rows &rows, int n, int n_cols) {
        if (rows.kind != kStored) results[place] = {out, rows, n, n_cols};
    }

    /* What `values` stands for, which is not held any longer. */
    Rows read(const float *values) {
        for (Result &result : results)
            if (result.out != nullptr && result.out == values) {
                result.out = nullptr;
                return result.rows;
            }
        return stored_rows(values);
    }

    void complete(const Queue &queue, Place place) {
        Result &result = results[place];
        if (result.out == nullptr) return;
        store_rows(queue, result.rows, result.n, result.n_cols, result.out);
        result.out = nullptr;
    }
    void complete(const Queue &queue) {
        for (int place = 0; place < kPlaces; place++) complete(queue, (Place)place);
    }

    void forget() { *this = Held(); }

  private:
    struct Result {
        float *out; /* NULL: nothing is held */
        Rows rows;
        int n, n_cols;
    };
    Result results[kPlaces] = {};
};

#endif
