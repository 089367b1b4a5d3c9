/* Products by the tile unit (Intel AMX): bfloat16 operands, float32 sums. Included by body.h for the one instruction
 * set that has it; every other kernel is that of AVX-512.
 *
 * A tile product multiplies 16 rows of weights with 16 rows of activations over 32 columns, and takes 16 cycles if both
 * operands are in the nearest cache. So weights, scales included, are rounded to bfloat16 as they are decoded (an error
 * of at most 2^-9, a small part of what quantization has lost), and so are activations; a sum stays in its tile over
 * all columns. Types without integer form are multiplied in float32 as ever.
 *
 * Tiles are set up and released in each call: a thread that does something else keeps no state of theirs. */

#include "cpu/kernels/amx/decode.h"

#include "cpu/kernels/amx/multiply.h"

#include "cpu/kernels/amx/head.h"

#include "cpu/kernels/amx/limits.h"
