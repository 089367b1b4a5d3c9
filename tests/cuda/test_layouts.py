"""How the kernels read shared memory, as the emulated GPU counts it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

STEP = """
import sys
import numpy as np
import dgemma

with dgemma.DiffusionGemma(sys.argv[1], backend="cuda", n_ctx=256, n_threads=1) as llm:
    session = llm.session()
    session.prefill(list(range(2, 39)))
    canvas = list(range(llm.info.canvas_length))
    session.canvas_logits(canvas, np.asarray(session.canvas_logits(canvas)))
    session.begin_canvas(llm.info.sampling)
    session.step()
"""
# Parameters of the kernels that read tiles from shared memory.
READERS = ["MatmulParams", "ExpertParams", "AttentionParams", "HeadParams", "SoftenParams"]


@pytest.mark.skipif("DGEMMA_TEST_CUDA" in os.environ, reason="steers the emulated device")
@pytest.mark.parametrize(
    ("name", "outtype", "fp4"), [("wide", "q4_k_m", "0"), ("odd", "nvfp4", "1")]
)
def test_no_read_of_shared_memory_meets_a_bank_conflict(
    cuda_library: Path,
    gguf_file: Callable[..., Path],
    tmp_path: Path,
    name: str,
    outtype: str,
    fp4: str,
) -> None:
    report = tmp_path / "report"
    # In a process of its own: the emulation reports when it ends.
    subprocess.run(
        [sys.executable, "-c", STEP, str(gguf_file(name, outtype))],
        check=True,
        env={
            **os.environ,
            "DGEMMA_CUDA_LIBRARY": str(cuda_library),
            "DGEMMA_EMULATION_FP4": fp4,
            "DGEMMA_EMULATION_REPORT": str(report),
        },
    )
    reads = dict.fromkeys(READERS, 0)
    for line in report.read_text().splitlines():
        signature, *counts = line.split("\t")
        n_reads, passes = int(counts[-2]), int(counts[-1])
        assert passes == n_reads, signature
        for reader in READERS:
            if re.search(rf"\b{reader}\b", signature):
                reads[reader] += n_reads
    assert all(reads.values()), reads


STEPS = """
import dataclasses
import sys
import dgemma

with dgemma.DiffusionGemma(sys.argv[1], backend="cuda", n_ctx=256, n_threads=1) as llm:
    session = llm.session()
    session.prefill(list(range(2, 39)))
    session.begin_canvas(dataclasses.replace(llm.info.sampling, confidence_threshold=1e-30))
    for _ in range(int(sys.argv[2])):
        session.step()
"""


@pytest.mark.skipif("DGEMMA_TEST_CUDA" in os.environ, reason="steers the emulated device")
def test_a_layer_takes_few_launches(
    cuda_library: Path, gguf_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Seven products, attention, and seven others; the more there are, the more a step waits."""
    totals = []
    for steps in (2, 3):
        report = tmp_path / f"report-{steps}"
        subprocess.run(
            [sys.executable, "-c", STEPS, str(gguf_file("small", "q4_0")), str(steps)],
            check=True,
            env={
                **os.environ,
                "DGEMMA_CUDA_LIBRARY": str(cuda_library),
                "DGEMMA_EMULATION_REPORT": str(report),
            },
        )
        lines = [line.split("\t") for line in report.read_text().splitlines()]
        totals.append(sum(int(counts[0]) for _, *counts in lines))
    n_layers, beside_layers = 3, 15  # embedding, self-conditioning, head, soft embedding, decision
    assert totals[1] - totals[0] == 15 * n_layers + beside_layers
