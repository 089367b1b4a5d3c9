/* The settling of a canvas alone, for tests/cuda/test_canvas.py. */
#include "cuda/device.cuh"

#include <vector>

extern "C" {
#include "../../native/settle_case.h"
}

extern "C" __attribute__((visibility("default"))) void emulation_settle(test_settle_case *t) {
    const int n = t->rules.n;
    const size_t step = (size_t)t->progress.step * (size_t)n;
    std::vector<int32_t> replayed(2 * (size_t)n);
    for (size_t i = 0; t->rules.replayed && i < replayed.size(); i++)
        replayed[i] = t->replayed[i / (size_t)n][step + i % (size_t)n];
    dg_cuda_canvas canvas = {&t->rules,    t->pinned, &t->progress,  t->ids,         t->draft,
                             t->entropies, t->argmax, t->candidates, replayed.data()};
    Queue queue = {};
    cudaStreamCreateWithFlags(&queue.stream, cudaStreamNonBlocking);
    settle(queue, canvas, n);
    cudaStreamDestroy(queue.stream);
}
