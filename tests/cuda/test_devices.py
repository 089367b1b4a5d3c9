"""Several (emulated) GPUs: which one is taken, how a model is divided, what if one is lost."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import dgemma
from dgemma._native import Model, Session, list_gpus
from support.cuda_device import LOST, OUT_OF_MEMORY
from support.engine import open_model, random_tokens

GB = 10**9
SETTINGS: dict[str, Any] = {"n_ctx": 128, "n_batch": 16, "type_k": "f16", "type_v": "f16"}


@pytest.fixture
def several(
    cuda: Callable[..., Any], device: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Sets up emulated devices with so many bytes, of which others use some."""

    def set_up(*memory: int, used: str = "0", capabilities: str = "80") -> None:
        monkeypatch.setenv("DGEMMA_EMULATION_DEVICES", str(len(memory)))
        monkeypatch.setenv("DGEMMA_EMULATION_MEMORY", ",".join(map(str, memory)))
        monkeypatch.setenv("DGEMMA_EMULATION_USED", used)
        monkeypatch.setenv("DGEMMA_EMULATION_CAPABILITIES", capabilities)
        gc.collect()
        device.heal()

    return set_up


# ---- Which one -----------------------------------------------------------------------------------


def test_gpus_are_listed(several: Callable[..., None]) -> None:
    several(4 * GB, 2 * GB, used="0,500000000", capabilities="89,75")
    first, second = list_gpus()
    assert (first.number, first.name, first.capability) == (0, "emulated GPU A", "8.9")
    assert (first.free_bytes, first.total_bytes, first.obstacle) == (4 * GB, 4 * GB, "")
    assert first.uuid == "GPU-00000000-0000-0000-0000-0000000000a0"
    assert (second.number, second.free_bytes, second.total_bytes) == (1, 3 * GB // 2, 2 * GB)
    assert "compute capability 7.5; 8.0 (Ampere)" in second.obstacle


def test_the_one_with_the_most_free_memory_is_taken(
    several: Callable[..., None],
    cuda: Callable[..., Any],
    device: Any,
    gguf_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = gguf_file("small")
    device.idle(True)
    several(2 * GB, 4 * GB, 3 * GB, used="0,2500000000,0")
    model = cuda(path)
    assert (model.info.gpus, model.info.gpu_layers) == ((2,), (model.info.n_layers,))
    assert model.info.backend_name == "cuda (2: emulated GPU C, sm_80)"
    assert device.allocated(2) == device.allocated() > 0
    model.close()
    # Numbers are those that CUDA_VISIBLE_DEVICES leaves, in its order.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert [gpu.name[-1] for gpu in list_gpus()] == ["B", "A"]
    assert cuda(path).info.gpus == (1,)
    # A card that cannot be used is not taken, however much is free on it.
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    several(2 * GB, 4 * GB, capabilities="80,75")
    assert cuda(path).info.gpus == (0,)


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (0, (0,)),
        ("1", (1,)),
        ("CUDA2", (2,)),
        ("gpu b", (1,)),
        ("GPU-00000000-0000-0000-0000-0000000000A2", (2,)),
        ("2, 0", (2, 0)),
        ("none", ()),
    ],
)
def test_a_device_is_named(
    several: Callable[..., None],
    cuda: Callable[..., Any],
    device: Any,
    gguf_file: Callable[..., Path],
    named: str | int,
    expected: tuple[int, ...],
) -> None:
    device.idle(True)
    several(4 * GB, 2 * GB, 3 * GB)
    split = "1,1" if len(expected) > 1 else None
    model = cuda(gguf_file("small"), device=named, tensor_split=split, backend="auto")
    assert model.info.gpus == expected
    assert model.info.backend == ("cuda" if expected else "cpu")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"device": "3"},
            ValueError,
            r'device "3" is none of the GPUs here \(0: emulated GPU A, 1',
        ),
        ({"device": "4090"}, ValueError, "give a number, a uuid or a part of the name"),
        ({"device": "0,"}, ValueError, 'device "" is none'),
        ({"device": "emulated"}, ValueError, r'"emulated" stands for 3 GPUs .*a number or a uuid'),
        ({"device": "0,GPU A"}, ValueError, "named twice"),
        ({"device": "2"}, dgemma.BackendError, r'device "2" cannot be used: .* 7\.5; 8\.0'),
        ({"tensor_split": "1,2,3"}, ValueError, "more GPUs than the 2"),
        ({"tensor_split": "1,x"}, ValueError, r'tensor split "1,x": expected numbers'),
        ({"tensor_split": [0.0, 0.0]}, ValueError, "leaves all GPUs out"),
        ({"tensor_split": "-1,2"}, ValueError, "not negative"),
        ({"device": "none", "backend": "cuda"}, ValueError, "is the CPU"),
    ],
)
def test_what_names_no_gpu_is_said(
    several: Callable[..., None],
    cuda: Callable[..., Any],
    device: Any,
    gguf_file: Callable[..., Path],
    options: dict[str, Any],
    kind: type[Exception],
    message: str,
) -> None:
    device.idle(True)
    several(4 * GB, 2 * GB, 3 * GB, capabilities="80,80,75")
    with pytest.raises(kind, match=message):
        cuda(gguf_file("small"), **{"backend": "auto", **options})


def test_a_named_device_is_not_replaced_by_the_cpu(
    gguf_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DGEMMA_CUDA_LIBRARY", str(tmp_path / "nothing.so"))
    with pytest.raises(dgemma.BackendError, match="cannot be loaded"):
        open_model(gguf_file("small"), backend="auto", device="0")
    with pytest.warns(RuntimeWarning, match="tensor_split=.* has no effect"):
        model = open_model(gguf_file("small"), backend="auto", tensor_split=[0.5, 0.5])
    assert model.info.backend == "cpu"


def test_arguments_of_llama_cpp_python(
    several: Callable[..., None],
    cuda: Callable[..., Any],
    device: Any,
    gguf_file: Callable[..., Path],
) -> None:
    path = gguf_file("small")
    device.idle(True)
    several(2 * GB, 4 * GB, 3 * GB)
    for options, gpus in (
        ({"main_gpu": 0}, (1,)),  # the default
        ({"main_gpu": 2}, (2,)),
        ({"main_gpu": 0, "split_mode": 0}, (0,)),
        ({"split_mode": 1, "tensor_split": [1, 0, 1]}, (0, 2)),
    ):
        assert cuda(path, **options).info.gpus == gpus


# ---- Divided over several ------------------------------------------------------------------------


def canvas_logits(model: Any, name: str) -> NDArray[np.float32]:
    """Logits of a canvas, and of a second step conditioned on it, behind a prompt in batches."""
    prompt, canvases = random_tokens(name, 19, n_canvases=1)
    session = model.session()
    session.prefill(prompt)
    first = np.asarray(session.canvas_logits(canvases[0]))
    second = np.asarray(session.canvas_logits(canvases[0][::-1], first / np.float32(0.6)))
    return np.array([first, second])


def answer(model: Any) -> tuple[list[int], list[int]]:
    out = model.generate([1, 2, 3, 4, 5], max_tokens=30, seed=3, max_denoising_steps=5)
    return list(out.tokens), list(out.stats.steps)


# "odd" has four layers, "narrow" six, of both kinds.
DIVISIONS = [
    ("odd", {"tensor_split": "1,1"}, (0, 1), (2, 2)),
    ("odd", {"tensor_split": "3,1", "n_gpu_layers": 3, "n_cpu_moe": 1}, (0, 1), (2, 1)),
]
MORE = [
    ("odd", {"tensor_split": "1,2,1"}, (0, 1, 2), (1, 2, 1)),
    ("odd", {"device": "2,0", "tensor_split": "auto"}, (2, 0), (2, 2)),
    ("narrow", {"tensor_split": "1,1,1"}, (0, 1, 2), (2, 2, 2)),
    ("narrow", {"tensor_split": "1,1", "n_cpu_moe": 6}, (0, 1), (3, 3)),
    ("narrow", {"tensor_split": "1,0,5", "n_gpu_layers": 4}, (0, 2), (1, 3)),
]
DIVISIONS += [pytest.param(*each, marks=pytest.mark.thorough) for each in MORE]


@pytest.mark.parametrize(("name", "options", "gpus", "layers"), DIVISIONS)
def test_every_division_computes_the_same(
    several: Callable[..., None],
    cuda: Callable[..., Any],
    gguf_file: Callable[..., Path],
    name: str,
    options: dict[str, Any],
    gpus: tuple[int, ...],
    layers: tuple[int, ...],
) -> None:
    path = gguf_file(name)
    expected = canvas_logits(open_model(path, n_ctx=256), name)
    several(4 * GB, 4 * GB, 4 * GB)
    model = cuda(path, n_batch=16, **options)
    assert (model.info.gpus, model.info.gpu_layers) == (gpus, layers)
    assert f"on {len(gpus)} GPUs" in model.info.backend_note
    assert ("cpu" in model.info.backend_name) == (
        "n_cpu_moe" in options or "n_gpu_layers" in options
    )
    actual = canvas_logits(model, name)
    assert np.abs(actual - expected).max() < 2e-4 * np.abs(expected).max()


def test_the_same_text_on_one_two_and_three(
    several: Callable[..., None],
    cuda: Callable[..., Any],
    device: Any,
    gguf_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    path = gguf_file("odd")
    expected = answer(open_model(path, n_ctx=256))
    several(4 * GB, 4 * GB, 4 * GB)
    for split, n_gpus in (("1", 1), ("1,1", 2), ("1,1,1", 3)):
        model = cuda(path, tensor_split=split)
        assert len(model.info.gpus) == n_gpus
        assert answer(model) == expected
    # A conversation goes from three GPUs to the CPU.
    session = model.session()
    session.prefill(list(range(40)))
    logits = session.canvas_logits([3] * model.info.canvas_length)
    session.save(tmp_path / "session")
    other = open_model(path, n_ctx=256).session()
    other.load(tmp_path / "session")
    actual = other.canvas_logits([3] * model.info.canvas_length)
    np.testing.assert_allclose(actual, logits, atol=2e-3)


def test_activations_cross_once_at_each_boundary(
    several: Callable[..., None],
    cuda: Callable[..., Any],
    device: Any,
    gguf_file: Callable[..., Path],
) -> None:
    device.idle(True)
    several(4 * GB, 4 * GB, 4 * GB)
    for split, n_gpus in (("1,1", 2), ("1,1,1", 3)):
        with Model(gguf_file("odd"), backend="cuda", tensor_split=split) as model:
            session = Session(model, **SETTINGS)
            before = device.sent()
            session.prefill(list(range(16)))
            # Of the last layer an encoder needs keys and values only, and nothing comes back.
            assert device.sent() - before == n_gpus - 1
            session.begin_canvas(model.info.sampling, seed=1)
            for _ in range(2):
                before = device.sent()
                session.step()
                assert device.sent() - before == n_gpus  # and back to the head
            del session


@pytest.mark.parametrize("options", [{}, {"n_cpu_moe": 2}, {"n_gpu_layers": 3}])
def test_what_is_planned_for_each_is_what_each_allocates(
    several: Callable[..., None],
    device: Any,
    gguf_file: Callable[..., Path],
    options: dict[str, int],
) -> None:
    path = gguf_file("wide")
    device.idle(True)
    several(4 * GB, 4 * GB)
    with Model(path, backend="cpu") as model:
        planned = model.gpu_plan(
            [4 * GB, 4 * GB],
            proportions=(2, 1),
            **{"n_gpu_layers": model.info.n_layers, **options},
            **SETTINGS,
        )
    assert sum(share.n_layers for share in planned.gpus) == planned.n_gpu_layers
    for name in ("weights", "cache", "scratch", "reserve", "total"):
        assert sum(getattr(share, name) for share in planned.gpus) == getattr(planned, name)
    model = Model(path, backend="cuda", tensor_split="2,1", **options)
    assert model.info.gpu_layers == tuple(share.n_layers for share in planned.gpus)
    for number, share in enumerate(planned.gpus):
        assert device.allocated(number) == share.weights
    session = Session(model, **SETTINGS)
    for number, share in enumerate(planned.gpus):
        took = device.allocated(number) - share.weights
        # A plan without a device reckons with more multiprocessors than the emulated ones have.
        assert 0 <= share.cache + share.scratch - took < 32 << 20
    del session
    model.close()
    del model
    gc.collect()
    assert device.alive() == 0


def test_auto_uses_the_fewest_that_are_enough(
    several: Callable[..., None],
    cuda: Callable[..., Any],
    device: Any,
    gguf_file: Callable[..., Path],
) -> None:
    path = gguf_file("wide")
    device.idle(True)
    session = {"n_ctx": 256, "type_k": "f32", "type_v": "f32"}
    with Model(path, backend="cpu") as model:
        n_layers = model.info.n_layers
        whole = model.gpu_plan(n_gpu_layers=n_layers, **session)
        for count in range(n_layers):  # the first gets embedding and head as well
            halves = model.gpu_plan(
                [0, 0], n_layers, proportions=(n_layers - count, count), **session
            )
            if halves.gpus[0].total < whole.total:
                break
        both = [share.total for share in halves.gpus]
    several(whole.total, 4 * GB)
    assert cuda(path).info.gpus == (1,)  # one is enough: that with the most
    gc.collect()
    # Neither is enough, both are: nothing needs to stay on the CPU.
    most = max(both) + (1 << 20)
    assert most < whole.total
    several(most, most)
    model = cuda(path)
    assert model.info.gpus == (0, 1)
    assert (model.info.n_gpu_layers, model.info.n_cpu_moe) == (n_layers, 0)
    model.close()
    del model
    gc.collect()
    # Not even both: experts leave first, as with one.
    several(most, most // 2)
    model = cuda(path)
    assert model.info.n_cpu_moe > 0
    assert "cpu" in model.info.backend_name


def test_memory_is_filled_to_the_same_share(gguf_file: Callable[..., Path]) -> None:
    with Model(gguf_file("wide"), backend="cpu") as model:
        plan = model.gpu_plan([4 * GB, 4 * GB], **SETTINGS)
        assert all(share.n_layers > 0 for share in plan.gpus)
        assert plan.n_cpu_moe == 0
        with pytest.raises(ValueError, match="2 GPUs with 1 proportions"):
            model.gpu_plan([GB, GB], proportions=(1,))


# ---- What goes wrong -----------------------------------------------------------------------------


def test_a_lost_device_is_one_error(
    several: Callable[..., None],
    cuda: Callable[..., Any],
    device: Any,
    gguf_file: Callable[..., Path],
) -> None:
    path = gguf_file("small")
    device.idle(True)
    several(2 * GB, 4 * GB)
    model = cuda(path, tensor_split="1,1")
    session = model.session()
    session.prefill([1, 2, 3])
    device.lose(1)
    with pytest.raises(dgemma.BackendError, match=r"CUDA, .*launch failure"):
        session.canvas_logits([1] * 16)
    with pytest.raises(dgemma.BackendError, match="launch failure"):
        session.prefill([4])
    # The other device goes on, and so does the process.
    other = cuda(path)
    assert other.info.gpus == (0,)
    other.session().prefill([1, 2, 3])
    with pytest.raises(dgemma.BackendError, match=r'device "1" cannot be used: .*launch failure'):
        cuda(path, device="1")
    del session, model, other
    gc.collect()
    assert device.alive() == 0


def work(path: Path) -> list[int]:
    with Model(path, backend="cuda", tensor_split="1,1") as model:
        session = Session(model, **SETTINGS)
        session.prefill(list(range(20)))
        session.begin_canvas(model.info.sampling, seed=1)
        session.step()
        return list(session.step().tokens)


@pytest.mark.parametrize(
    ("how", "stride"),
    [
        (LOST, 11),
        pytest.param(LOST, 1, marks=pytest.mark.thorough),
        pytest.param(OUT_OF_MEMORY, 1, marks=pytest.mark.thorough),
    ],
)
def test_every_call_may_fail(
    several: Callable[..., None],
    device: Any,
    gguf_file: Callable[..., Path],
    how: int,
    stride: int,
) -> None:
    path = gguf_file("small")
    device.idle(True)
    several(4 * GB, 4 * GB)
    expected = work(path)
    n_calls = device.calls()
    failures = 0
    calls = range(1, n_calls + 1, stride)
    for n in calls:
        device.fail_at(n, how)
        message = None
        try:
            assert work(path) == expected
        except (dgemma.OutOfMemoryError, dgemma.BackendError) as failure:
            message = str(failure)
        device.heal()
        if message is not None:
            failures += 1
            assert "CUDA" in message or "GPU" in message
        assert device.alive() == 0, n
    assert failures > len(calls) / 2
    assert work(path) == expected
