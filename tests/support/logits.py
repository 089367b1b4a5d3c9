"""Logits of a canvas by one backend, beside another's."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from support.engine import random_tokens


def canvas_logits(model: Any, name: str, n_prompt: int = 37) -> NDArray[np.float32]:
    """Logits of a canvas, of a second step conditioned on it, and of one after committing it."""
    prompt, canvases = random_tokens(name, n_prompt, n_canvases=1)
    session = model.session()
    session.prefill(prompt)
    first = np.asarray(session.canvas_logits(canvases[0]))
    second = np.asarray(session.canvas_logits(canvases[0][::-1], first / np.float32(0.6)))
    session.prefill(canvases[0])
    third = np.asarray(session.canvas_logits(canvases[0]))
    return np.array([first, second, third])


def median_error(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Error of a position's logits as a share of their spread; the median leaves out positions
    whose experts a rounding has exchanged."""
    error = np.sqrt(np.square(actual - expected).mean(-1))
    return float(np.median(error / expected.std(-1)))
