"""`dgemma bench`: how fast this machine denoises, and how near its own limits."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._native import Session, measure_limits
from ..errors import Error
from ..model import DiffusionGemma
from ..values import Limits, Operation, Sampling
from .shared import Subparsers, add_model_options, load_model, peak_rss_bytes

LONG_S = 3.0
"""A prefill that takes longer is measured once, a shorter one PREFILL_RUNS times."""
PREFILL_RUNS = 3


def add_parser(commands: Subparsers) -> None:
    """Registers the command."""
    parser = commands.add_parser(
        "bench", help="measure speed and memory, beside this machine's measured limits"
    )
    parser.add_argument(
        "--prompt-tokens",
        metavar="N,…",
        type=_lengths,
        default=[512],
        help="prompt lengths to encode; steps are measured behind the first (default: 512)",
    )
    parser.add_argument(
        "--context",
        metavar="N,…",
        type=_lengths,
        default=[],
        help="measure steps behind so many tokens too, without encoding them: their keys and "
        "values are random",
    )
    parser.add_argument(
        "--steps", metavar="N", type=int, default=8, help="steps to measure (default: %(default)s)"
    )
    parser.add_argument(
        "--plot", metavar="F", type=Path, help="draw the figures; F ends with .svg, .png or .pdf"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_options(parser)
    parser.set_defaults(run=run)


def _lengths(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def run(args: argparse.Namespace) -> int:
    """Measures and prints."""
    if args.steps < 1 or min(args.prompt_tokens) < 1:
        raise ValueError("--steps and --prompt-tokens must be at least 1")
    if min(args.context, default=0) < 0:
        raise ValueError("--context must be 0 or more")
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise Error("--plot needs matplotlib: pip install 'dgemma[bench]'")
    began = time.perf_counter()
    with load_model(args) as llm:
        found = measure(llm, args.prompt_tokens, args.context, args.steps, began)
    if args.plot is not None:
        plot(found, args.plot)
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        print("\n".join(_lines(found)))
    return 0


def measure(
    llm: DiffusionGemma,
    prompt_tokens: Sequence[int],
    contexts: Sequence[int],
    n_steps: int,
    began: float,
) -> dict[str, Any]:
    """The figures of a model whose loading began at `began` (of `time.perf_counter`)."""
    load_s = time.perf_counter() - began
    session, info = llm.default_session, llm.info
    sampling = dataclasses.replace(
        info.sampling,
        # So that a canvas never settles and no step is the last, which does less work.
        confidence_threshold=1e-30,
        max_denoising_steps=max(info.sampling.max_denoising_steps, n_steps + 2),
    )
    session.begin_canvas(sampling)
    stepping = time.perf_counter()
    session.step()
    first_step_s = time.perf_counter() - began
    first_step_ms = 1e3 * (time.perf_counter() - stepping)

    prefill = []
    for n in prompt_tokens:
        with _session_for(llm, n) as fitting:
            prefill.append(_measure_prefill(fitting, n, info.n_vocab))
    session.truncate(0)
    n_past = min(prompt_tokens[0], session.n_ctx - info.canvas_length)
    session.append_random(n_past)
    times, operations = _measure_steps(session, sampling, n_steps)
    plan = llm.gpu_plan()
    peak = peak_rss_bytes()  # before longer contexts and the limits take memory of their own

    behind = []
    for n in contexts:
        with _session_for(llm, n) as fitting:
            fitting.truncate(0)
            fitting.append_random(n)
            measured = _measure_steps(fitting, sampling, n_steps)
        behind.append({"n_past": n, "step_ms": _spread(measured[0]), "work": measured[1]})

    limits = measure_limits(session.n_threads)
    for entry in [*prefill, *behind]:
        entry["operations"] = [_operation(o, limits) for o in entry.pop("work")]
    return {
        "model": os.path.basename(llm.model_path),
        "file_bytes": os.path.getsize(llm.model_path),
        "backend": info.backend_name,
        "threads": session.n_threads,
        "n_ctx": session.n_ctx,
        "canvas_length": info.canvas_length,
        "load_s": load_s,
        "first_step_s": first_step_s,
        "first_step_ms": first_step_ms,
        "prompt_tokens": prompt_tokens[0],
        "prefill_tokens_per_s": prefill[0]["tokens_per_s"],
        "prefill": prefill,
        "steps": n_steps,
        "step_ms": _spread(times),
        "operations": [_operation(o, limits) for o in operations],
        "contexts": behind,
        "limits": vars(limits),
        "shares": _shares(operations, limits),
        "peak_rss_bytes": peak,
        "peak_vram_bytes": plan.weights + plan.cache + plan.scratch if plan else None,
    }


@contextlib.contextmanager
def _session_for(llm: DiffusionGemma, n_past: int) -> Iterator[Session]:
    """A session with room for a canvas behind so many tokens: the model's own where that fits."""
    own = llm.default_session
    n_ctx = n_past + llm.info.canvas_length
    if n_ctx <= own.n_ctx:
        yield own
        return
    if n_ctx > llm.info.context_length:
        raise ValueError(
            f"{n_past} tokens and a canvas are more than the model's context of "
            f"{llm.info.context_length}"
        )
    with llm.session(n_ctx=n_ctx) as larger:
        yield larger


def _measure_prefill(session: Session, n: int, n_vocab: int) -> dict[str, Any]:
    prompt = np.random.default_rng(0).integers(0, n_vocab, n)
    times: list[float] = []
    while not times or (len(times) < PREFILL_RUNS and times[0] < LONG_S):
        session.truncate(0)
        session.reset_operations()
        began = time.perf_counter()
        session.prefill(prompt)
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times)
    return {
        "tokens": n,
        "tokens_per_s": n / seconds,
        "ms": _spread(times),
        "work": session.operations(),  # of the last run
    }


def _measure_steps(
    session: Session, sampling: Sampling, n_steps: int
) -> tuple[list[float], list[Operation]]:
    """Seconds of each step behind what is cached, and the work of one step on average."""
    session.begin_canvas(sampling)
    session.step()  # the only one without self-conditioning
    session.reset_operations()
    times: list[float] = []
    while len(times) < n_steps:
        began = time.perf_counter()
        session.step()
        times.append(time.perf_counter() - began)
        if sys.stderr.isatty():
            print(f"\rstep {len(times)} of {n_steps}", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return times, [
        dataclasses.replace(
            o, seconds=o.seconds / n_steps, flop=o.flop / n_steps, bytes=o.bytes / n_steps
        )
        for o in session.operations()
        if o.calls > 0
    ]


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds."""
    return {
        "median": 1e3 * statistics.median(seconds),
        "min": 1e3 * min(seconds),
        "max": 1e3 * max(seconds),
    }


def _operation(operation: Operation, limits: Limits) -> dict[str, Any]:
    seconds = operation.seconds or float("inf")
    return {
        "name": operation.name,
        "ms": 1e3 * operation.seconds,
        "gflop_per_s": operation.flop / seconds / 1e9,
        "gb_per_s": operation.bytes / seconds / 1e9,
        "shares": _shares([operation], limits),
    }


def _shares(operations: Sequence[Operation], limits: Limits) -> dict[str, float]:
    """What operations reached of each of the machine's limits, all their work counted as one kind.

    Most products are of int8, attention is of floats: the share of a unit that does not do the
    work may be more than 1.
    """
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
    limits = found["limits"]
    lines = [
        f"{found['model']}, {found['backend']}, {found['threads']} threads",
        f"  load            {found['load_s']:.2f} s, first step done after "
        f"{found['first_step_s']:.2f} s (it took {found['first_step_ms']:.0f} ms)",
        f"  peak memory     {found['peak_rss_bytes'] / 1e9:.2f} GB for a file of "
        f"{found['file_bytes'] / 1e9:.2f} GB and a context of {found['n_ctx']}",
    ]
    if found["peak_vram_bytes"] is not None:
        lines.append(f"  GPU memory      {found['peak_vram_bytes'] / 1e9:.2f} GB")
    lines += [
        f"  prefill         {p['tokens_per_s']:.1f} tokens/s for {p['tokens']} tokens"
        for p in found["prefill"]
    ]
    steps = [{"n_past": found["prompt_tokens"], "step_ms": found["step_ms"]}, *found["contexts"]]
    lines += [
        f"  denoising step  {s['step_ms']['median']:.1f} ms ({s['step_ms']['min']:.1f} to "
        f"{s['step_ms']['max']:.1f}), canvas of {found['canvas_length']} behind "
        f"{s['n_past']} tokens"
        for s in steps
    ]
    lines.append(
        f"  {'operation':<24} {'ms':>9} {'GFLOP/s':>9} {'GB/s':>8} {'of int8':>8} {'of read':>8}"
    )
    lines += [
        f"  {o['name']:<24} {o['ms']:>9.2f} {o['gflop_per_s']:>9.1f} {o['gb_per_s']:>8.2f}"
        f" {_percent(o['shares'], 'int8_gop_per_s')} {_percent(o['shares'], 'read_gb_per_s')}"
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


def _percent(shares: dict[str, float], name: str) -> str:
    return f"{100 * shares[name]:>6.1f} %" if name in shares else f"{'':>8}"


def plot(found: dict[str, Any], path: Path) -> None:
    """Draws where a step's time goes, and how steps and prefill grow, in the format of `path`."""
    from matplotlib.figure import Figure

    curves = [
        (
            "ms a step",
            "tokens before the canvas",
            [(c["n_past"], c["step_ms"]["median"]) for c in found["contexts"]],
        ),
        (
            "prefill, tokens/s",
            "prompt tokens",
            [(p["tokens"], p["tokens_per_s"]) for p in found["prefill"]],
        ),
    ]
    curves = [curve for curve in curves if len(curve[2]) > 1]
    figure = Figure(figsize=(9, 4 + 3 * bool(curves)), layout="constrained")
    rows = figure.subfigures(1 + bool(curves), 1, squeeze=False)[:, 0]
    operations = sorted(found["operations"], key=lambda o: float(o["ms"]))
    axes = rows[0].subplots()
    bars = axes.barh([o["name"] for o in operations], [o["ms"] for o in operations])
    axes.bar_label(bars, [_bar_label(o) for o in operations], padding=3)
    axes.margins(x=0.25)
    axes.set_xlabel("ms a step")
    axes.set_title(
        f"{found['model']}, {found['backend']}, {found['threads']} threads: "
        f"{found['step_ms']['median']:.0f} ms a denoising step"
    )
    if curves:
        for axes, (label, of, points) in zip(
            rows[1].subplots(1, len(curves), squeeze=False)[0], curves, strict=True
        ):
            axes.plot(*zip(*sorted(points), strict=True), marker="o")
            axes.set(xlabel=of, ylabel=label, ylim=(0, None))
    try:
        figure.savefig(path)
    except ValueError as problem:  # an ending that names no format
        raise Error(f"--plot {path}: {problem}") from None


def _bar_label(operation: dict[str, Any]) -> str:
    share = operation["shares"].get("int8_gop_per_s", 0.0)
    return f"{operation['ms']:.1f} ms" + (f", {100 * share:.0f} % of int8" if share else "")
