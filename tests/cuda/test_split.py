"""Models divided between an (emulated) GPU and the CPU, and the memory that is planned for it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import dgemma
from dgemma._native import Model
from support.engine import open_model, random_tokens

MIB = 1 << 20
RESERVE = 256 * MIB  # DG_GPU_RESERVE
STAGING = 64 * MIB


def canvas_logits(model: Any, name: str) -> NDArray[np.float32]:
    """Logits of a canvas, and of a second step conditioned on it, behind a prompt in batches."""
    prompt, canvases = random_tokens(name, 19, n_canvases=1)
    session = model.session()
    session.prefill(prompt)
    first = np.asarray(session.canvas_logits(canvases[0]))
    second = np.asarray(session.canvas_logits(canvases[0][::-1], first / np.float32(0.6)))
    return np.array([first, second])


def answer(model: Any, **options: Any) -> tuple[list[int], list[int]]:
    settings = {"max_tokens": 30, "seed": 3, "max_denoising_steps": 5, **options}
    out = model.generate([1, 2, 3, 4, 5], **settings)
    return list(out.tokens), list(out.stats.steps)


# "narrow" has six layers, of both kinds at both ends; "odd" four.
SPLITS = [("narrow", 0, 0), ("narrow", 4, 0), ("odd", 4, 4), ("odd", 3, 2)]
MORE = [("narrow", layers, 0) for layers in (1, 2, 3, 5)]
MORE += [("narrow", 99, experts) for experts in (1, 3, 6)]
MORE += [("odd", 4, experts) for experts in (1, 2, 3)] + [("odd", 2, 1), ("odd", 3, 99)]
SPLITS += [pytest.param(*split, marks=pytest.mark.thorough) for split in MORE]


@pytest.mark.parametrize(("name", "n_gpu_layers", "n_cpu_moe"), SPLITS)
def test_every_split_agrees_with_the_cpu(
    cuda: Callable[..., Any],
    gguf_file: Callable[..., Path],
    name: str,
    n_gpu_layers: int,
    n_cpu_moe: int,
) -> None:
    path = gguf_file(name)
    expected = canvas_logits(open_model(path, n_ctx=256), name)
    model = cuda(path, n_gpu_layers=n_gpu_layers, n_cpu_moe=n_cpu_moe, n_batch=16)
    n_layers = model.info.n_layers
    assert model.info.backend == "cuda"
    assert model.info.n_gpu_layers == min(n_gpu_layers, n_layers)
    assert model.info.n_cpu_moe == min(n_cpu_moe, n_layers)
    actual = canvas_logits(model, name)
    assert np.abs(actual - expected).max() < 2e-4 * np.abs(expected).max()
    whole = n_gpu_layers >= n_layers and n_cpu_moe == 0
    assert ("cpu" in model.info.backend_name) == (not whole)
    assert (model.info.backend_note == "") == whole


@pytest.mark.thorough
@pytest.mark.parametrize(("n_gpu_layers", "n_cpu_moe"), [(0, 0), (2, 0), (3, 2), (4, 4)])
def test_every_split_gives_the_same_text(
    cuda: Callable[..., Any], gguf_file: Callable[..., Path], n_gpu_layers: int, n_cpu_moe: int
) -> None:
    path = gguf_file("odd")
    model = cuda(path, n_gpu_layers=n_gpu_layers, n_cpu_moe=n_cpu_moe)
    assert answer(model) == answer(open_model(path, n_ctx=256))


def test_a_saved_session_goes_from_one_split_to_another(
    cuda: Callable[..., Any], gguf_file: Callable[..., Path], tmp_path: Path
) -> None:
    path, saved = gguf_file("odd"), tmp_path / "session"
    prompt, canvases = random_tokens("odd", 40, n_canvases=1)
    one = cuda(path, n_gpu_layers=3).session()
    one.prefill(prompt)
    one.truncate(36)
    expected = one.canvas_logits(canvases[0])
    one.save(saved)
    for split in ({"n_gpu_layers": 1}, {"n_cpu_moe": 2}, {"backend": "cpu"}):
        other = cuda(path, **split).session()
        other.load(saved)
        assert other.n_past == 36
        np.testing.assert_allclose(other.canvas_logits(canvases[0]), expected, atol=2e-3)


def planned(path: Path, **given: Any) -> Any:
    with Model(path, backend="cpu") as model:
        return model.gpu_plan(n_ctx=256, type_k="f32", type_v="f32", **given)


def test_auto_takes_what_fits(
    cuda: Callable[..., Any],
    device: Any,
    gguf_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = gguf_file("wide")
    device.idle(True)
    # Experts leave the GPU first, then whole layers; each limit is just what one division needs.
    divisions = [(5, 0), (5, 2), (5, 5), (2, 5), (0, 5)]
    for layers, experts in divisions:
        plan = planned(path, n_gpu_layers=layers, n_cpu_moe=experts)
        for spare, fits in ((0, True), (-1, False)):
            limit = plan.total + spare
            monkeypatch.setenv("DGEMMA_EMULATION_MEMORY", str(limit))
            chosen = planned(path, available=limit) if fits or layers + 5 - experts > 0 else None
            if chosen is None:  # less than the embedding and the head
                with pytest.raises(dgemma.OutOfMemoryError, match="embedding"):
                    planned(path, available=limit)
                with pytest.raises(dgemma.OutOfMemoryError, match="embedding"):
                    cuda(path)
                on_cpu = cuda(path, backend="auto")
                assert on_cpu.info.backend == "cpu"
                assert "embedding" in on_cpu.info.backend_note
                continue
            assert ((chosen.n_gpu_layers, chosen.n_cpu_moe) == (layers, experts)) == fits
            model = cuda(path)
            assert (model.info.n_gpu_layers, model.info.n_cpu_moe) == (
                chosen.n_gpu_layers,
                chosen.n_cpu_moe,
            )
            assert (model.info.backend_note == "") == (chosen.n_cpu_moe == 0)
            model.close()
            del model
            assert device.allocated() == 0


def test_auto_keeps_the_experts_that_were_asked_for_on_the_cpu(
    cuda: Callable[..., Any], gguf_file: Callable[..., Path]
) -> None:
    model = cuda(gguf_file("odd"), n_cpu_moe=2)
    assert (model.info.n_gpu_layers, model.info.n_cpu_moe) == (4, 2)


@pytest.mark.parametrize("name", ["odd", "wide"])
@pytest.mark.parametrize("outtype", ["f32", "q8_0", "nvfp4"])
@pytest.mark.parametrize("split", [{}, {"n_gpu_layers": 2}, {"n_gpu_layers": 3, "n_cpu_moe": 2}])
def test_what_is_planned_is_what_is_allocated(
    cuda: Callable[..., Any],
    device: Any,
    gguf_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    outtype: str,
    split: dict[str, int],
) -> None:
    monkeypatch.setenv("DGEMMA_EMULATION_FP4", "1")  # which only the device knows, not the plan
    path = gguf_file(name, outtype)
    with Model(path, backend="cpu") as model:
        layers = {"n_gpu_layers": model.info.n_layers, **split}
        plans = {
            n_ctx: model.gpu_plan(n_ctx=n_ctx, n_batch=300, type_k="f16", type_v="q8_0", **layers)
            for n_ctx in (64, 700)
        }
    device.idle(True)
    gc.collect()
    assert device.allocated() == 0
    device.peak()
    weights = Model(path, backend="cuda", **layers)
    assert device.allocated() == plans[64].weights == plans[700].weights
    assert device.peak() == plans[64].weights + STAGING
    for n_ctx, plan in plans.items():
        session = dgemma._native.Session(
            weights, n_ctx=n_ctx, n_batch=300, type_k="f16", type_v="q8_0"
        )
        took = device.allocated() - plan.weights
        # The emulated device has 4 multiprocessors; a plan without a device reckons with more.
        assert took <= plan.cache + plan.scratch
        assert plan.cache + plan.scratch - took < 32 * MIB
        assert plan.total == plan.weights + max(plan.cache + plan.scratch, STAGING) + RESERVE
        session.prefill([1, 2, 3])
        session.begin_canvas(weights.info.sampling, seed=1)
        session.step()
        session.step()
        assert device.allocated() - plan.weights == took  # nothing is allocated while it works
        del session
        assert device.allocated() == plan.weights
    weights.close()
    del weights
    assert device.alive() == 0
