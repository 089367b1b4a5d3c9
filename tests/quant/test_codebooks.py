"""The encoders of IQ2 and IQ3, by their errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from support.quants import CODEBOOKS, KINDS, encoded, gguf_decoded, make_weights, rms, round_trip

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "quant-codebooks.json"


def test_no_error_is_above_llama_cpps() -> None:
    """As measured by bench/quant.py --libggml, which the file's note tells how to run."""
    cells = json.loads(RESULTS.read_text())["errors"]
    assert {cell["type"] for cell in cells} == set(CODEBOOKS)
    compared = [cell for cell in cells if cell["judge_error"] is not None]
    assert len(compared) >= 4 * len(CODEBOOKS)
    assert all(cell["error"] <= cell["judge_error"] for cell in compared)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_errors_are_those_that_were_measured(name: str) -> None:
    """So that a search that gets worse shows without llama.cpp being there."""
    limits = {"iq2_xs": 0.30, "iq2_s": 0.25, "iq3_xxs": 0.185, "iq3_s": 0.135}
    values = make_weights("normal", (4, 1024))
    assert rms(round_trip(values, name) - values) < limits[name] * rms(values)


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("kind", KINDS)
def test_importance_lowers_the_weighted_error(name: str, kind: str) -> None:
    values = make_weights(kind, (3, 512))
    importance = np.random.default_rng(3).lognormal(sigma=1.5, size=512).astype(np.float32)
    plain = rms(round_trip(values, name) - values, importance)
    assert rms(round_trip(values, name, importance=importance) - values, importance) < plain


@pytest.mark.parametrize("name", CODEBOOKS)
def test_zeros_and_what_a_codebook_can_say(name: str) -> None:
    zeros = np.zeros((2, 256), np.float32)
    assert not round_trip(zeros, name).any()
    # What was decoded is encoded again with next to no error.
    once = round_trip(make_weights("normal", (2, 512)), name)
    assert rms(round_trip(once, name) - once) < 0.03 * rms(once)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_no_row_is_worse_than_zeros(name: str) -> None:
    rng = np.random.default_rng(8)
    values = (rng.normal(size=(4, 512)) * 2.0 ** rng.integers(-60, 10, (4, 512))).astype(np.float32)
    data, _ = encoded(values, name)
    found = gguf_decoded(name, data, values.shape)
    blocks = (found - values).reshape(-1, 256)
    assert (np.square(blocks).sum(1) <= np.square(values.reshape(-1, 256)).sum(1)).all()
