"""A canvas on the (emulated) device: settled as on the host, bit for bit, whatever it is given."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

import dgemma
from dgemma._native import Model, Session
from support.kernel_api import pointer
from support.philox import renoise_tokens

INT, FLOAT, POINTER = ctypes.c_int32, ctypes.c_float, ctypes.c_void_p
SAMPLING = ["max_denoising_steps", "t_min", "t_max", "entropy_bound", "stability_threshold",
            "confidence_threshold"]  # fmt: skip


class Rules(ctypes.Structure):
    """dg_canvas_rules of canvas.h, its sampling spelled out."""

    _fields_ = [("seed", ctypes.c_uint64), ("number", ctypes.c_uint32)]
    _fields_ += [(name, INT) for name in ("n", "n_vocab", "replayed")]
    _fields_ += list(zip(SAMPLING, [INT, FLOAT, FLOAT, FLOAT, INT, FLOAT], strict=True))


class Progress(ctypes.Structure):
    """dg_canvas_progress."""

    _fields_ = [
        (name, INT)
        for name in ("step", "n_unchanged", "n_accepted", "not_finite", "settled", "done")
    ]
    _fields_ += [(name, FLOAT) for name in ("temperature", "next_temperature", "mean_entropy")]


class Case(ctypes.Structure):
    """test_settle_case of tests/native/settle_case.h."""

    _fields_ = [("rules", Rules), ("progress", Progress)]
    _fields_ += [(name, POINTER) for name in ("pinned", "ids", "draft")]
    _fields_ += [(name, POINTER) for name in ("entropies", "argmax", "candidates")]
    _fields_ += [("replayed", POINTER * 2)]


class Settling:
    """A canvas before a step, to be settled by one side or another, over and over."""

    def __init__(self, rng: np.random.Generator, n: int, **rules: Any) -> None:
        given = {"max_denoising_steps": 9, "t_min": 0.4, "t_max": 0.8, "entropy_bound": 0.1}
        given |= {"stability_threshold": 1, "confidence_threshold": 0.5, "n_vocab": 262144}
        self.rules = Rules(n=n, seed=int(rng.integers(2**64, dtype=np.uint64)), **given | rules)
        self.step, self.n_unchanged = 3, 2
        self.entropies = rng.exponential(0.01, n).astype(np.float32)
        self.pinned = np.full(n, -1, np.int32)
        self.argmax, self.candidates, self.ids = rng.integers(0, 1000, (3, n)).astype(np.int32)
        self.replayed = rng.integers(0, 1000, (2, 9, n)).astype(np.int32)
        self.draft = self.argmax.copy()
        if rng.random() < 0.5:
            self.draft[rng.integers(n)] += 1

    def run(self, settle: Callable[..., Any]) -> tuple[bytes, dict[str, NDArray[Any]]]:
        progress = Progress(step=self.step, n_unchanged=self.n_unchanged, not_finite=-1)
        arrays = {
            name: getattr(self, name).copy()
            for name in ("pinned", "ids", "draft", "entropies", "argmax", "candidates")
        }
        case = Case(rules=self.rules, progress=progress)
        for name, array in arrays.items():
            setattr(case, name, pointer(array))
        case.replayed[0], case.replayed[1] = (part.ctypes.data for part in self.replayed)
        settle(case)
        if case.progress.not_finite >= 0:
            return bytes(INT(case.progress.not_finite)), {}
        return bytes(case.progress), arrays


@pytest.fixture
def both(cuda_library: Path, kernel_library: ctypes.CDLL, device: Any) -> Callable[..., Progress]:
    """Settles on the host and on the device, and compares everything."""
    on_device = ctypes.CDLL(str(cuda_library)).emulation_settle

    def on_host(case: Case) -> None:
        order = np.empty(case.rules.n, np.int32)
        kernel_library.test_settle(ctypes.byref(case), pointer(order))

    def compared(settling: Settling) -> Progress:
        host, host_arrays = settling.run(on_host)
        there, arrays = settling.run(lambda case: on_device(ctypes.byref(case)))
        assert there == host
        for name, array in host_arrays.items():
            assert arrays[name].tobytes() == array.tobytes(), name
        if not arrays:
            return Progress(not_finite=INT.from_buffer_copy(host).value)
        return Progress.from_buffer_copy(host)

    return compared


SIZES = [1, 2, 16, 31, 32, 33, 100, 256, 300]


@pytest.mark.parametrize("order", ["forward", "backward", "7"])
@pytest.mark.parametrize("n", SIZES)
def test_a_canvas_is_settled_as_on_the_host(
    both: Callable[..., Progress], monkeypatch: pytest.MonkeyPatch, n: int, order: str
) -> None:
    monkeypatch.setenv("DGEMMA_EMULATION_ORDER", order)
    rng = np.random.default_rng(n)
    for entropy_bound in (1e-30, 0.02, 0.1, 3.4e38):
        settling = Settling(rng, n, entropy_bound=entropy_bound, number=int(rng.integers(9)))
        progress = both(settling)
        assert 1 <= progress.n_accepted <= n
        assert progress.n_accepted == n or entropy_bound < 1
        settling.pinned[rng.random(n) < 0.3] = 77
        settling.rules.replayed = int(rng.integers(2))
        both(settling)


def test_the_longest_canvas(both: Callable[..., Progress]) -> None:
    for n in (1024, 2048):
        both(Settling(np.random.default_rng(n), n))


@pytest.mark.parametrize("n", [16, 256])
def test_ties_go_by_position(both: Callable[..., Progress], n: int) -> None:
    rng = np.random.default_rng(n)
    for values in ([0.0], [0.01], [0.0, 0.01], [0.0, -0.0, 1e-45, 0.02], [3e38]):
        settling = Settling(rng, n)
        settling.entropies = rng.choice(np.array(values, np.float32), n)
        both(settling)


def test_sums_are_added_in_the_hosts_order(both: Callable[..., Progress]) -> None:
    """Entropies of all magnitudes, and a bound that the sum meets or misses by its last bit."""
    rng = np.random.default_rng(5)
    for _ in range(20):
        settling = Settling(rng, 64)
        settling.entropies = np.exp2(rng.uniform(-60, 3, 64)).astype(np.float32)
        before = np.cumsum(np.sort(settling.entropies).astype(np.float64))
        for bound in before.astype(np.float32)[[20, 40, 60]]:
            settling.rules.entropy_bound = bound
            both(settling)


@pytest.mark.parametrize("n", [1, 40])
def test_nothing_is_free(both: Callable[..., Progress], n: int) -> None:
    settling = Settling(np.random.default_rng(1), n)
    settling.pinned[:] = np.arange(n)
    progress = both(settling)
    assert (progress.n_accepted, progress.mean_entropy) == (0, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_entropy_that_is_not_finite_is_named(
    both: Callable[..., Progress], value: float
) -> None:
    rng = np.random.default_rng(2)
    for pinned in (False, True):
        settling = Settling(rng, 50)
        settling.entropies[[13, 30, 49]] = value
        settling.pinned[13] = 5 if pinned else -1
        assert both(settling).not_finite == 13
    settling.entropies[:] = value
    assert both(settling).not_finite == 0


def test_the_stop(both: Callable[..., Progress]) -> None:
    """Stable and confident, only one of them, and out of steps."""
    rng = np.random.default_rng(3)
    outcomes = set()
    for threshold in (0, 1, 3, 4):
        for confidence in (1e-9, 1.0):
            for step in (3, 8):
                settling = Settling(
                    rng, 20, stability_threshold=threshold, confidence_threshold=confidence
                )
                settling.step = step
                progress = both(settling)
                outcomes.add((progress.settled, progress.done))
                assert progress.step == step + 1
                assert progress.done == (progress.settled or step == 8)
    assert outcomes == {(0, 0), (1, 1), (0, 1)}


# ---- Whole canvases ------------------------------------------------------------------------------


def steps_of(path: Path, sampling: dict[str, Any], canvas: dict[str, Any], **options: Any) -> Any:
    """All steps of two canvases, the second begun while the first is under way."""
    with Model(path, **options) as model:
        session = Session(model, n_ctx=256, n_batch=16, type_k="f32", type_v="f32")
        session.prefill(list(range(20)))
        given = dataclasses.replace(model.info.sampling, **sampling)
        steps = []
        for n_steps in (3, 6):
            session.begin_canvas(given, **canvas)
            for _ in range(n_steps):
                steps.append(session.step())
                if steps[-1].done:
                    break
        assert steps[-1].done
        return steps


def start_and_pinned(model: Any, rng: np.random.Generator) -> dict[str, Any]:
    pinned = np.full(model.canvas_length, -1)
    pinned[::3] = rng.integers(0, model.n_vocab, len(pinned[::3]))
    return {"seed": 5, "start": rng.integers(0, model.n_vocab, len(pinned)), "pinned": pinned}


def replayed(model: Any, rng: np.random.Generator) -> dict[str, Any]:
    draws = rng.integers(0, model.n_vocab, (13, model.canvas_length))
    return {"noise": dgemma.CanvasNoise(draws[0], draws[1:7], draws[7:])}


@pytest.mark.parametrize("bound", [0.5, 20.0])
def test_a_step_follows_from_its_entropies(
    cuda: Callable[..., Any], gguf_file: Callable[..., Path], bound: float
) -> None:
    """To the last bit also on a GPU: acceptance, fresh tokens, mean and stop, recomputed."""
    path = gguf_file("small")
    sampling = {"max_denoising_steps": 6, "entropy_bound": bound, "confidence_threshold": 3.0}
    canvas = {"seed": 2**63 + 5, "canvas": 3}
    steps = steps_of(path, sampling, canvas, backend="cuda")[3:]
    with Model(path, backend="cpu") as model:
        info = model.info
    n, unchanged, draft = info.canvas_length, 0, None
    for step in steps:
        order = np.argsort(step.entropies, kind="stable")
        n_accepted = int((running_sums(step.entropies[order])[:-1] <= bound).sum())
        assert step.n_accepted == n_accepted
        fresh = renoise_tokens(canvas["seed"], canvas["canvas"], step.step, n, info.n_vocab)
        np.testing.assert_array_equal(step.canvas[order[n_accepted:]], fresh[order[n_accepted:]])
        assert step.mean_entropy == np.float32(running_sums(step.entropies)[-1] / n)
        unchanged = unchanged + 1 if np.array_equal(step.tokens, draft) else 0
        draft = step.tokens
        stable = unchanged >= info.sampling.stability_threshold
        assert step.settled == (stable and step.mean_entropy < 3.0)
        assert step.done == (step.settled or step.step == 6)
        t_min, t_max = np.float32(info.sampling.t_min), np.float32(info.sampling.t_max)
        share = (t_max - t_min) * np.float32(7 - step.step) / np.float32(6)
        assert step.temperature == t_min + share


def running_sums(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of the first 0, 1, … values, added one after another in float64."""
    return np.cumsum(np.concatenate([[0.0], values.astype(np.float64)]))


@pytest.mark.parametrize("given", [start_and_pinned, replayed])
@pytest.mark.parametrize("split", [{}, {"n_gpu_layers": 1}])
def test_what_is_given_is_used_on_the_device(
    cuda: Callable[..., Any],
    gguf_file: Callable[..., Path],
    given: Callable[..., dict[str, Any]],
    split: dict[str, int],
) -> None:
    path = gguf_file("small")
    with Model(path, backend="cpu") as model:
        canvas = given(model.info, np.random.default_rng(3))
    sampling = {"max_denoising_steps": 6, "entropy_bound": 8.0, "stability_threshold": 64}
    expected = steps_of(path, sampling, canvas, backend="cpu")
    actual = steps_of(path, sampling, canvas, backend="cuda", **split)
    assert len(actual) == len(expected)
    for there, here in zip(actual, expected, strict=True):
        for field in ("step", "n_accepted", "temperature", "done", "settled"):
            assert getattr(there, field) == getattr(here, field)
        np.testing.assert_array_equal(there.tokens, here.tokens)
        np.testing.assert_array_equal(there.canvas, here.canvas)
        np.testing.assert_allclose(there.entropies, here.entropies, rtol=1e-4, atol=2e-5)
        assert there.mean_entropy == pytest.approx(here.mean_entropy, rel=1e-4)


@pytest.mark.parametrize("split", [{}, {"n_gpu_layers": 1}])
def test_damaged_weights_are_named_by_the_position(
    cuda: Callable[..., Any],
    gguf_file: Callable[..., Path],
    tmp_path: Path,
    split: dict[str, int],
) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(gguf_file("small").read_bytes())
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path, "r+").tensors}
    tensors["token_embd.weight"][7, 3] = np.nan
    with Model(path, backend="cuda", **split) as model:
        session = Session(model, n_ctx=256, n_batch=16)
        session.begin_canvas(model.info.sampling, seed=1)
        with pytest.raises(dgemma.ModelFileError, match="canvas position 0 are not finite"):
            session.step()
        with pytest.raises(ValueError, match="no canvas"):
            session.step()


def test_a_canvas_too_long_is_refused_by_name(
    cuda: Callable[..., Any], gguf_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "long.gguf"
    path.write_bytes(gguf_file("small").read_bytes())
    fields = gguf.GGUFReader(path, "r+").fields
    for name, value in (
        ("diffusion.canvas_length", 2049),
        ("diffusion-gemma.context_length", 9999),
    ):
        fields[name].parts[-1][0] = value
    with pytest.raises(dgemma.BackendError, match=r"canvas of 2049 tokens; .* at most 2048"):
        Model(path, backend="cuda")
    with Model(path, backend="auto") as model:
        assert model.info.backend == "cpu"
