/* The kernels, written once on the vectors of a simd_*.h, and compiled in one file for each instruction set. That file
 * includes its simd_*.h and defines DG_KERNELS, the name of the table, and DG_KERNELS_NAME. */
#include <math.h>
#include <string.h>

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/vector_math.h"
#include "quant/float.h"
#include "quant/quant.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))

#if defined(UNROLL)
#elif defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)") /* "unroll" stops at two rounds, and keeps the sums in memory */
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
/* For loops whose sums stay in registers: gcc copies each of them at the end of a round. */
#if defined(__clang__)
#define UNROLL_ROUNDS _Pragma("clang loop unroll_count(8)")
#else
#define UNROLL_ROUNDS _Pragma("GCC unroll 8")
#endif

/* macro(1) macro(2) … macro(TILE_ROWS): code for tiles of every number of rows */
#if TILE_ROWS == 1
#define FOR_EACH_TILE(macro) macro(1)
#elif TILE_ROWS == 2
#define FOR_EACH_TILE(macro) macro(1) macro(2)
#elif TILE_ROWS == 3
#define FOR_EACH_TILE(macro) macro(1) macro(2) macro(3)
#elif TILE_ROWS == 4
#define FOR_EACH_TILE(macro) macro(1) macro(2) macro(3) macro(4)
#else
#define FOR_EACH_TILE(macro) macro(1) macro(2) macro(3) macro(4) macro(5) macro(6)
_Static_assert(TILE_ROWS == 6, "add the other sizes");
#endif

#ifndef HAS_ROW_PAIRS
#define HAS_ROW_PAIRS 0 /* only a simd_*.h whose products take two rows at a time says 1 */
#endif

/* Each uses the ones before it. */
#include "cpu/kernels/layout.h"

#include "cpu/kernels/decode.h"

#include "cpu/kernels/rows.h"

#if HAS_PAIRS
#include "cpu/kernels/dot2.h"
#endif

#include "cpu/kernels/soft.h"

#if defined(HAS_TILES)
#define ACTIVATION_ROWS 16 /* in a row tile */
#else
#define ACTIVATION_ROWS TILE_ROWS
#endif
#include "cpu/kernels/floats.h"

#if defined(HAS_TILES)
#include "cpu/kernels/amx/body.h"
#define PRODUCT(kernel) tiled_##kernel
#else
#include "cpu/kernels/multiply.h"
#define PRODUCT(kernel) kernel
#endif

#include "cpu/kernels/attention.h"

#include "cpu/kernels/limits.h"

const dg_cpu_kernels DG_KERNELS = {
    .name = DG_KERNELS_NAME,
    .backend_name = "cpu (" DG_KERNELS_NAME ")",
    .lanes = PANEL_LANES,
    .tile_rows = ACTIVATION_ROWS,
    .has_narrow = HAS_PAIRS,
    .attention_rows = ROW_BLOCKS * ATTENTION_ROWS,
    .form_of = PRODUCT(form_of),
    .decode = PRODUCT(decode),
    .pack = PRODUCT(pack),
    .multiply = PRODUCT(multiply),
#if defined(HAS_TILES)
    .pack_tile = pack_tile,
    .multiply_tiled = multiply_tiles,
    .head_span = head_span,
    .head_span_bytes = head_span_bytes,
#endif
    .spread = spread,
    .pack_weights = pack_weights,
    .add_weighted = add_weighted,
    .attend = attend,
    .attend_scratch = attend_scratch,
    .store_cache = store_cache,
    .rms_norm = rms_norm,
    .gelu_multiply = gelu_multiply,
    .add = add,
    .scale = scale,
    .add_scaled = add_scaled,
    .rotate = rotate,
    .softmax = softmax,
    .softcap = softcap,
    .head_statistics = head_statistics,
    .exponentials = exponentials,
    .peak_int8 = PRODUCT(peak_int8),
    .peak_bf16 = PRODUCT(peak_bf16),
    .peak_f32 = peak_f32,
};
