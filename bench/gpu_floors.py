"""What a step's kernels cannot be faster than, computed for several GPUs: docs/cuda.md's table.

    python bench/gpu_floors.py [--type q4_0]

Nothing is measured here. A kernel is bound by the memory it reads, at 90 % of the vendor's figure;
by its matrix instructions; or by the instructions that a multiprocessor's four schedulers start,
one each a clock. Of the last, a dense product needs 14.2 for each 16 x 8 x 32 int8 product, as
cuda_resources.py counts: one for the product, eight to scale its sums, the rest to load and to
decode, where a warp uses each weight for 64 tokens. An expert's tile is used for some 20 tokens, 16
on average and then padded to eights, which makes it 17, and 1.25 times as many products.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import gpu
import random_gguf

CANVAS_PAST = 512
MMA_OPERATIONS = 2 * 16 * 8 * 32
DENSE_SLOTS, EXPERT_SLOTS, EXPERT_PADDING = 14.2, 17.0, 1.25


@dataclass(frozen=True)
class Device:
    """Vendor's figures; what mma.sync reaches of int8 on Hopper is 62 % of what wgmma does."""

    name: str
    gb_per_s: float
    multiprocessors: int
    ghz: float
    int8_top_per_s: float
    f16_tflop_per_s: float  # with float32 sums

    def memory_ms(self, n_bytes: float) -> float:
        """Of reading once."""
        return n_bytes / (0.9 * self.gb_per_s) * 1e-6

    def int8_ms(self, operations: float, slots: float) -> tuple[float, str]:
        """Of int8 products, and what binds them."""
        units = operations / self.int8_top_per_s * 1e-9
        clocks = operations / MMA_OPERATIONS * slots / (4 * self.multiprocessors)
        issue = clocks / self.ghz * 1e-6
        return max((units, "matrix units"), (issue, "issue"))


DEVICES = [
    Device("H100", 3350, 132, 1.755, 0.62 * 1979, 0.62 * 990),
    Device("RTX 4090", 1008, 128, 2.52, 660, 165),
    Device("RTX 5090", 1792, 170, 2.41, 838, 210),
]


def attention_flop(p: random_gguf.Preset) -> float:
    """Of scores and sums behind CANVAS_PAST tokens, full heads with 640 numbers a key."""
    keys, flop = p.canvas + CANVAS_PAST, 0.0
    for i in range(p.layers):
        full = i % p.period == p.period - 1
        visible = keys if full else min(keys, p.canvas + p.window - 1)
        dims = 640 + 512 if full else 2 * p.head_dim[0]
        flop += 2.0 * p.heads * p.canvas * visible * dims
    return flop


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--type", choices=random_gguf.TYPES, default="q4_0")
    args = parser.parse_args()
    preset = random_gguf.PRESETS["26b-a4b"]
    work = gpu.work_of(preset, args.type)
    print(f"| kernel | GB | GOP | {' | '.join(device.name for device in DEVICES)} |")
    print("| --- | --- | --- |" + " --- |" * len(DEVICES))
    totals = [0.0] * len(DEVICES)
    for kernel, (n_bytes, operations) in work.items():
        expert = kernel in ("gate_up_kernel", "down_kernel")
        slots, padding = (EXPERT_SLOTS, EXPERT_PADDING) if expert else (DENSE_SLOTS, 1.0)
        cells = []
        for i, device in enumerate(DEVICES):
            bound = max(
                (device.memory_ms(n_bytes), "memory"), device.int8_ms(padding * operations, slots)
            )
            totals[i] += bound[0]
            cells.append(f"{bound[0]:.2f} {bound[1]}")
        row = [f"`{kernel}`", f"{n_bytes / 1e9:.2f}", f"{operations / 1e9:.0f}", *cells]
        print(f"| {' | '.join(row)} |")
    flop = attention_flop(preset)
    cells = []
    for i, device in enumerate(DEVICES):
        ms = flop / device.f16_tflop_per_s * 1e-9
        totals[i] += ms
        cells.append(f"{ms:.2f} matrix units")
    row = [f"`attention_kernel`, {CANVAS_PAST} tokens before", "", f"{flop / 1e9:.0f}", *cells]
    print(f"| {' | '.join(row)} |")
    print(f"| sum | | | {' | '.join(f'{total:.2f}' for total in totals)} |")


if __name__ == "__main__":
    main()
