"""bench/gpu.py without a GPU: its files, arguments, stages and reports."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from dgemma_convert import synth
from support.bench import load
from support.engine import open_model

gpu, gpu_more, random_gguf = load("gpu"), load("gpu_more"), load("random_gguf")


@pytest.mark.parametrize("kind", random_gguf.TYPES)
def test_random_blocks_have_the_spread_that_is_asked_for(kind: str) -> None:
    """As the gguf package decodes them."""
    made = random_gguf.TYPES[kind]
    blocks = made.make(np.random.default_rng(1), 4096, 0.05)
    assert blocks.shape == (4096, made.n_bytes)
    assert gguf.GGML_QUANT_SIZES[made.number] == (made.block, made.n_bytes)
    raw = np.ascontiguousarray(blocks).reshape(1, -1)
    if kind in ("f32", "f16"):
        values = raw.view({"f32": np.float32, "f16": np.float16}[kind]).astype(np.float64)
    else:
        values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(made.number))
    assert 0.04 < values.std() < 0.06
    assert abs(values.mean()) < 0.01


@pytest.mark.parametrize("kind", ["q4_k", "nvfp4"])
def test_a_random_file_runs(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "small.gguf"
    n_bytes = random_gguf.write("small", kind, path)
    assert path.stat().st_size == n_bytes
    preset = random_gguf.PRESETS["small"]
    with open_model(path) as llm, llm.session() as session:
        assert llm.info.n_vocab == preset.vocab
        session.prefill([1, 2, 3])
        logits = np.asarray(session.canvas_logits(list(range(preset.canvas))))
    assert np.isfinite(logits).all()
    assert logits.std() > 0.1


def test_the_full_size_file_has_the_released_sizes() -> None:
    tensors = random_gguf.all_tensors(random_gguf.PRESETS["26b-a4b"], "q4_0")
    assert sum(int(np.prod(t.shape)) for t in tensors) == pytest.approx(25.25e9, rel=0.01)
    assert sum(t.n_bytes() for t in tensors) == pytest.approx(14.4e9, rel=0.02)


@pytest.mark.parametrize("kind", ["q4_0", "f16"])
def test_its_tensors_are_those_of_the_converter(kind: str) -> None:
    """random_gguf.py stands apart from `dgemma synth`: names and shapes must not."""
    expected = {
        info.name: tuple(info.shape)
        for step in synth.preset_tensors("26b-a4b", kind)
        for info in step.infos
    }
    tensors = random_gguf.all_tensors(random_gguf.PRESETS["26b-a4b"], kind)
    assert {t.name: t.shape for t in tensors} == expected


@pytest.mark.parametrize(
    "words",
    [["--types", "q4_0,q9"], ["--stages", "build,run"], ["--steps", "0"], ["--budget", "0"]],
)
def test_wrong_arguments_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        gpu.arguments(words)
    assert refused.value.code == 2
    assert "gpu.py: error:" in capsys.readouterr().err


def new_run(tmp_path: Path, *words: str) -> Any:
    folder = str(tmp_path / "folder")
    args = gpu.arguments(["--folder", folder, "--device", "Card 9000 (x)", *words])
    return gpu.Run(args, tmp_path / "results")


def test_a_failed_stage_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    run = new_run(tmp_path)

    def fails(_: Any) -> None:
        raise gpu.StageError("no such thing")

    run.stage("limits", fails)
    assert json.loads(run.target.read_text())["stages"]["limits"]["error"].endswith("no such thing")
    run.stage("agree", lambda _: {"q4_0": {"error": 0.01, "same_argmax": 1.0, "ok": True}})
    found = json.loads(run.target.read_text())
    assert run.target.name.startswith("card-9000-x-")
    assert not found["stages"]["limits"]["ok"]
    assert found["stages"]["agree"]["ok"]
    assert "| q4_0 | 0.01 | 100% |" in run.target.with_suffix(".md").read_text()


def test_commands_are_stopped_when_the_time_is_up(tmp_path: Path) -> None:
    run = new_run(tmp_path, "--budget", "3")
    run.stage("build", lambda r: r.command([sys.executable, "-c", "import time; time.sleep(60)"]))
    assert "stopped after" in run.found["stages"]["build"]["error"]
    run.stage("limits", lambda _: {"never": "run"})
    assert "no time was left" in run.found["stages"]["limits"]["error"]


# As the timing library writes it: launches, milliseconds, mangled name.
LAUNCHES = """\
60\t9.5\t_ZN48_GLOBAL__N__1_6_moe_cu_214gate_up_kernelI13IntegerFormatILNS_5CodesE0EEEEvNS_1PE
60\t5.0\t_ZN48_GLOBAL__N__1_6_moe_cu_211down_kernelI13IntegerFormatILNS_5CodesE0EEEEvNS_1PE
2\t0.1\t_ZN48_GLOBAL__N__1_7_head_cu_211draw_kernelENS_10HeadParamsEib
"""
LIMITS = {
    "copy_gb_per_s": 3000.0,
    "read_gb_per_s": 3100.0,
    "int8_mma_top_per_s": 1000.0,
    "bf16_mma_tflop_per_s": 500.0,
}


def test_launches_become_rates_of_a_step(tmp_path: Path) -> None:
    args = gpu.arguments(["--type", "q4_0"])
    found = {k["kernel"]: k for k in gpu.kernels(LAUNCHES, args, LIMITS)}
    assert list(found) == ["gate_up_kernel", "down_kernel", "draw_kernel"]
    gate_up = found["gate_up_kernel"]
    assert gate_up["launches"] == 30
    assert gate_up["ms"] == pytest.approx(4.75)
    # 30 layers, 128 experts, (1408, 2816) weights of 4.5 bits in 4.75 ms; 8 experts a token.
    n_bytes = 30 * 128 * 1408 * 2816 * 4.5 / 8
    assert gate_up["gb_per_s"] == pytest.approx(n_bytes / 4.75e-3 / 1e9)
    assert gate_up["share_of_copy"] == pytest.approx(n_bytes / 4.75e-3 / 3e12)
    operations = 2 * 30 * 8 * 256 * 1408 * 2816
    assert gate_up["share_of_int8"] == pytest.approx(operations / 4.75e-3 / 1e15)
    run = new_run(tmp_path)
    run.found |= {"limits": LIMITS, "profile": list(found.values())}
    assert "| gate_up_kernel | 30.0 | 4.750 | 1803 | 60% | 103 | 10% |" in gpu.table(run.found)


def test_logits_that_are_not_numbers_do_not_agree() -> None:
    expected = np.random.default_rng(0).standard_normal((4, 50)).astype(np.float32)
    assert gpu.compare(expected, expected) == {
        "error": 0, "largest_error": 0, "same_argmax": 1
    }  # fmt: skip
    actual = np.full_like(expected, np.nan)
    assert not gpu.compare(actual, expected)["error"] < gpu.BLOCK_LIMIT


def test_the_last_result_of_the_same_device_is_compared(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    time = {"step_ms": {"median": 20.0}, "prefill_tokens_per_s": 1000.0, "backend": "cuda (x)"}
    stages = {"time": {"ok": True}, "agree": {"ok": False, "error": "too far\nq4_0: 0.5"}}
    report = {"device": "Card 9000 (x)", "type": "q4_0", "preset": "26b-a4b", "stages": stages}
    for name, date, median in (("a", "2026-01-02", 40.0), ("b", "2025-12-31", 80.0)):
        step = {**time, "step_ms": {"median": median}}
        (results / f"{name}.json").write_text(json.dumps({**report, "date": date, "time": step}))
    (results / "c.json").write_text(json.dumps({**report, "device": "other", "time": time}))
    (results / "d.json").write_text("[1, 2]")
    run = new_run(tmp_path)
    assert run.earlier is not None
    assert run.earlier["date"] == "2026-01-02"
    run.found |= {"stages": stages, "time": time, "contexts": [
        {"n_past": 8192, "cache": "q8_0", "n_prompt": 512, "step_ms": 25.0},
        {"n_past": 131072, "cache": "f16", "n_prompt": 512, "error": "GPU memory"},
    ]}  # fmt: skip
    text = gpu.to_paste(run.found, run.earlier)
    assert "step 0.50 of 40.00 ms on 2026-01-02" in text
    assert "agree failed: q4_0: 0.5" in text
    assert "behind 8192 (q8_0): 25.00 ms" in text
    assert "131072" not in text
    assert "Card 9000 (x), 26b-a4b q4_0" in text


NCU = """\
==PROF== Connected to process 77
{"backend": "cuda (x)", "step_ms": [3.1]}
==PROF== Disconnected
"ID","Process ID","Process Name","Host Name","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","77","steps","127.0.0.1","void <unnamed>::matmul_kernel<IntegerFormat<0>>(MatmulParams)","gpu__time_duration.sum","us","1,086.5"
"1","77","steps","127.0.0.1","void <unnamed>::matmul_kernel<FloatFormat<2>>(MatmulParams)","gpu__time_duration.sum","ns","500"
"2","77","steps","127.0.0.1","<unnamed>::draw_kernel(HeadParams, int, bool)","gpu__time_duration.sum","us","42.0"
"""  # noqa: E501


def test_nsights_report_becomes_a_table_of_kernels(tmp_path: Path) -> None:
    found = gpu_more.kernel_times(NCU)
    assert found == [
        {"kernel": "matmul_kernel", "launches": 2, "us": pytest.approx(1087.0)},
        {"kernel": "draw_kernel", "launches": 1, "us": 42.0},
    ]
    assert gpu_more.kernel_times("==ERROR== no permission") == []
    run = new_run(tmp_path)
    run.found["nsight"] = found
    assert "| matmul_kernel | 2 | 543.5 | 1.087 |" in gpu.table(run.found)


def test_other_types_are_left_out_when_no_time_is_left(tmp_path: Path) -> None:
    run = new_run(tmp_path, "--budget", "5")
    found = gpu_more.types(run)
    assert found == {
        name: {"error": "no time was left"} for name in ("nvfp4", "iq4_xs_l", "q4_k_m")
    }
    run.found["types"] = found
    assert "| nvfp4 | no time was left | | |" in gpu.table(run.found)
