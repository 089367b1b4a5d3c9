/* What native/cuda/hopper/intrinsics.cuh writes in PTX, with the semantics that a probe confirmed on an H200. Included
 * in its place; hopper.cpp does the work.
 *
 * Everything asynchronous happens as late as it may: a copy arrives when its barrier is waited for, a product reads its
 * registers and its shared memory when it is waited for. The target of a copy is poisoned when the copy is issued. So a
 * stage that is given back too early, a wrong phase, or a register that is written too soon, spoils the result. */
#ifndef DGEMMA_EMULATED_HOPPER_H
#define DGEMMA_EMULATED_HOPPER_H

namespace emulation {

/* A matrix of float16 in global memory and the box in which it is copied, swizzled by 128 bytes. */
struct TensorMap {
    const char *data;
    int64_t n_rows, n_columns;
    int box_rows, box_columns;
};

uint32_t shared_address(const void *shared);
void barrier_init(uint64_t *barrier, int arrivals);
void barrier_arrive(uint64_t *barrier, uint32_t expected_bytes);
void barrier_wait(uint64_t *barrier, uint32_t parity);
void meet(int id, int n_threads);
void copy_box(void *shared, const TensorMap &map, int column, int row, uint64_t *barrier);
void prefetch(const void *global, uint32_t bytes);
void set_registers(int n, bool more);
void products_begin();
void products_commit();
void products_wait(int groups_left);
void warpgroup_multiply(float *d, int n_tokens, const uint32_t *a, uint64_t b);
uint32_t fused_pair(uint32_t a, uint32_t b, uint32_t c, bool subtract);

} // namespace emulation

using emulation::barrier_init;
using emulation::barrier_wait;
using emulation::copy_box;
using emulation::prefetch;
using emulation::products_begin;
using emulation::products_commit;
using emulation::shared_address;
using emulation::TensorMap;

static inline void publish_barriers() {}
static inline void barrier_arrive(Barrier *b) { emulation::barrier_arrive(b, 0); }
static inline void barrier_expect(Barrier *b, uint32_t bytes) { emulation::barrier_arrive(b, bytes); }
template <int kThreads> void meet(int id) { emulation::meet(id, kThreads); }
template <int kRegisters> void take_registers() { emulation::set_registers(kRegisters, true); }
template <int kRegisters> void leave_registers() { emulation::set_registers(kRegisters, false); }
template <int kGroupsLeft> void products_wait() { emulation::products_wait(kGroupsLeft); }
template <int kN> void hold(float (&)[kN]) {}

/* The fields that intrinsics.cuh fills: address and distance of groups of eight rows in 16 bytes, kind of swizzle. */
static inline uint64_t operand(const void *shared) {
    return (uint64_t)((shared_address(shared) & 0x3ffff) >> 4) | (uint64_t)1 << 16 |
           (uint64_t)(kSwizzledGroupBytes >> 4) << 32 | (uint64_t)1 << 62;
}
template <int kN> void warpgroup_multiply(float (&d)[kN], const uint32_t (&a)[4], uint64_t b) {
    static_assert(kN == 32 || kN == 64 || kN == 128, "the shapes of intrinsics.cuh");
    emulation::warpgroup_multiply(d, 2 * kN, a, b);
}

static inline uint32_t pair_subtract(uint32_t a, uint32_t b) { return emulation::fused_pair(a, 0x3c003c00u, b, true); }
static inline uint32_t pair_multiply(uint32_t a, uint32_t b) {
    return emulation::fused_pair(a, b, 0x80008000u, false); /* −0: leaves the sign of a zero product */
}
static inline uint32_t pair_fma(uint32_t a, uint32_t b, uint32_t c) { return emulation::fused_pair(a, b, c, false); }
static inline uint32_t make_pair(float low, float high) {
    return (uint32_t)float_to_half(low) | (uint32_t)float_to_half(high) << 16;
}

static inline bool can_map_tensors() { return true; }
static inline bool map_tensor(TensorMap *map, const uint16_t *device, int64_t n_rows, int64_t n_columns, int box_rows) {
    *map = {(const char *)device, n_rows, n_columns, box_rows, kSwizzledRowBytes / 2};
    /* What the driver's function would refuse. */
    return (uintptr_t)device % 16 == 0 && n_columns * 2 % 16 == 0 && n_rows > 0 && box_rows > 0 && box_rows <= 256;
}

#endif
