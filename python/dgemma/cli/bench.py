"""`dgemma bench`: how fast this machine denoises, and how near its own limits."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from .._native import measure_limits
from ..model import DiffusionGemma
from ..values import Limits, Operation
from .shared import Subparsers, add_model_options, load_model, peak_rss_bytes


def add_parser(commands: Subparsers) -> None:
    """Registers the command."""
    parser = commands.add_parser(
        "bench", help="measure speed and memory, beside this machine's measured limits"
    )
    parser.add_argument(
        "--prompt-tokens", metavar="N", type=int, default=512, help="default: %(default)s"
    )
    parser.add_argument(
        "--steps", metavar="N", type=int, default=8, help="steps to measure (default: %(default)s)"
    )
    parser.add_argument("--plot", metavar="F", type=Path, help="draw the operations as SVG")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures and prints."""
    if args.steps < 1 or args.prompt_tokens < 1:
        raise ValueError("--steps and --prompt-tokens must be at least 1")
    began = time.perf_counter()
    with load_model(args) as llm:
        load_s = time.perf_counter() - began
        found = measure(llm, args.prompt_tokens, args.steps, args.threads)
    found["load_s"] = load_s
    if args.plot is not None:
        args.plot.write_text(plot(found), encoding="utf-8")
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        print("\n".join(_lines(found)))
    return 0


def measure(llm: DiffusionGemma, n_prompt: int, n_steps: int, n_threads: int) -> dict[str, Any]:
    """Encodes a random prompt, then denoises: the first step apart, as it also reads the file."""
    session = llm.default_session
    info = llm.info
    n_prompt = min(n_prompt, session.n_ctx - info.canvas_length)
    prompt = np.random.default_rng(0).integers(0, info.n_vocab, n_prompt)
    # A canvas never settles below this bound, so that every step does a step's whole work.
    sampling = dataclasses.replace(info.sampling, confidence_threshold=1e-30)

    # The first step and the first chunk read weights that are not in memory yet.
    session.prefill(prompt[: min(n_prompt, 8)])
    session.begin_canvas(sampling)
    first_step_s = _timed(session.step)
    session.truncate(0)
    prefill_s = _timed(lambda: session.prefill(prompt))

    session.begin_canvas(sampling)
    done = session.step().done  # the one step without self-conditioning
    session.reset_operations()
    times: list[float] = []
    while len(times) < n_steps:
        if done:
            session.begin_canvas(sampling, canvas=len(times))
        began = time.perf_counter()
        done = session.step().done
        times.append(time.perf_counter() - began)
        if sys.stderr.isatty():
            print(f"\rstep {len(times)} of {n_steps}", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    operations = session.operations()
    peak = peak_rss_bytes()  # before the limits are measured, which takes large buffers
    limits = measure_limits(n_threads)
    return {
        "model": os.path.basename(llm.model_path),
        "backend": info.backend_name,
        "threads": n_threads or _physical_cores(),
        "n_ctx": session.n_ctx,
        "prompt_tokens": n_prompt,
        "canvas_length": info.canvas_length,
        "steps": n_steps,
        "step_ms": {
            "median": 1e3 * statistics.median(times),
            "min": 1e3 * min(times),
            "max": 1e3 * max(times),
        },
        "first_step_s": first_step_s,
        "prefill_tokens_per_s": n_prompt / prefill_s,
        "operations": [_operation(o, n_steps) for o in operations],
        "limits": vars(limits),
        "shares": _shares(operations, limits),
        "peak_rss_bytes": peak,
        "peak_vram_bytes": None,
    }


def _timed(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _physical_cores() -> int:
    """What the engine takes when it is not told: the physical cores that this process may use."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        place = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            cores.add(tuple((place / f).read_text() for f in ("physical_package_id", "core_id")))
        except OSError:
            cores.add((str(cpu),))
    return max(1, len(cores))


def _operation(operation: Operation, n_steps: int) -> dict[str, Any]:
    seconds = operation.seconds or float("inf")
    return {
        "name": operation.name,
        "ms": 1e3 * operation.seconds / n_steps,
        "gflop_per_s": operation.flop / seconds / 1e9,
        "gb_per_s": operation.bytes / seconds / 1e9,
    }


def _shares(operations: list[Operation], limits: Limits) -> dict[str, float]:
    """Of the machine's measured limits, what the steps as a whole reached."""
    seconds = sum(o.seconds for o in operations)
    if not seconds:
        return {}
    gb_per_s = sum(o.bytes for o in operations) / seconds / 1e9
    gflop_per_s = sum(o.flop for o in operations) / seconds / 1e9
    reached = {
        "read_gb_per_s": gb_per_s,
        "int8_gop_per_s": gflop_per_s,
        "bf16_gflop_per_s": gflop_per_s,
        "f32_gflop_per_s": gflop_per_s,
    }
    return {n: v / getattr(limits, n) for n, v in reached.items() if getattr(limits, n) > 0}


def _lines(found: dict[str, Any]) -> list[str]:
    step, limits = found["step_ms"], found["limits"]
    lines = [
        f"{found['model']}, {found['backend']}, {found['threads']} threads",
        f"  denoising step  {step['median']:.1f} ms ({step['min']:.1f} to {step['max']:.1f}), "
        f"canvas of {found['canvas_length']} behind {found['prompt_tokens']} tokens",
        f"  prefill         {found['prefill_tokens_per_s']:.1f} tokens/s",
        f"  load            {found['load_s']:.2f} s, first step {found['first_step_s']:.2f} s",
        f"  peak memory     {found['peak_rss_bytes'] / 1e9:.2f} GB",
        f"  {'operation':<24} {'ms':>9} {'GFLOP/s':>9} {'GB/s':>8}",
    ]
    lines += [
        f"  {o['name']:<24} {o['ms']:>9.2f} {o['gflop_per_s']:>9.1f} {o['gb_per_s']:>8.2f}"
        for o in found["operations"]
    ]
    lines.append(
        f"  this machine    reads {limits['read_gb_per_s']:.1f} GB/s; "
        f"int8 {limits['int8_gop_per_s']:.0f} GOP/s, bf16 {limits['bf16_gflop_per_s']:.0f}, "
        f"f32 {limits['f32_gflop_per_s']:.0f} GFLOP/s"
    )
    lines.append(
        "  reached         "
        + ", ".join(f"{name} {100 * share:.0f} %" for name, share in found["shares"].items())
    )
    return lines


def plot(found: dict[str, Any]) -> str:
    """The operations of a step as a bar chart, in SVG."""
    rows = sorted(found["operations"], key=lambda o: -float(o["ms"]))
    longest = max((o["ms"] for o in rows), default=0) or 1.0
    height = 70 + 26 * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="760" height="{height}" fill="white"/>',
        f'<text x="20" y="28" font-size="16">{_escaped(found["model"])}: '
        f"{found['step_ms']['median']:.1f} ms a denoising step</text>",
    ]
    for i, o in enumerate(rows):
        y, width = 50 + 26 * i, max(1.0, 400 * o["ms"] / longest)
        parts += [
            f'<text x="190" y="{y + 15}" text-anchor="end">{_escaped(o["name"])}</text>',
            f'<rect x="200" y="{y}" width="{width:.1f}" height="20" rx="3" fill="#4169b8"/>',
            f'<text x="{208 + width:.1f}" y="{y + 15}">{o["ms"]:.2f} ms</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
