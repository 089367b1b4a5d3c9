/* Measures every launch of a library built for it (DGEMMA_CUDA_TIMING; bench/gpu.py). Steps are then not captured as
 * graphs, and each kernel stands between two events, so that its time includes about a microsecond of its launch.
 *
 * With the environment variable DGEMMA_CUDA_TIMING_FILE the sums are written there: a line for each kernel, launches,
 * milliseconds and name. */
#ifndef DG_CUDA_TIMING_CUH
#define DG_CUDA_TIMING_CUH

#include <map>
#include <mutex>
#include <stdio.h>
#include <stdlib.h>
#include <string>
#include <vector>

class LaunchTimes {
  public:
    static LaunchTimes &get() {
        static LaunchTimes times;
        return times;
    }

    template <class Kernel, class Launch> void measure(Kernel *kernel, cudaStream_t stream, Launch launch) {
        std::lock_guard<std::mutex> guard(lock);
        const char *name = nullptr;
        if (path == nullptr || cudaFuncGetName(&name, (const void *)kernel) != cudaSuccess) return launch();
        Pair pair;
        if (free.empty()) {
            cudaEventCreate(&pair.begin);
            cudaEventCreate(&pair.end);
        } else {
            pair = free.back();
            free.pop_back();
        }
        cudaEventRecord(pair.begin, stream);
        launch();
        cudaEventRecord(pair.end, stream);
        waiting.push_back({name, pair});
    }

    /* To be called after a step, when all launches have ended. */
    void collect() {
        std::lock_guard<std::mutex> guard(lock);
        if (path == nullptr) return;
        for (const Waiting &w : waiting) {
            float ms = 0;
            if (cudaEventElapsedTime(&ms, w.pair.begin, w.pair.end) == cudaSuccess) {
                Sum &sum = sums[w.name];
                sum.launches++;
                sum.ms += (double)ms;
            }
            free.push_back(w.pair);
        }
        waiting.clear();
        FILE *file = fopen(path, "w"); /* each time: at the process's end the driver may be gone */
        if (file == nullptr) return;
        for (const auto &entry : sums)
            fprintf(file, "%ld\t%.6f\t%s\n", entry.second.launches, entry.second.ms, entry.first.c_str());
        fclose(file);
    }

  private:
    struct Pair {
        cudaEvent_t begin, end;
    };
    struct Waiting {
        const char *name;
        Pair pair;
    };
    struct Sum {
        long launches = 0;
        double ms = 0;
    };
    const char *path = getenv("DGEMMA_CUDA_TIMING_FILE");
    std::mutex lock;
    std::vector<Pair> free;
    std::vector<Waiting> waiting;
    std::map<std::string, Sum> sums;
};

#endif
