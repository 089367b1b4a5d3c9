"""Error of activations in one, two and three FP4 terms, beside int8 and E4M3.

    python bench/fp4_activations.py

A term of NVFP4 is E2M1 with an E4M3 scale for each 16 values, after one float32 factor per row
(native/cuda/formats/fp4.cuh); int8 and E4M3 have a float32 scale for each 32. Printed is the
root mean square of the error of a row of 2816, as a share of that of its values.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def e4m3(x: Floats) -> Floats:
    """The nearest E4M3 of 0 ≤ x."""
    exponent = np.floor(np.log2(np.maximum(x, 2.0**-6)))
    step = 2.0 ** (exponent - 3)
    return np.minimum(np.round(x / step) * step, 448)


def fp4(x: Floats) -> Floats:
    """Rows as one term."""
    groups = x.reshape(-1, 16)
    scale = e4m3(np.abs(groups).max(1, keepdims=True) / 6)
    scaled = groups / np.where(scale > 0, scale, 1)
    codes = np.abs(np.abs(scaled)[..., None] - E2M1).argmin(-1)
    return (np.sign(scaled) * E2M1[codes] * scale).reshape(x.shape)


def terms(x: Floats, n: int) -> Floats:
    """Rows as the sum of n terms, each of what the ones before it leave."""
    scaled = x * (448 * 6 / np.abs(x).max(1, keepdims=True))
    total = np.zeros_like(x)
    for _ in range(n):
        total = total + fp4(scaled - total)
    return total / (448 * 6 / np.abs(x).max(1, keepdims=True))


def int8(x: Floats) -> Floats:
    """Int8 with a scale for each 32."""
    groups = x.reshape(-1, 32)
    scale = np.abs(groups).max(1, keepdims=True) / 127
    return (np.round(groups / scale) * scale).reshape(x.shape)


def fp8(x: Floats) -> Floats:
    """E4M3 with a scale for each 32."""
    groups = x.reshape(-1, 32)
    scale = np.abs(groups).max(1, keepdims=True) / 448
    return (np.sign(groups) * e4m3(np.abs(groups) / scale) * scale).reshape(x.shape)


def main() -> None:
    """Prints the table."""
    rng = np.random.default_rng(0)
    rows = {
        "Gaussian": rng.standard_normal((64, 2816)),
        "Student, 3 degrees": rng.standard_t(3, (64, 2816)),
        "Laplace, cubed": rng.laplace(size=(64, 2816)) ** 3,
    }
    print("| rows | int8 | E4M3 | one FP4 term | two | three |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, x in rows.items():
        forms = (int8(x), fp8(x), terms(x, 1), terms(x, 2), terms(x, 3))
        shares = (np.sqrt(np.square(form - x).sum() / np.square(x).sum()) for form in forms)
        print(f"| {name} | {' | '.join(f'{share:.2%}' for share in shares)} |")


if __name__ == "__main__":
    main()
