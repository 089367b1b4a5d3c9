"""What nvcc makes of the kernels: nothing that the emulation can see. Needs nvcc, and no GPU."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from support.bench import load

LISTING = """
.text._Z6kernelv:
_Z6kernelv:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   IMMA.16832.S8.S8 R4, R8.ROW, R12.COL, R4 ;
.L_x_1:
        /*0020*/                   LDS.64 R8, [R2] ;
        /*0030*/                   IMMA.16832.S8.S8 R4, R8.ROW, R12.COL, R4 ;
        /*0040*/               @P0 FFMA R4, R4, R5, R6 ;
        /*0050*/                   IMMA.16832.S8.S8 R4, R8.ROW, R12.COL, R4 ;
        /*0060*/              @!P1 BRA `(.L_x_1) ;
        /*0070*/                   F2I.U8.F16.TRUNC.NTZ R3, R0 ;
        /*0080*/               @P2 BRA `(.L_x_0) ;
        /*0090*/                   EXIT ;
"""

cuda_sass = load("cuda_sass")
cuda_resources = load("cuda_resources")
compiled = pytest.mark.skipif(
    shutil.which("nvcc") is None or cuda_sass.nvdisasm() is None, reason="needs nvcc and nvdisasm"
)


def test_a_listing_is_read() -> None:
    (code,) = cuda_sass.parse(LISTING)
    assert code.name == "_Z6kernelv"
    assert len(code.instructions) == 10
    assert [(loop.instructions, loop.matrix) for loop in code.loops()] == [(5, 2)]
    assert code.loops()[0].per_matrix == 2.5
    assert sum(name.startswith(cuda_sass.FORBIDDEN) for name in code.instructions) == 1


@compiled
def test_no_float16_is_stored_as_a_converted_number() -> None:
    """ptxas 13.0 does that where a fresh float16 is stored byte by byte (store_half)."""
    kernels = cuda_resources.kernels("90", ["rows"])
    assert {"qkv_kernel", "embed_kernel"} <= {kernel.name for kernel in kernels}
    assert [kernel.name for kernel in kernels if kernel.forbidden] == []
    assert [kernel.name for kernel in kernels if kernel.spilled] == []


def main_loop(kernel: Any) -> float:
    """Instructions a matrix instruction, of the loop for blocks that are full."""
    most = max(loop.matrix for loop in kernel.loops)
    return min(loop.per_matrix for loop in kernel.loops if loop.matrix == most)


# Measured: 14.0, 13.4, 22.1, 13.6, 14.2; then 14.7, 24.6, 17.0. Types whose scales cover 16 columns
# have instructions of half the size.
LIMITS = {
    "matmul": {"q4_0": 16, "q8_0": 15, "q4_k": 24, "q6_k": 16, "nvfp4": 16},
    "moe": {"q4_0": 18, "q4_k": 27, "nvfp4": 19},
}
ONE_TILE_LIMIT = 31  # of an expert with eight tokens or fewer, q4_0: 30.4
# Of a warpgroup's products, of 64 rows and 256 tokens where those above are of 16 and 8. A
# multiprocessor takes 256 cycles for one of each of its two warpgroups, and a scheduler starts the
# instructions of two warps in them. Measured: 32.9, 31.6, 51.4, 62.8, 59.0, 54.6, 42.9, 54.5, 52.1.
# The probe that ran on an H200 has 39 for Q4_0.
HOPPER_LIMITS = {
    "q4_0": 35, "q8_0": 34, "q4_k": 54, "q2_k": 66, "q6_k": 62, "nvfp4": 58, "f16": 46, "bf16": 58,
    "f32": 56,
}  # fmt: skip


@compiled
@pytest.mark.thorough
def test_products_of_a_warpgroup_follow_each_other_without_spills() -> None:
    """That ptxas makes them wait for each other is an error of cuda_resources."""
    kernels = cuda_resources.kernels("90", ["hopper/*"])
    assert [(k.name, k.format) for k in kernels if k.spilled or k.forbidden] == []
    assert {k.format for k in kernels} >= HOPPER_LIMITS.keys()
    for kernel in kernels:
        if kernel.format in HOPPER_LIMITS and kernel.loops:
            assert main_loop(kernel) <= HOPPER_LIMITS[kernel.format], kernel


@compiled
@pytest.mark.thorough
@pytest.mark.parametrize("source", LIMITS)
def test_main_loops_need_few_instructions_and_no_spills(source: str) -> None:
    kernels = cuda_resources.kernels("90", [source])
    assert [(k.name, k.format) for k in kernels if k.spilled or k.forbidden] == []
    for kind, limit in LIMITS[source].items():
        loops = [k for k in kernels if k.format == kind and k.loops]
        assert loops, kind
        for kernel in loops:
            assert main_loop(kernel) <= limit, (kernel.name, kind)
            if (source, kind) == ("moe", "q4_0"):
                assert max(loop.per_matrix for loop in kernel.loops) <= ONE_TILE_LIMIT
