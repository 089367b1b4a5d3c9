"""NVFP4 on trained weights: every matrix of models/tiny, beside plain amax and four-over-six."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.quants import NVFP4

from dgemma.quants import dequantize, quantize
from dgemma_convert.safetensors_file import SafetensorsFile
from dgemma_convert.sources import read_floats

TIES = 1e-4
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def matrices(tiny: Path) -> Iterator[tuple[str, np.ndarray]]:
    file = SafetensorsFile(tiny / "model.safetensors")
    try:
        for name, tensor in file.tensors.items():
            if len(tensor.shape) > 1 and tensor.shape[-1] % 64 == 0 and "vision" not in name:
                yield name, read_floats(tensor).reshape(-1, tensor.shape[-1])
    finally:
        file.close()


def blockwise(values: np.ndarray, multiplier: float, tops: tuple[int, ...]) -> np.ndarray:
    """Groups of 16 whose largest element lies on one of `tops`, whichever errs less."""
    groups = (values / np.float32(multiplier)).reshape(-1, 16)
    best, error = np.zeros_like(groups), np.full(len(groups), np.inf)
    for top in tops:
        scales = 2 * NVFP4.ue4m3_to_fp32(NVFP4.fp32_to_ue4m3(np.abs(groups).max(1) / top))
        units = np.abs(groups) / np.maximum(scales, 1e-30)[:, None]
        nearest = E2M1[np.abs(units[..., None] - E2M1).argmin(-1)]
        found = np.sign(groups) * nearest * scales[:, None]
        errors = np.square(found - groups).sum(1)
        best[errors < error] = found[errors < error]
        error = np.minimum(error, errors)
    return best.reshape(values.shape) * np.float32(multiplier)


def decoded(values: np.ndarray, multiplier: float | None = None, **options: Any) -> np.ndarray:
    """Encoded and decoded, with the multiplier that is given or else the one that is found."""
    fixed = np.float32(1 if multiplier is None else multiplier)
    units = values if multiplier is None else (values / fixed).clip(-6 * 448, 6 * 448)
    data, found = quantize(
        units, "f32", "nvfp4", *values.shape, with_multiplier=multiplier is None, **options
    )
    return dequantize(data, "nvfp4", *values.shape) * (fixed * np.float32(found))


def least_multiplier(values: np.ndarray) -> float:
    """The one that puts the largest element on 6 times 448."""
    return float(np.abs(values).max() / np.float32(6 * 448))


def squares(found: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.square(found.astype(np.float64) - values)


def test_error_is_below_plain_amax_and_four_over_six_in_every_matrix(tiny: Path) -> None:
    n_matrices, worst = 0, 0.0
    for name, values in matrices(tiny):
        least = least_multiplier(values)
        importance = np.random.default_rng(4).lognormal(sigma=1.5, size=values.shape[1])
        # As published, four-over-six leaves room for scales that are half as large again.
        others = {
            "plain": blockwise(values, least, (6,)),
            "four over six": blockwise(values, least, (6, 4)),
            "four over six with room": blockwise(values, least * 448 / 256, (6, 4)),
        }
        for weights in (None, importance):
            w = 1.0 if weights is None else weights
            error = float((w * squares(decoded(values, importance=weights), values)).sum())
            for other, found in others.items():
                its = float((w * squares(found, values)).sum())
                assert error < its, f"{name}: {other}"
                if other == "four over six" and weights is None:
                    worst = max(worst, error / its)
        n_matrices += 1
    print(f"{n_matrices} matrices; at most {worst:.3f} of the squared error of four-over-six")
    assert n_matrices >= 30


def test_no_group_errs_more_than_with_four_over_six(tiny: Path) -> None:
    """Both of its scales are among those that are tried, for any multiplier."""
    for name, values in matrices(tiny):
        for room in (1.0, 448 / 256):
            multiplier = least_multiplier(values) * room
            ours = squares(decoded(values, multiplier), values).reshape(-1, 16).sum(1)
            theirs = squares(blockwise(values, multiplier, (6, 4)), values).reshape(-1, 16).sum(1)
            # Equal errors may differ by the rounding of an element that lies between two levels.
            assert (ours <= theirs * (1 + TIES)).all(), name


def test_the_multiplier_is_the_best_of_those_tried(tiny: Path) -> None:
    n_matrices, n_better, total = 0, 0, 0.0
    for name, values in matrices(tiny):
        values = values[: 16 * 4096 // values.shape[1]]  # what is tried as a whole
        importance = np.random.default_rng(5).lognormal(sigma=1.0, size=values.shape[1])
        least = least_multiplier(values)
        for weights in (None, importance):
            w = 1.0 if weights is None else weights
            error = float((w * squares(decoded(values, importance=weights), values)).sum())
            tried = [
                float(
                    (
                        w
                        * squares(decoded(values, least * (1 + i / 16), importance=weights), values)
                    ).sum()
                )
                for i in (0, 5, 11)
            ]
            assert all(error <= its * (1 + TIES) for its in tried), name
            n_matrices += 1
            n_better += error < tried[0] * (1 - TIES)
            total += error / tried[0]
    print(
        f"{n_better} of {n_matrices} better than with the least multiplier, on average by "
        f"{1 - total / n_matrices:.2%}"
    )
    assert n_better > n_matrices / 2


def test_a_multiplier_is_not_chosen_by_chance() -> None:
    """Of a large matrix samples are tried: on those the least multiplier must not lose by luck."""
    for seed in range(3):
        values = np.random.default_rng(seed).standard_t(3, (128, 2816)).astype(np.float32)
        least = least_multiplier(values)
        error, its = (
            squares(decoded(values), values).sum(),
            squares(decoded(values, least), values).sum(),
        )
        assert error <= its * (1 + TIES)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_scales_that_are_no_numbers_are_zero(code: int) -> None:
    blocks = np.random.default_rng(6).integers(0, 256, (5, 36), np.uint8)
    blocks[:, :4] = 0x38
    blocks[1:3, 2] = code
    found = dequantize(blocks, "nvfp4", 1, 320).reshape(5, 4, 16)
    blocks[1:3, 2] = 0
    np.testing.assert_array_equal(found, dequantize(blocks, "nvfp4", 1, 320).reshape(5, 4, 16))
    assert not found[1:3, 2].any()
    assert all(group.any() for group in (found[0], found[1, 1]))
