/* What the parts of the CUDA backend tell each other. All pointers are to device memory unless named host_…, and all
 * functions only enqueue work; a failed launch is found by the backend's cudaGetLastError. */
#ifndef DG_CUDA_DEVICE_CUH
#define DG_CUDA_DEVICE_CUH

extern "C" {
#include "base/error.h"
}

#include "cuda/formats/formats.cuh"
#include "cuda/pack.cuh"

/* Where work goes. */
struct Queue {
    cudaStream_t stream;
    int n_multiprocessors;
    bool hopper; /* dense products are those of hopper/ */
};

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* A matrix, or a stack of them, in device memory. */
struct DeviceWeight {
    const char *tiles;      /* NULL where the model has no such weight */
    const float *scale;     /* NULL, or the multiplier of each matrix */
    int32_t type;           /* as which it is stored: with_format */
    int64_t n_rows, n_cols; /* of a matrix */
};

/* ---- matmul.cu ------------------------------------------------------------------------------------------------ */

/* The result of one or more products side by side, as sums over splits of the columns. Whoever reads it adds them up.
 */
struct Partials {
    float *values;    /* (n_splits, n, n_columns) */
    int64_t capacity; /* floats behind `values` */
    int n_splits;
    int n;
    int n_columns;
};

static __device__ __forceinline__ float partial_sum(const Partials &p, int row, int column) {
    const float *value = p.values + (int64_t)row * p.n_columns + column;
    float sum = *value;
    for (int s = 1; s < p.n_splits; s++) sum += value[(int64_t)s * p.n * p.n_columns];
    return sum;
}

/* What a dense product by such weights takes. */
static inline ActivationKind dense_activations(const Queue &queue, const DeviceWeight &w) {
    return queue.hopper ? kHalves : packed_shape(w.type, w.n_rows, w.n_cols).activations;
}

/* out = x (n, n_cols) · weightsᵀ, for up to three weights whose results stand side by side. `x` must hold the kind of
 * activations of each weight. `out->values` and `out->capacity` are given, the rest is set. */
void matmul(const Queue &queue, const DeviceWeight *weights, int n_weights, const Activations &x, int n, Partials *out);

/* The same for the router: few rows of float32. */
void matmul_router(const Queue &queue, const DeviceWeight &router, const Activations &x, int n, Partials *out);

/* Rows of floats as they come out of an operation. What only one kernel will read is not added up before: it does so
 * while it reads. */
enum RowsKind {
    kStored,  /* (n, n_cols) floats */
    kSplits,  /* sums over a product's splits */
    kMixed,   /* sums over the experts of a token, each times its share */
    kAttended /* sums over attention's splits, each times what its maximum makes it count */
};
struct Rows {
    RowsKind kind;
    const float *values; /* kStored; kMixed: (choices, n_cols); kAttended: (n_splits, n · n_heads, head_dim) */
    Partials splits;
    const int32_t *slots; /* kMixed: (n, n_used), rows of `values` */
    const float *shares;  /* kMixed: (n, n_used) */
    int n_used;
    const float *statistics; /* kAttended: (n_splits, n · n_heads, 2), AttentionParams.partial_max */
    int n_splits, head_dim;
    int64_t n_rows; /* kAttended: n · n_heads */
};
static inline Rows stored_rows(const float *values) {
    Rows rows = {};
    rows.values = values;
    return rows;
}
static inline Rows split_rows(const Partials &splits) {
    Rows rows = {};
    rows.kind = kSplits;
    rows.splits = splits;
    return rows;
}

/* ---- rows.cu: operations on rows, one block each -------------------------------------------------------------- */

/* One way of preparing rows for products. */
struct PrepareTarget {
    const float *weight;           /* (n_cols) of the norm, or NULL */
    float gain;                    /* further factor of all */
    bool wanted[kActivationKinds]; /* which to write */
    Activations x;
};

/* What the products that come next will read. */
struct Preparation {
    PrepareTarget targets[3];
    int n;
};

/* Writes rms(x) · weight · gain, or just x · gain where `norm` is false, as activations; x (n, n_cols). */
void prepare_rows(const Queue &queue, const Rows &x, int n, int n_cols, bool norm, float eps,
                  const Preparation &targets);

/* Writes gelu_tanh(gate) · up as activations; `gate_up` (n, 2·n_ff). */
void prepare_gated(const Queue &queue, const Partials &gate_up, int n_ff, ActivationKind kind, const Activations &x);

struct QkvTarget {
    const dg_layer *layer;        /* its shape */
    const float *q_norm, *k_norm; /* (head_dim) */
    const float *frequencies;     /* (n_rot / 2) */
    int n_heads;
    int position;
    float eps;
    float *q; /* (n, n_heads, head_dim), or NULL */
    dg_kv kv;
    int type_k, type_v;
};

/* Norms and rotates the projections (q unless NULL, k, and v where the layer has one, side by side). */
void finish_qkv(const Queue &queue, const Partials &projections, const QkvTarget &target);

/* out (n, n_cols) = the rows, added up. */
void store_rows(const Queue &queue, const Rows &rows, int n, int n_cols, float *out);

/* The following prepare rms(x), of what x has become, for `next`. */

/* x (n, n_embd) += rms(p, weight) */
void add_normed(const Queue &queue, const Partials &p, const float *weight, float eps, float *x,
                const Preparation &next);

/* x = rms(x + d), unweighted; d may be NULL. */
void add_then_norm(const Queue &queue, float *x, const Rows *d, int n, int n_embd, float eps, const Preparation &next);

/* x = scalar · (x + rms(rms(d, d_norm) + rms(e, e_norm), norm)) */
struct CombineTask {
    float *x; /* (n, n_embd) */
    Rows d, e;
    const float *d_norm, *e_norm, *norm;
    int n_embd;
    float eps, scalar;
};
void combine(const Queue &queue, const CombineTask &task, int n, const Preparation &next);

/* x (n, n_embd) = embedding[ids] · √n_embd */
void embed_rows(const Queue &queue, const DeviceWeight &embedding, const int32_t *ids, int n, float *x);

/* ---- attention.cu --------------------------------------------------------------------------------------------- */

struct AttentionTask {
    const dg_layer *layer;
    int n_heads;
    int n;
    int position;
    bool causal;
    int window; /* of a sliding layer; 0: everything before */
    const dg_kv_span *spans;
    int n_spans;
    int type_k, type_v;
    const float *q; /* (n, n_heads, head_dim) */
    float *out;     /* likewise */
    float *scratch; /* of partial results */
    int64_t scratch_floats;
};

/* The result: in task.out, or in the scratch as splits of the keys. */
Rows attend(const Queue &queue, const AttentionTask &task);

/* ---- moe.cu --------------------------------------------------------------------------------------------------- */

struct MoeTask {
    const dg_model *model; /* its shape */
    DeviceWeight gate, up; /* the same where the rows of both follow each other in one weight */
    DeviceWeight down;
    const float *expert_scale;
    Activations x;          /* (n, n_embd), normed for the experts */
    Partials router_logits; /* (n, n_experts) */
    int n;
    MoeScratch scratch;
};

/* Rows (n, n_embd) that stand in the scratch. */
Rows mix_experts(const Queue &queue, const MoeTask &task);

/* ---- head.cu -------------------------------------------------------------------------------------------------- */

struct HeadTask {
    const dg_model *model; /* its shape */
    DeviceWeight embedding;
    Activations x; /* (n, n_embd), normed */
    int n;
    float bound; /* probability mass that the soft embedding may drop */
    HeadScratch scratch;
    dg_cuda_canvas canvas;
    float *soft; /* (n, n_embd), or NULL */
};

/* Fills canvas.argmax, candidates and entropies, and task.soft, for the step that comes after canvas.progress. */
void sample_head(const Queue &queue, const HeadTask &task);

/* Soft-capped logits of the vocabulary from `first` on as float32: scratch.chunk (n, kLogitsChunk). */
constexpr int kLogitsChunk = kVocabularyChunk / 2;
void chunk_logits(const Queue &queue, const HeadTask &task, int64_t first, int count);

/* ---- settle.cu ------------------------------------------------------------------------------------------------ */

/* dg_canvas_settle (canvas.h) of a canvas of n ≤ kMaxCanvas tokens, bit for bit. */
void settle(const Queue &queue, const dg_cuda_canvas &canvas, int n);

/* ---- soften.cu ------------------------------------------------------------------------------------------------ */

/* The dense soft embedding of the tokens that head.cu has marked with n_looks = −1. */
void soften_dense(const Queue &queue, const HeadTask &task);

/* The same of given z, chunk by chunk: begin; the statistics of all chunks; then the sums of all chunks; end. A chunk
 * of `count` ≤ kGivenChunk columns is put at given_chunk(task) as (n, kGivenChunk) before each call. */
constexpr int kGivenChunk = kVocabularyChunk / 4;
float *given_chunk(const HeadTask &task);
void soften_begin(const Queue &queue, const HeadTask &task);
void soften_statistics(const Queue &queue, const HeadTask &task, int count);
void soften_add(const Queue &queue, const HeadTask &task, int64_t first, int count);
void soften_end(const Queue &queue, const HeadTask &task);

#endif
