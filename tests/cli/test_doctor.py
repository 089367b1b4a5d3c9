"""`dgemma doctor`: what it says of machines that the tests do not have."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import dgemma
from dgemma import machine
from dgemma.cli import doctor, fits, main

CARD = {"index": 0, "name": "Card", "uuid": "GPU-1", "total_bytes": 24 << 30,
        "free_bytes": 23 << 30, "capability": "8.9"}  # fmt: skip
DRIVER = {"version": "550.54", "cuda": "12.4", "gpus": [CARD]}
NO_LIBRARY = "this build has no CUDA backend (there is no libdgemma_cuda.so beside it)"


def facts(reason: str = NO_LIBRARY, **changes: Any) -> dict[str, Any]:
    return {
        "cuda": {"usable": False, "reason": reason},
        "driver": DRIVER,
        "environment": {},
        "nvidia_card": True,
        "machine": {"wsl": False, "available": 40e9},
        "limits": {"read_gb_per_s": 50.0, "int8_gop_per_s": 2000.0, "f32_gflop_per_s": 500.0},
        **changes,
    }


def test_it_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "-t", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["total"] >= found["machine"]["available"] > 0
    assert found["cpu_backend"].startswith("cpu (")
    assert found["limits"]["read_gb_per_s"] > 0
    assert found["cuda"]["usable"] or found["advice"]
    assert main(["doctor", "-t", "1"]) == 0
    out = capsys.readouterr().out
    for part in (found["dgemma"], found["cpu_backend"], "q4_0", "driver"):
        assert part in out


def test_which_contexts_of_a_file_fit(tiny_gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "-m", str(tiny_gguf), "-t", "1"]) == 0
    out = capsys.readouterr().out
    assert f"{tiny_gguf}, " in out
    assert "ms at best (computed from the rates above)" in out
    assert re.search(r"context +4,096: .*CPU alone: [0-9.]+ [MG]B, fits", out)


def test_a_file_is_divided_as_loading_would(tiny_gguf: Path) -> None:
    gpu = {"free_bytes": 8 << 30, "obstacle": ""}
    small, old = {**gpu, "free_bytes": 1 << 28}, {**gpu, "free_bytes": 1 << 40, "obstacle": "old"}
    limits = facts()["limits"]
    found = facts(cuda={"gpus": [small, gpu, old]}, machine={"available": 1e6})
    fitting = fits.fits_of(str(tiny_gguf), found)
    with dgemma.File(tiny_gguf) as file:
        sizes = {t.name: t.n_rows * t.n_cols for t in file.tensors}
    experts = sum(n for name, n in sizes.items() if "_exps.weight" in name)
    with dgemma.DiffusionGemma(tiny_gguf, backend="cpu", n_ctx=512) as llm:
        info = llm.info
    active = info.n_parameters - experts + experts * info.n_experts_used / info.n_experts
    computed = 1e3 * max(
        info.weight_bytes / 1e9 / limits["read_gb_per_s"],
        2 * active * info.canvas_length / 1e9 / limits["int8_gop_per_s"],
    )
    assert fitting["least_cpu_step_ms"] == pytest.approx(computed)
    for entry in fitting["contexts"]:
        assert not entry["fits_cpu"]
        assert [share["available"] for share in entry["gpu"]["gpus"]] == [8 << 30]  # one is enough
    assert "on the GPU all of it, " in fits.lines_of(fitting)[1]
    without = fits.fits_of(str(tiny_gguf), facts(cuda={"gpus": []}))
    assert without["contexts"][0]["gpu"] is None


@pytest.mark.parametrize(
    ("found", "advice"),
    [
        (facts(), "pip install 'dgemma[cuda]'"),
        (facts(driver=None), "an NVIDIA card is there, but no driver"),
        (facts(driver=None, nvidia_card=False), "no NVIDIA GPU was found"),
        (
            facts(driver=None, nvidia_card=False, machine={"wsl": True}),
            "install the driver on Windows",
        ),
        (
            facts(driver={**DRIVER, "gpus": [{**CARD, "capability": "7.5"}]}),
            "compute capability 8.0 .* there is Card (7.5)",
        ),
        (facts(environment={"CUDA_VISIBLE_DEVICES": ""}), "CUDA_VISIBLE_DEVICES='' hides"),
        (
            facts(
                "the NVIDIA driver supports CUDA 12.4; 13.0 or later is needed: update the driver"
            ),
            "the driver 550.54 is too old for this build: .* 13.0 or later",
        ),
        (facts("CUDA: no kernel image is available"), "no code for compute capability 8.9"),
        (
            facts("the CUDA library is of another version of dgemma than the engine"),
            "another version",
        ),
        (facts(cuda={"usable": True}), None),
    ],
)
def test_advice(found: dict[str, Any], advice: str | None) -> None:
    said = doctor.advice(found)
    assert len(said) == (advice is not None)
    if advice is not None:
        first, _, second = advice.partition(" .* ")
        assert first in said[0]
        assert second in said[0]


def test_what_fits_and_how_fast_at_best() -> None:
    entries = {entry["type"]: entry for entry in doctor.fits(facts())}
    assert entries["q4_0"]["place"] == "CPU"
    # 14.4 GB at 50 GB/s take 288 ms; 2 x 3.8e9 x 256 operations at 2,000 GOP/s take 973 ms.
    assert entries["q4_0"]["least_cpu_step_ms"] == pytest.approx(972.8)
    assert entries["bf16"]["place"] == "no"
    usable = {"usable": True, "free": 20e9, "total": 24e9}
    entries = {entry["type"]: entry for entry in doctor.fits(facts(cuda=usable))}
    assert entries["q4_0"]["place"] == "GPU"
    assert entries["q8_0"]["place"] == "GPU and CPU"


NVML = """
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory;
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *t, unsigned n) { strncpy(t, "550.54", n); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *v) { *v = 12040; return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 3; return 0; }
static int cards[3];
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **h) { *h = cards + i; return i == 1 ? 15 : 0; }
int nvmlDeviceGetName(void *h, char *t, unsigned n) { strncpy(t, "Card", n); return 0; }
int nvmlDeviceGetUUID(void *h, char *t, unsigned n) { strncpy(t, "GPU-1", n); return 0; }
int nvmlDeviceGetMemoryInfo(void *h, memory *m) {
    m->total = 24ull << 30; m->free = 23ull << 30; return 0;
}
int nvmlDeviceGetCudaComputeCapability(void *h, int *major, int *minor) {
    *major = 8; *minor = 9; return 0;
}
"""


def test_cards_are_asked_of_the_driver(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source, library = tmp_path / "nvml.c", tmp_path / "libnvml.so"
    source.write_text(NVML)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    found = machine.driver((str(tmp_path / "nothing.so"), str(library)))
    assert found is not None
    assert (found.version, found.cuda) == ("550.54", "12.4")
    # The second one cannot be asked, and keeps nobody from the third.
    card = machine.Gpu(0, "Card", "GPU-1", 24 << 30, 23 << 30, "8.9")
    assert found.gpus == [card, machine.Gpu(**{**vars(card), "index": 2})]
    assert machine.driver((str(tmp_path / "nothing.so"),)) is None
