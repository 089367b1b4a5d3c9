/* What head.c and soft_embedding.c share. */
#ifndef DG_CPU_HEAD_H
#define DG_CPU_HEAD_H

#include "cpu/cpu.h"

typedef struct dg_head_job {
    dg_backend *backend;
    dg_rows rows; /* rms(x, output_norm); without rows where z is given */
    int32_t n;
    float temperature;
    int64_t n_blocks;      /* of the vocabulary */
    const float *uniforms; /* (n) */
    const float *z;        /* (n, n_vocab) logits made elsewhere, or NULL */
    int32_t *argmax, *candidates;
    float *entropies;
    float *logits;    /* (n, n_vocab), or NULL: not wanted */
    float *soft;      /* (n, n_embd), or NULL: not wanted */
    bool statistics;  /* wanted */
    int32_t n_groups; /* of rows, when rows are shared out */
    bool by_spans;    /* rather than by blocks */
    int64_t n_sums;   /* places of rows in the sums of the soft embedding */
} dg_head_job;

/* Of a vocabulary block; fewer in the last. */
static inline int32_t dg_tokens_of_block(const dg_head_job *job, int64_t block) {
    const int64_t left = job->backend->model->n_vocab - block * DG_VOCABULARY_BLOCK;
    return left < DG_VOCABULARY_BLOCK ? (int32_t)left : DG_VOCABULARY_BLOCK;
}

/* Logits, not capped yet, of n_tokens ≤ lanes tokens from `first` on: out (rows->n; stride out_stride). `next`: the
 * token whose panel this thread will probably want afterwards. */
void dg_panel_logits(const dg_head_job *job, dg_thread *thread, const dg_rows *rows, int64_t first, int32_t n_tokens,
                     int64_t next, float *out, int64_t out_stride);

/* Statistics and soft embeddings of all rows, the latter as sums: backend->soft_sums and backend->online_softmax, which
 * are zeros and −∞ before. Not for the form of tiles. */
void dg_sum_soft_embeddings(dg_head_job *job);

#endif
