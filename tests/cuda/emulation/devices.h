/* The emulated devices, their memory, and which of it may be touched. */
#ifndef DGEMMA_EMULATED_DEVICES_H
#define DGEMMA_EMULATED_DEVICES_H

#include "cuda_runtime.h"

#include <atomic>
#include <mutex>

namespace emulation {

constexpr int MOST_DEVICES = 16;
constexpr size_t STAGING_BYTES = 32 << 20;

/* Whether kernels do nothing: emulation_idle. */
extern std::atomic<bool> idle;

/* Counts a call of the runtime; what it must fail with. Not counted: for calls that stand before every other one. */
cudaError_t next_call(bool counted = true);
/* From now on every call of the device fails. */
void lose(int device);
/* Keeps what the runtime will report; returns it. */
cudaError_t error(cudaError_t e);

/* The device that the running thread has chosen, counted without CUDA_VISIBLE_DEVICES, as everywhere in here. */
int current_device();
/* -1 where there is none of that number. */
int visible_device(int number);
int device_count();
/* Whether memory of one device is kept from the others: with several. */
bool separates();

bool is_pinned(const void *memory, size_t bytes);
long n_allocations();

/* While it lives, the memory of these devices can be touched, and that of no other. One thread at a time. */
class Access {
  public:
    explicit Access(int device, int other = -1);
    ~Access();
    Access(const Access &) = delete;
    Access &operator=(const Access &) = delete;

  private:
    int opened[2];
    bool separated;
};

} // namespace emulation

#define CALL()                                                                                                         \
    do {                                                                                                               \
        cudaError_t failure_ = emulation::next_call();                                                                 \
        if (failure_ != cudaSuccess) return failure_;                                                                  \
    } while (0)

#endif
