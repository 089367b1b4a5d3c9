"""The engine as tests use it: models that compute in float32 wherever their file does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import dgemma


def open_model(path: Path, **options: Any) -> dgemma.DiffusionGemma:
    """A model on one CPU thread with a float32 cache, unless `options` say otherwise."""
    defaults = {"n_ctx": 1024, "type_k": "f32", "type_v": "f32", "backend": "cpu", "n_threads": 1}
    return dgemma.DiffusionGemma(path, **{**defaults, **options})


def random_tokens(
    name: str, n_prompt: int, n_canvases: int = 3, seed: int = 0
) -> tuple[list[int], list[list[int]]]:
    """A prompt and canvases for the model of spec `name`."""
    from support.checkpoints import CALM, SPECS  # which needs PyTorch

    spec = {**SPECS, **CALM}[name]
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, spec.vocab, n_prompt).tolist()
    return prompt, rng.integers(0, spec.vocab, (n_canvases, spec.canvas)).tolist()


def conversation(
    judged: Any, prompt: Sequence[int], canvases: Sequence[list[int]], temperature: float = 0.6
) -> NDArray[np.float32]:
    """Logits of each canvas without and with self-conditioning, each canvas then committed.

    `judged` is a session of the engine, a Reference or a NumpyModel. The result has the shape
    (2 · canvases, canvas length, vocabulary).
    """
    judged.prefill(prompt)
    logits = []
    for canvas in canvases:
        first = np.asarray(judged.canvas_logits(canvas), np.float32)
        second = judged.canvas_logits(canvas[::-1], first / np.float32(temperature))
        logits += [first, np.asarray(second, np.float32)]
        judged.prefill(canvas)
    return np.array(logits)


def statistics(
    logits: NDArray[np.float32], temperature: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """z = logits / T in float64, softmax(z) and its entropies in nats."""
    z = logits.astype(np.float64) / temperature
    z -= z.max(-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return np.exp(log_p), -(np.exp(log_p) * log_p).sum(-1)
