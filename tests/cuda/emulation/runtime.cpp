/* The work of the CUDA runtime, emulated: streams, events, graphs; devices.cpp has the devices and their memory.
 *
 * A stream does its work at once, unless it is being captured. The functions with C names at the end are for tests. */
#include "devices.h"

#include <stdio.h>
#include <vector>

using namespace emulation;

struct Node {
    void *function; /* of a kernel; NULL: a copy or memset */
    int device;
    std::function<void()> run;
};

struct emulated_graph {
    std::vector<Node> nodes;
};
struct emulated_graph_exec {
    std::vector<Node> nodes;
};
struct emulated_stream {
    int device;
    emulated_graph *captured = nullptr;
    bool invalidated = false;
};
struct emulated_event {
    int device;
};

static std::atomic<long> n_objects;                         /* streams, events and graphs alive */
static std::atomic<long> n_captured, n_updated, n_launched; /* steps as graphs */
static std::atomic<long> n_sent;                            /* copies from device to device */

/* ---- Streams and events --------------------------------------------------------------------------------------- */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
    *stream = nullptr;
    CALL();
    *stream = new emulated_stream();
    (*stream)->device = current_device();
    n_objects++;
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    delete stream->captured;
    delete stream;
    n_objects--;
    CALL();
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    CALL();
    if (stream->captured == nullptr) return cudaSuccess;
    stream->invalidated = true;
    return error(cudaErrorStreamCaptureUnsupported);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
    *event = nullptr;
    CALL();
    *event = new emulated_event{current_device()};
    n_objects++;
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event;
    n_objects--;
    CALL();
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    CALL();
    return event->device == stream->device ? cudaSuccess : error(cudaErrorInvalidResourceHandle);
}

/* Of any device, unlike everything else. */
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
    CALL();
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t) {
    CALL();
    return cudaSuccess;
}

/* ---- Work ----------------------------------------------------------------------------------------------------- */

static void work(const Node &node) {
    Access own(node.device);
    node.run();
}

static void enqueue(cudaStream_t stream, void *function, std::function<void()> run) {
    Node node = {function, stream->device, std::move(run)};
    if (stream->captured != nullptr)
        stream->captured->nodes.push_back(std::move(node));
    else
        work(node);
}

void emulation::launch_kernel(cudaStream_t stream, void *function, const char *signature, dim3 grid, dim3 block,
                              size_t shared_bytes, std::function<void()> kernel) {
    if (next_call() != cudaSuccess) return;
    const char *fatal = getenv("DGEMMA_EMULATION_LOST_AT");
    if (fatal != nullptr && strstr(signature, fatal) != nullptr) lose(stream->device);
    if (stream->device != current_device()) {
        error(cudaErrorInvalidResourceHandle);
        return;
    }
    const bool decides = strstr(signature, "dg_cuda_canvas") != nullptr;
    enqueue(stream, function, [=] {
        if (!idle || decides) run_grid(signature, grid, block, shared_bytes, kernel);
    });
}

/* A captured copy is done again when its graph is launched, so the memory must still be there and be the driver's. */
static bool may_capture(cudaStream_t stream, const void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    if (stream->captured == nullptr || kind == cudaMemcpyDeviceToDevice) return true;
    if (is_pinned(kind == cudaMemcpyHostToDevice ? from : to, bytes)) return true;
    stream->invalidated = true;
    return false;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    CALL();
    if (!may_capture(stream, to, from, bytes, kind)) return error(cudaErrorStreamCaptureUnsupported);
    enqueue(stream, nullptr, [=] { memcpy(to, from, bytes); });
    return cudaSuccess;
}

cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes,
                                cudaStream_t stream) {
    CALL();
    const int target = visible_device(to_device), source = visible_device(from_device);
    if (target < 0 || source < 0) return error(cudaErrorInvalidDevice);
    if (stream->captured != nullptr) return error(cudaErrorStreamCaptureUnsupported);
    Access both(target, source);
    memcpy(to, from, bytes);
    n_sent++;
    return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
    CALL();
    if (!may_capture(stream, to, from, width, kind)) return error(cudaErrorStreamCaptureUnsupported);
    enqueue(stream, nullptr, [=] {
        for (size_t i = 0; i < height; i++)
            memcpy((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width);
    });
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *memory, int value, size_t bytes, cudaStream_t stream) {
    CALL();
    enqueue(stream, nullptr, [=] { memset(memory, value, bytes); });
    return cudaSuccess;
}

/* ---- Graphs --------------------------------------------------------------------------------------------------- */

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    CALL();
    if (stream->captured != nullptr) return error(cudaErrorInvalidValue);
    stream->captured = new emulated_graph();
    stream->invalidated = false;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    emulated_graph *captured = stream->captured;
    *graph = nullptr;
    stream->captured = nullptr;
    cudaError_t e = next_call();
    if (e == cudaSuccess && captured == nullptr) e = error(cudaErrorInvalidValue);
    if (e == cudaSuccess && stream->invalidated) e = error(cudaErrorStreamCaptureInvalidated);
    if (e != cudaSuccess) {
        delete captured;
        return e;
    }
    n_captured++;
    n_objects++;
    *graph = captured;
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    n_objects--;
    CALL();
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long) {
    *exec = nullptr;
    CALL();
    *exec = new emulated_graph_exec{graph->nodes};
    n_objects++;
    return cudaSuccess;
}

/* Arguments and grids may change, the sequence of kernels may not. */
cudaError_t cudaGraphExecUpdate(cudaGraphExec_t exec, cudaGraph_t graph, cudaGraphExecUpdateResultInfo *) {
    CALL();
    bool same = exec->nodes.size() == graph->nodes.size();
    for (size_t i = 0; same && i < exec->nodes.size(); i++) same = exec->nodes[i].function == graph->nodes[i].function;
    if (!same) return error(cudaErrorGraphExecUpdateFailure);
    exec->nodes = graph->nodes;
    n_updated++;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    delete exec;
    n_objects--;
    CALL();
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
    CALL();
    n_launched++;
    for (const Node &node : exec->nodes) work(node);
    return cudaSuccess;
}

/* ---- For tests ------------------------------------------------------------------------------------------------ */

#define EXPORTED extern "C" __attribute__((visibility("default")))

/* Everything that must be given back: allocations, streams, events, graphs. */
EXPORTED long emulation_alive() { return n_objects + n_allocations(); }
EXPORTED long emulation_sent() { return n_sent; }
EXPORTED long emulation_steps_captured() { return n_captured; }
EXPORTED long emulation_steps_updated() { return n_updated; }
EXPORTED long emulation_steps_launched() { return n_launched; }
