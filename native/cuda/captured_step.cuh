/* A denoising step captured as one CUDA graph, which is launched for each step that does the same. */
#ifndef DG_CUDA_CAPTURED_STEP_CUH
#define DG_CUDA_CAPTURED_STEP_CUH

#include "cuda/intrinsics.cuh"

/* Everything that changes from step to step lies in device memory and is changed there. The position changes from
 * canvas to canvas; it is among the kernels' arguments and may change their grids. A step behind another position is
 * captured anew, which costs no more than the launches, and the instantiated graph takes the new arguments over where
 * it can.
 *
 * Where the driver cannot capture something, capturing is given up for good, and steps are launched plainly. */
class CapturedStep {
  public:
    bool capturing() const { return under_way; }
    bool holds(int32_t position) const { return graph != nullptr && captured_position == position; }

    /* False where steps are to be launched plainly. */
    bool begin(cudaStream_t stream, int32_t position) {
        if (impossible) return false;
        captured_position = position;
        /* Relaxed: other sessions' threads may go on allocating, and the driver may load a kernel's code meanwhile. */
        under_way = cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed) == cudaSuccess;
        if (!under_way) fail();
        return under_way;
    }

    /* An operation could not be captured. */
    void give_up() { impossible = true; }

    /* False where the step could not be captured; nothing has been done then. */
    bool end(cudaStream_t stream) {
        cudaGraph_t made = nullptr;
        under_way = false;
        cudaError_t e = cudaStreamEndCapture(stream, &made);
        if (e == cudaSuccess && !impossible) e = take(made);
        if (made != nullptr) cudaGraphDestroy(made);
        if (e != cudaSuccess || impossible) fail();
        return !impossible;
    }

    void abandon(cudaStream_t stream) {
        cudaGraph_t made = nullptr;
        under_way = false;
        cudaStreamEndCapture(stream, &made);
        if (made != nullptr) cudaGraphDestroy(made);
        cudaGetLastError();
        forget();
    }

    cudaError_t launch(cudaStream_t stream) { return cudaGraphLaunch(graph, stream); }

    void forget() {
        if (graph != nullptr) cudaGraphExecDestroy(graph);
        graph = nullptr;
    }

  private:
    cudaGraphExec_t graph = nullptr;
    int32_t captured_position = 0;
    bool under_way = false;
    bool impossible = kMeasuresLaunches;

    cudaError_t take(cudaGraph_t made) {
        if (graph != nullptr) {
            cudaGraphExecUpdateResultInfo info;
            if (cudaGraphExecUpdate(graph, made, &info) == cudaSuccess) return cudaSuccess;
            cudaGetLastError(); /* other kernels than before: not a failure */
            forget();
        }
        return cudaGraphInstantiate(&graph, made, 0);
    }

    void fail() {
        impossible = true;
        cudaGetLastError(); /* forgets the reason: what cannot be launched plainly either will say so again */
        forget();
    }
};

#endif
