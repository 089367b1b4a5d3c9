"""The CUDA backend when the (emulated) device fails, and the graphs that steps are captured in."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dgemma
from dgemma._native import Model, Session
from support.cuda_device import CANNOT_CAPTURE, LOST, OUT_OF_MEMORY
from support.engine import open_model

SETTINGS: dict[str, Any] = {"n_ctx": 128, "n_batch": 16, "type_k": "f16", "type_v": "f16"}


def endless(sampling: Any) -> Any:
    """Canvases that do not settle, not even those of an idle device."""
    return dataclasses.replace(sampling, stability_threshold=64)


def work(path: Path, **options: Any) -> list[int]:
    """Load, create, encode, denoise plainly, captured and launched again, go on, and close."""
    tokens: list[int] = []
    with Model(path, backend="cuda", **options) as model:
        session = Session(model, **SETTINGS)
        session.prefill(list(range(20)))
        for canvas in range(2):
            session.begin_canvas(endless(model.info.sampling), seed=1, canvas=canvas)
            for _ in range(4):
                draft = session.step()
            tokens += list(draft.tokens)
            session.prefill(draft.tokens)
    return tokens


@pytest.mark.parametrize("split", [{}, {"n_gpu_layers": 2, "n_cpu_moe": 1}])
@pytest.mark.parametrize("how", [OUT_OF_MEMORY, LOST])
def test_every_call_may_fail(
    cuda: Callable[..., Any],
    device: Any,
    gguf_file: Callable[..., Path],
    split: dict[str, int],
    how: int,
) -> None:
    path = gguf_file("small")
    device.idle(True)
    gc.collect()
    assert device.alive() == 0
    device.heal()
    expected = work(path, **split)
    n_calls = device.calls()
    assert n_calls > 500
    failures = 0
    for n in range(1, n_calls + 1):
        device.fail_at(n, how)
        message = None
        try:
            # What fails only while something is given back, or captured, need not show.
            assert work(path, **split) == expected
        except (dgemma.OutOfMemoryError, dgemma.BackendError) as failure:
            message = str(failure)
        device.heal()
        assert device.alive() == 0, n
        if message is not None:
            failures += 1
            assert "CUDA" in message or "GPU" in message
    assert failures > n_calls / 2
    assert work(path, **split) == expected
    print(f"{n_calls} calls failed one by one, {failures} of them with an error")


@pytest.mark.parametrize("split", [{}, {"n_cpu_moe": 2}])
def test_other_sessions_outlive_a_failure(
    cuda: Callable[..., Any],
    device: Any,
    gguf_file: Callable[..., Path],
    split: dict[str, int],
) -> None:
    path = gguf_file("small")
    prompt, canvas = list(range(20)), [3] * 16
    with Model(path, backend="cuda", **split) as model:
        other, session = Session(model, **SETTINGS), Session(model, **SETTINGS)
        other.prefill(prompt)
        expected = other.canvas_logits(canvas).tobytes()
        for n in range(1, 60, 7):
            device.fail_at(n, OUT_OF_MEMORY)
            session.truncate(0)
            with pytest.raises(dgemma.OutOfMemoryError, match="CUDA"):
                session.prefill(prompt)
            device.heal()
            assert session.n_past in (0, 16)  # whole batches count, nothing half-encoded
            assert other.canvas_logits(canvas).tobytes() == expected
        session.truncate(0)
        session.prefill(prompt)
        assert session.canvas_logits(canvas).tobytes() == expected


def test_after_a_lost_device_auto_uses_the_cpu(
    cuda: Callable[..., Any], device: Any, gguf_file: Callable[..., Path]
) -> None:
    path = gguf_file("small")
    model = cuda(path)
    session = model.session()
    session.prefill([1, 2, 3])
    device.fail_at(10, LOST)
    with pytest.raises(dgemma.BackendError, match="launch failure"):
        session.canvas_logits([1] * 16)
    with pytest.raises(dgemma.BackendError, match="launch failure"):
        session.prefill([4])
    with pytest.raises(dgemma.BackendError, match=r"no GPU: .*launch failure"):
        cuda(path)
    on_cpu = cuda(path, backend="auto", n_gpu_layers=3)
    assert on_cpu.info.backend == "cpu"
    assert "launch failure" in on_cpu.info.backend_note
    assert on_cpu.generate([1, 2, 3], max_tokens=4, max_denoising_steps=2).tokens is not None


def test_an_old_driver_is_named(
    cuda: Callable[..., Any],
    device: Any,
    gguf_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DGEMMA_EMULATION_DRIVER", "12040")
    with pytest.raises(dgemma.BackendError, match=r"supports CUDA 12\.4; 13\.0 or later"):
        cuda(gguf_file("small"))
    model = cuda(gguf_file("small"), backend="auto", n_cpu_moe=1)
    assert model.info.backend == "cpu"
    assert "update the driver" in model.info.backend_note


# ---- Graphs --------------------------------------------------------------------------------------


def canvases(session: Any, sampling: Any) -> list[list[int]]:
    """Steps at several positions: behind a prompt, behind a canvas, after taking tokens back."""
    drafts = []
    session.prefill(list(range(30)))
    for round_ in range(4):
        session.begin_canvas(sampling, seed=7, canvas=round_)
        done = False
        while not done:
            draft = session.step()
            drafts.append(list(draft.tokens))
            done = draft.done
        if round_ == 0:
            session.prefill(draft.tokens)
        elif round_ == 1:
            session.truncate(21)  # twice from here: the captured step still fits
    return drafts


@pytest.fixture
def steps_of(gguf_file: Callable[..., Path]) -> Callable[..., list[list[int]]]:
    def found(**options: Any) -> list[list[int]]:
        with Model(gguf_file("small"), **options) as model:
            session = Session(model, n_ctx=256, n_batch=16, type_k="f32", type_v="f32")
            sampling = dataclasses.replace(model.info.sampling, max_denoising_steps=5)
            return canvases(session, endless(sampling))

    return found


def test_steps_are_captured_once_for_a_canvas_and_launched_again(
    cuda: Callable[..., Any], device: Any, steps_of: Callable[..., list[list[int]]]
) -> None:
    expected = steps_of(backend="cpu")
    before = device.steps()
    assert steps_of(backend="cuda") == expected
    captured, updated, launched = (b - a for a, b in zip(before, device.steps(), strict=True))
    # Of five steps the first and the last differ. Four canvases at three positions: three
    # captures; the graph of the first takes the arguments of the others over.
    assert (captured, updated) == (3, 2)
    assert launched == 4 * 3
    gc.collect()
    assert device.alive() == 0


# The last calls of a captured step: a copy, end of capture, instantiate, destroy, launch, wait.
@pytest.mark.parametrize(
    "failing_call",
    [lambda n: 1, lambda n: n // 2, lambda n: n - 5, lambda n: n - 4, lambda n: n - 3],
    ids=["begin", "middle", "copy", "end", "instantiate"],
)
def test_where_capturing_fails_steps_are_launched_one_by_one(
    cuda: Callable[..., Any],
    device: Any,
    gguf_file: Callable[..., Path],
    failing_call: Callable[[int], int],
) -> None:
    path = gguf_file("small")
    real = failing_call(100) == 50  # kernels that compute take long: once is enough
    device.idle(not real)
    outcomes, calls = [], 0
    for failing in (False, True):
        with Model(path, backend="cuda") as model:
            session = Session(model, **SETTINGS)
            session.prefill(list(range(20)))
            session.begin_canvas(endless(model.info.sampling), seed=1)
            drafts = [session.step()]
            device.heal()
            if failing:
                device.fail_at(failing_call(calls), CANNOT_CAPTURE)
            drafts.append(session.step())
            calls = device.calls()  # of a step that is captured, the first time
            before = device.steps()
            drafts += [session.step() for _ in range(2)]
            assert device.steps()[2] - before[2] == (0 if failing else 2)
            outcomes.append([list(draft.tokens) for draft in drafts])
            del session
        gc.collect()
        assert device.alive() == 0
    assert outcomes[0] == outcomes[1]


def test_cancelling_gives_up_the_capture_alone(
    cuda: Callable[..., Any], device: Any, gguf_file: Callable[..., Path]
) -> None:
    path = gguf_file("small")
    with Model(path, backend="cuda") as model:
        session = Session(model, **SETTINGS)
        session.begin_canvas(model.info.sampling, seed=1)
        session.step()
        expected = list(session.step().tokens)
        session.begin_canvas(model.info.sampling, seed=1)
        session.step()
        session.cancel()
        with pytest.raises(dgemma.CancelledError):
            session.step()
        session.begin_canvas(model.info.sampling, seed=1)
        session.step()
        assert list(session.step().tokens) == expected


def test_the_profile_counts_a_captured_step_as_its_operations(
    cuda: Callable[..., Any], device: Any, gguf_file: Callable[..., Path]
) -> None:
    path, work_of = gguf_file("small"), {}
    device.idle(True)
    for backend in ("cpu", "cuda"):
        with Model(path, backend=backend) as model:
            session = Session(model, **SETTINGS)
            session.begin_canvas(endless(model.info.sampling), seed=1)
            session.step()
            session.reset_operations()
            for _ in range(3):
                session.step()
            session.reset_operations()  # the step stays captured
            session.step()
            operations = [o for o in session.operations() if o.calls > 0]
            work_of[backend] = sum(o.flop for o in operations)
            if backend == "cuda":
                assert {o.name for o in operations} == {"whole step"}
    assert work_of["cuda"] == work_of["cpu"] > 0


def test_an_open_model_on_the_cpu_is_untouched_by_the_device(
    device: Any, gguf_file: Callable[..., Path]
) -> None:
    device.fail_at(1, LOST)
    model = open_model(gguf_file("small"), backend="cpu")
    model.session().prefill([1, 2, 3])
    assert device.calls() == 0


def test_the_emulation_sees_memory_of_another_device(cuda_library: Path) -> None:
    program = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).emulation_touch(1, int(sys.argv[2]))"
    for by, expected in ((1, 0), (0, -11)):
        done = subprocess.run(
            [sys.executable, "-c", program, str(cuda_library), str(by)],
            env={"DGEMMA_EMULATION_DEVICES": "2"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == expected, done.stderr
        assert ("memory of device 1 is touched by another" in done.stderr) == (expected != 0)


@pytest.mark.parametrize(
    ("version", "n_bytes", "message"),
    [
        (
            "9.9.9",
            0,
            f"the CUDA library is dgemma {dgemma.__version__}, and the engine dgemma 9.9.9",
        ),
        (dgemma.__version__, 1, "are different builds of dgemma"),
    ],
)
def test_a_library_of_another_version_says_so(
    cuda_library: Path, version: str, n_bytes: int, message: str
) -> None:
    find = ctypes.CDLL(str(cuda_library)).dg_cuda_library
    find.restype = ctypes.c_void_p
    find.argtypes = [ctypes.c_char_p] + [ctypes.c_size_t] * 2 + [ctypes.c_char_p, ctypes.c_size_t]
    note = ctypes.create_string_buffer(256)
    assert find(version.encode(), n_bytes, n_bytes, note, 256) is None
    assert message in note.value.decode()
