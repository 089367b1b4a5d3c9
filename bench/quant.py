"""Speed and error of the encoders, per type, beside those of the `gguf` package or of libggml.

    python bench/quant.py [--libggml build/bin/libggml-base.so] [--importance] [--types q4_0,q4_k]

Errors are RMS errors in percent of the weights' own RMS, on four kinds of weights; with
`--importance` also those weighed by the importance that the encoders were given. What is encoded is
decoded by the `gguf` package. With a libggml, which anyone can build from llama.cpp's sources
(`cmake -B build && cmake --build build --target ggml-base`), the last line counts the cells in
which ours is the larger error. Times are nanoseconds per element, the best of several runs, on
normal weights; libggml's encoders run on one thread, so compare with `--threads 1`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from dgemma import _native

TYPES = "f16,bf16,q8_0,q6_k,q5_k,q5_1,q5_0,q4_k,q4_1,q4_0,iq4_nl,iq4_xs,nvfp4,q3_k,q2_k"
KINDS = ("normal", "heavy", "outliers", "tiny")
NEED_IMPORTANCE = ("iq2_xxs", "iq2_xs")  # llama.cpp ends the process where there is none
RUNS = 3
EQUAL = 1e-4  # differences of the errors, relative, that are rounding's and nobody's merit

Floats = npt.NDArray[np.float32]
# Values (rows, columns) and importance (columns) or none, to encoded bytes and a multiplier.
Encoder = Callable[[Floats, Floats | None], tuple[npt.NDArray[np.uint8], float]]


def make_weights(kind: str, n_rows: int, n_cols: int) -> Floats:
    """Weights as bf16 has them. Outliers: every 97th column 30 times larger; tiny: 10⁻⁴."""
    rng = np.random.default_rng(KINDS.index(kind))
    shape = n_rows, n_cols
    values = rng.standard_t(3, size=shape) if kind == "heavy" else rng.normal(size=shape)
    values *= 1e-4 if kind == "tiny" else 0.02
    if kind == "outliers":
        values[:, ::97] *= 30
    bits = values.astype(np.float32).view(np.uint32) & 0xFFFF0000
    return np.ascontiguousarray(bits).view(np.float32)


def make_importance(n_cols: int) -> Floats:
    """Mean squares of activations: spread over several orders of magnitude, as in real models."""
    return np.random.default_rng(9).lognormal(sigma=1.5, size=n_cols).astype(np.float32)


def ours(name: str, threads: int) -> Encoder:
    """This project's encoder."""

    def encode(values: Floats, importance: Floats | None) -> tuple[npt.NDArray[np.uint8], float]:
        return _native.quantize(
            values, "f32", name, *values.shape, importance=importance, with_multiplier=True,
            threads=threads,
        )  # fmt: skip

    return encode


def of_libggml(library: ctypes.CDLL, name: str) -> Encoder:
    """llama.cpp's encoder."""
    number = int(gguf.GGMLQuantizationType[name.upper()])
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip

    def encode(values: Floats, importance: Floats | None) -> tuple[npt.NDArray[np.uint8], float]:
        data = np.empty(values.size // block_size * block_bytes, np.uint8)
        weights = None if importance is None else importance.ctypes.data
        written = library.ggml_quantize_chunk(
            number, values.ctypes.data, data.ctypes.data, 0, *values.shape, weights
        )
        assert written == data.size
        return data, 1.0

    return encode


def of_gguf(name: str) -> Encoder | None:
    """The `gguf` package's encoder, which knows no importance; None where it has none."""
    kind = gguf.GGMLQuantizationType[name.upper()]
    try:
        gguf.quants.quantize(np.zeros((1, 256), np.float32), kind)
    except NotImplementedError:
        return None
    return lambda values, importance: (gguf.quants.quantize(values, kind), 1.0)


def best_time(call: Callable[[], object]) -> float:
    """Seconds of the fastest of several calls."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def decoded(name: str, data: npt.NDArray[np.uint8], multiplier: float, n_rows: int) -> Floats:
    """By the `gguf` package."""
    kind = gguf.GGMLQuantizationType[name.upper()]
    values = gguf.quants.dequantize(data.reshape(n_rows, -1), kind)
    return values.reshape(n_rows, -1) * np.float32(multiplier)


def relative_error(found: Floats, values: Floats, weights: Floats | float = 1.0) -> float:
    """RMS error as a share of the RMS of `values`, both weighed by column."""
    difference = found.astype(np.float64) - values
    wanted = values.astype(np.float64)
    return float(np.sqrt(np.sum(weights * difference**2) / np.sum(weights * wanted**2)))


@dataclass
class Cell:
    """Errors in percent for one type and kind of weights; weighed by importance if it was given."""

    type: str
    weights: str
    importance: bool
    error: float
    judge_error: float | None
    plain_error: float  # not weighed
    judge_plain_error: float | None


def errors(name: str, judge: Encoder | None, shape: tuple[int, int], weighed: bool) -> list[Cell]:
    """One cell for each kind of weights."""
    importance = make_importance(shape[1]) if weighed else None
    cells = []
    for kind in KINDS:
        values = make_weights(kind, *shape)
        found: list[float | None] = []
        for encode in (ours(name, 0), judge):
            if encode is None or (encode is judge and not weighed and name in NEED_IMPORTANCE):
                found += [None, None]
                continue
            back = decoded(name, *encode(values, importance), shape[0])
            by = 1.0 if importance is None else importance
            found += [100 * relative_error(back, values, by), 100 * relative_error(back, values)]
        cells.append(Cell(name, kind, weighed, found[0], found[2], found[1], found[3]))  # type: ignore[arg-type]
    return cells


def speeds(name: str, judge: Encoder | None, shape: tuple[int, int], threads: int) -> list[float]:
    """Nanoseconds per element: ours, the judge's (NaN: none), and our decoder's."""
    values = make_weights("normal", *shape)
    encode = ours(name, threads)
    data, _ = encode(values, None)
    if name in NEED_IMPORTANCE:
        judge = None
    times = [
        best_time(lambda: encode(values, None)),
        best_time(lambda: judge(values, None)) if judge else np.nan,
        best_time(lambda: _native.dequantize(data, name, *shape, threads=threads)),
    ]
    return [1e9 * seconds / values.size for seconds in times]


def print_errors(cells: list[Cell]) -> None:
    """A table: for each kind of weights ours and the judge's."""
    print(f"\n| type | {' | '.join(f'{kind} | judge' for kind in KINDS)} |")
    print(f"| --- |{' --- | --- |' * len(KINDS)}")
    for name in dict.fromkeys(cell.type for cell in cells):
        row = [name.upper()]
        for cell in (c for c in cells if c.type == name):
            row += [f"{cell.error:.4g}"]
            row += ["" if cell.judge_error is None else f"{cell.judge_error:.4g}"]
        print(f"| {' | '.join(row)} |")


def main() -> None:
    """Prints tables, or one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--cols", type=int, default=2816, help="a multiple of 256")
    parser.add_argument("--threads", type=int, default=0, help="0: one a physical core")
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--libggml", type=Path, help="libggml-base.so to compare with")
    parser.add_argument("--importance", action="store_true", help="also with an importance matrix")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    library = None if options.libggml is None else ctypes.CDLL(str(options.libggml.resolve()))
    shape = options.rows, options.cols
    names = options.types.split(",")
    judges = {name: of_libggml(library, name) if library else of_gguf(name) for name in names}
    times = {name: speeds(name, judges[name], shape, options.threads) for name in names}
    plain = [c for name in names for c in errors(name, judges[name], shape, False)]
    weighed = []
    if options.importance:
        weighed = [c for name in names for c in errors(name, judges[name], shape, True)]
    if options.json:
        print(json.dumps({"ns": times, "errors": [asdict(c) for c in plain + weighed]}))
        return

    print("| type | encode, ns | judge | decode |\n| --- | --- | --- | --- |")
    for name, (encode, judge, decode) in times.items():
        print(f"| {name.upper()} | {encode:.2f} | {judge:.2f} | {decode:.2f} |")
    print_errors(plain)
    if weighed:
        print_errors(weighed)
    compared = [c for c in plain + weighed if c.judge_error is not None]
    worse = [c for c in compared if c.error > (1 + EQUAL) * c.judge_error]  # type: ignore[operator]
    print(f"\nlarger error than the judge's in {len(worse)} of {len(compared)} cells")
    for c in worse:
        with_importance = ", importance" if c.importance else ""
        print(f"  {c.type}, {c.weights}{with_importance}: {c.error:.5g} to {c.judge_error:.5g}")


if __name__ == "__main__":
    main()
