/* A session on the GPU, and the operations of layers on it. */
#ifndef DG_CUDA_BACKEND_CUH
#define DG_CUDA_BACKEND_CUH

#include "cuda/captured_step.cuh"
#include "cuda/held.cuh"
#include "cuda/weights.cuh"

struct dg_backend {
    dg_backend_params params;
    const dg_model *model;
    const DeviceModel *device;
    Queue queue;
    cudaEvent_t reached; /* a place in the stream that another device's waits for: `send` */
    char *memory;        /* the one allocation that `scratch` points into */
    dg_cuda_scratch scratch;
    Held held;    /* of the scratch, for the operation that comes next */
    char *pinned; /* host memory that the device copies from and to: the fields of `host` */
    struct {
        int32_t *ids; /* (max_rows) */
        dg_cuda_canvas canvas;
    } host;
    dg_canvas *canvas; /* under way */
    bool settled;      /* `finish` shall fetch it */
    CapturedStep captured;
    dg_status status; /* of the first failure since the last `finish` */
    char message[256];
};

/* Whether an operation may go ahead. */
bool usable(dg_backend *b);
/* Keeps the first failure of the launches since the last call. */
void note_failure(dg_backend *b, const char *operation);

/* ---- layers.cu: operations of backend.h ------------------------------------------------------------------------ */

void embed(dg_backend *b, const int32_t *host_ids, int32_t n, float *x);
void mlp(dg_backend *b, const dg_mlp *m, const float *x, int32_t n, float *out);
void add_norm(dg_backend *b, float *x, const float *d, int32_t n);
void project_qkv(dg_backend *b, const dg_layer *layer, const float *x, int32_t n, int32_t position, float *q,
                 const dg_kv *kv);
void attend_spans(dg_backend *b, const dg_layer *layer, const float *q, int32_t n, int32_t position, bool causal,
                  const dg_kv_span *spans, int32_t n_spans, float *a);
void project_output(dg_backend *b, const dg_layer *layer, const float *a, int32_t n, float *x);
void moe(dg_backend *b, const dg_moe *m, const float *x, int32_t n, float *out);
void combine_paths(dg_backend *b, const dg_layer *layer, float *x, const float *d, const float *e, int32_t n,
                   float scalar);

/* Has x (n, n_embd) in the scratch as what the head takes. */
void prepare_head(dg_backend *b, const float *x, int n);

#endif
