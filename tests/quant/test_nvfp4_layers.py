"""NVFP4 on trained weights: every matrix of models/tiny, beside plain amax and four-over-six."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf.quants import NVFP4

from dgemma.quants import dequantize, quantize
from dgemma_convert.safetensors_file import SafetensorsFile
from dgemma_convert.sources import read_floats

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def matrices(tiny: Path) -> Iterator[tuple[str, np.ndarray]]:
    file = SafetensorsFile(tiny / "model.safetensors")
    try:
        for name, tensor in file.tensors.items():
            if len(tensor.shape) > 1 and tensor.shape[-1] % 64 == 0 and "vision" not in name:
                yield name, read_floats(tensor).reshape(-1, tensor.shape[-1])
    finally:
        file.close()


def blockwise(values: np.ndarray, tops: tuple[int, ...]) -> np.ndarray:
    """Groups of 16 whose largest element lies on one of `tops`, whichever errs less."""
    multiplier = np.abs(values).max() / (6 * 448)
    groups = (values / multiplier).reshape(-1, 16)
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


def test_error_is_below_plain_amax_and_four_over_six_in_every_matrix(tiny: Path) -> None:
    n_matrices, worst = 0, 0.0
    for name, values in matrices(tiny):
        data, multiplier = quantize(values, "f32", "nvfp4", *values.shape, with_multiplier=True)
        ours = dequantize(data, "nvfp4", *values.shape) * np.float32(multiplier)
        error = float(np.square(ours - values).sum())
        plain = float(np.square(blockwise(values, (6,)) - values).sum())
        four_over_six = float(np.square(blockwise(values, (6, 4)) - values).sum())
        assert error < plain, name
        assert error < four_over_six, name
        n_matrices, worst = n_matrices + 1, max(worst, error / four_over_six)
    print(f"{n_matrices} matrices; at most {worst:.3f} of the squared error of four-over-six")
    assert n_matrices >= 30
