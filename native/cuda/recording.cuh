/* A denoising step recorded as one CUDA graph, and repeated. */
#ifndef DG_CUDA_RECORDING_CUH
#define DG_CUDA_RECORDING_CUH

#include "cuda/intrinsics.cuh"

/* Everything that changes from step to step lies in device memory and is changed there; what changes from canvas to
 * canvas is the position, which is among the kernels' arguments and may change their grids. Another position is
 * recorded anew, which costs no more than the launches, and the instantiated graph takes the new arguments over where
 * it can.
 *
 * Where the driver cannot record something the recording is given up for good, and steps are launched plainly. */
class Recording {
  public:
    bool active() const { return recording; }
    bool holds(int32_t position) const { return graph != nullptr && recorded_position == position; }

    /* False where steps are to be launched plainly. */
    bool begin(cudaStream_t stream, int32_t position) {
        if (impossible) return false;
        recorded_position = position;
        /* Relaxed: other sessions' threads may go on allocating, and the driver may load a kernel's code meanwhile. */
        recording = cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed) == cudaSuccess;
        if (!recording) fail();
        return recording;
    }

    /* An operation could not be recorded. */
    void give_up() { impossible = true; }

    /* False where the step could not be recorded; nothing has been done then. */
    bool end(cudaStream_t stream) {
        cudaGraph_t made = nullptr;
        recording = false;
        cudaError_t e = cudaStreamEndCapture(stream, &made);
        if (e == cudaSuccess && !impossible) e = take(made);
        if (made != nullptr) cudaGraphDestroy(made);
        if (e != cudaSuccess || impossible) fail();
        return !impossible;
    }

    void abandon(cudaStream_t stream) {
        cudaGraph_t made = nullptr;
        recording = false;
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
    int32_t recorded_position = 0;
    bool recording = false;
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
