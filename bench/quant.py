"""Speed and error of the encoders, per type, beside those of the `gguf` package.

    python bench/quant.py [--rows N] [--cols N] [--threads N] [--types q4_0,q4_k] [--json]

Input are normally distributed bf16 weights, as a checkpoint has them. Errors are RMS errors in
percent of the weights' own RMS. The `gguf` package encodes few of the types: the others' column
stays empty. Times are the best of several runs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import gguf
import numpy as np

from dgemma import _native

TYPES = "f16,q8_0,q6_k,q5_k,q5_1,q5_0,q4_k,q4_1,q4_0,iq4_nl,iq4_xs,nvfp4,q3_k,q2_k"
RUNS = 3


def best_time(call: Callable[[], object]) -> float:
    """Seconds of the fastest of several calls."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def relative_error(decoded: np.ndarray, values: np.ndarray) -> float:
    """RMS error as a share of the RMS of `values`."""
    difference = decoded.astype(np.float64) - values
    return float(np.sqrt(np.mean(difference**2) / np.mean(values.astype(np.float64) ** 2)))


def measure(name: str, weights: np.ndarray, threads: int) -> dict[str, float | str | None]:
    """Encode and decode `weights` (rows, columns), bf16 bits, and time both."""
    shape = weights.shape
    values = _native.dequantize(weights, "bf16", *shape)
    kind = gguf.GGMLQuantizationType[name.upper()]

    def encode() -> tuple[np.ndarray, float]:
        return _native.quantize(
            weights, "bf16", name, *shape, with_multiplier=True, threads=threads
        )

    data, multiplier = encode()
    rows = data.reshape(shape[0], -1)
    result: dict[str, float | str | None] = {
        "type": name,
        "encode_s": best_time(encode),
        "decode_s": best_time(lambda: _native.dequantize(data, name, *shape, threads=threads)),
        "error": relative_error(gguf.quants.dequantize(rows, kind) * multiplier, values),
        "gguf_encode_s": None,
        "gguf_error": None,
    }
    try:
        judge = gguf.quants.quantize(values, kind)
    except NotImplementedError:
        return result
    result["gguf_encode_s"] = best_time(lambda: gguf.quants.quantize(values, kind))
    result["gguf_error"] = relative_error(gguf.quants.dequantize(judge, kind), values)
    return result


def main() -> None:
    """Print a line for each type, or one JSON object."""
    parser = argparse.ArgumentParser(description="Speed and error of the encoders.")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--cols", type=int, default=2816, help="a multiple of 256")
    parser.add_argument("--threads", type=int, default=0, help="0: one a physical core")
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    values = np.random.default_rng(0).normal(scale=0.02, size=(options.rows, options.cols))
    weights = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    results = [measure(name, weights, options.threads) for name in options.types.split(",")]
    if options.json:
        print(json.dumps({"elements": weights.size, "types": results}))
        return
    print("type     encode Mel/s   MB/s in   decode Mel/s   error %    gguf: Mel/s   error %")
    for r in results:
        line = (
            f"{r['type']:8} {weights.size / r['encode_s'] / 1e6:12.0f} "
            f"{weights.nbytes / r['encode_s'] / 1e6:9.0f} "
            f"{weights.size / r['decode_s'] / 1e6:14.0f} {100 * r['error']:9.3f}"
        )
        if r["gguf_error"] is not None:
            line += f"{weights.size / r['gguf_encode_s'] / 1e6:15.1f} {100 * r['gguf_error']:9.3f}"
        print(line)


if __name__ == "__main__":
    main()
