/* What a denoising step decides about the canvas (canvas.h), on the device: the host only fetches the outcome. */
#include "cuda/device.cuh"

namespace {

constexpr int kSettleThreads = 256;

enum Mark : uint8_t { kFree = 1, kChanged = 2 };

/* What all threads of the block must know, in shared memory before the arrays. */
struct Decision {
    int n_accepted;
    int not_finite;
};

size_t settle_bytes(int n) {
    return sizeof(Decision) + (size_t)n * (2 * sizeof(float) + sizeof(int) + sizeof(uint8_t));
}

/* One block. Sums are in float64 and in the order in which the host adds, so two threads make them, side by side. */
__global__ void __launch_bounds__(kSettleThreads) settle_kernel(dg_cuda_canvas c, int n) {
    KernelOrder launch_order;
    Decision *decision = shared_memory<Decision>();
    float *entropies = reinterpret_cast<float *>(decision + 1); /* (n) */
    float *sorted = entropies + n;                              /* (n) of the free positions, ascending */
    int *order = reinterpret_cast<int *>(sorted + n);           /* (n) which these are; −1 behind the last */
    uint8_t *marks = reinterpret_cast<uint8_t *>(order + n);    /* (n) */
    const int thread = (int)threadIdx.x;
    const dg_canvas_rules &rules = *c.rules;
    const int step = c.progress->step + 1;

    for (int i = thread; i < n; i += kSettleThreads) {
        const bool is_free = c.pinned[i] < 0;
        const int token = is_free ? c.argmax[i] : c.pinned[i];
        marks[i] = (uint8_t)((is_free ? kFree : 0) | (token != c.draft[i] ? kChanged : 0));
        entropies[i] = c.entropies[i];
        order[i] = -1;
        c.draft[i] = token;
        if (!is_free) c.entropies[i] = 0;
    }
    __syncthreads();
    /* A position's rank is the number of free ones before it: by entropy, then by position. */
    for (int i = thread; i < n; i += kSettleThreads) {
        if (!(marks[i] & kFree)) continue;
        const float mine = entropies[i];
        int rank = 0;
        for (int j = 0; j < n; j++)
            rank += (marks[j] & kFree) && (entropies[j] < mine || (entropies[j] == mine && j < i));
        order[rank] = i;
        sorted[rank] = mine;
    }
    __syncthreads();

    bool changed = false;
    double sum = 0;
    int n_free = 0;
    if (thread == 0) {
        int not_finite = -1;
        for (int i = 0; i < n; i++) {
            if (not_finite < 0 && !isfinite(entropies[i])) not_finite = i;
            changed |= (marks[i] & kChanged) != 0;
            if (!(marks[i] & kFree)) continue;
            sum += (double)entropies[i];
            n_free++;
        }
        decision->not_finite = not_finite;
    } else if (thread == 32) {
        const double bound = (double)rules.sampling.entropy_bound;
        double before = 0;
        int k = 0;
        for (; k < n && order[k] >= 0 && before <= bound; k++) before += (double)sorted[k];
        decision->n_accepted = k;
    }
    __syncthreads();
    if (decision->not_finite >= 0) {
        if (thread == 0) c.progress->not_finite = decision->not_finite;
        return;
    }
    for (int k = thread; k < n && order[k] >= 0; k += kSettleThreads) {
        const int i = order[k];
        if (k < decision->n_accepted)
            c.ids[i] = rules.replayed ? c.replayed[i] : c.candidates[i];
        else
            c.ids[i] = rules.replayed ? c.replayed[n + i] : dg_fresh_token(&rules, step, i);
    }
    if (thread == 0) dg_canvas_advance(c.progress, &rules.sampling, changed, sum, n_free, decision->n_accepted);
}

} // namespace

void settle(const Queue &queue, const dg_cuda_canvas &canvas, int n) {
    launch(settle_kernel, dim3(1), dim3(kSettleThreads), settle_bytes(n), queue.stream, canvas, n);
}
