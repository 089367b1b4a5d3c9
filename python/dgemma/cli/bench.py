"""`dgemma bench`: how fast this machine denoises, and how near its own limits."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from ..charts import Bar, Series, bars, chart, check_name, stacked
from ..files import write_file
from ..sizes import size_text
from .common import add_common_options, print_json, whole_number
from .measure import measure
from .shared import Subparsers, add_model_options, load_model


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
    parser.add_argument("--plot", metavar="F", type=Path, help="draw the figures, as SVG")
    add_common_options(parser, "json")
    add_model_options(parser)
    parser.set_defaults(run=run)


def _lengths(text: str) -> list[int]:
    return [whole_number(-(2**31), 2**31 - 1)(part) for part in text.split(",")]


def run(args: argparse.Namespace) -> int:
    """Measures and prints."""
    if args.steps < 1 or min(args.prompt_tokens) < 1:
        raise ValueError("--steps and --prompt-tokens must be at least 1")
    if min(args.context, default=0) < 0:
        raise ValueError("--context must be 0 or more")
    if args.plot is not None:
        check_name(args.plot)
    began = time.perf_counter()
    with load_model(args) as llm:
        found = measure(llm, args.prompt_tokens, args.context, args.steps, began)
    if args.plot is not None:
        write_file(args.plot, _plot(found))
    if args.json:
        print_json(found)
    else:
        print("\n".join(_lines(found)))
    return 0


def _lines(found: dict[str, Any]) -> list[str]:
    limits = found["limits"]
    lines = [
        f"{found['model']}, {found['backend']}, {found['threads']} threads",
        f"  load            {found['load_s']:.2f} s, first step done after "
        f"{found['first_step_s']:.2f} s (it took {found['first_step_ms']:.0f} ms)",
        f"  peak memory     {size_text(found['peak_rss_bytes'])} for a file of "
        f"{size_text(found['file_bytes'])} and a context of {found['n_ctx']}",
    ]
    if found["peak_vram_bytes"] is not None:
        lines.append(f"  GPU memory      {size_text(found['peak_vram_bytes'])}")
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


def _plot(found: dict[str, Any]) -> str:
    """Where a step's time goes, and how steps and prefill grow where several were measured."""
    operations = sorted(found["operations"], key=lambda o: float(o["ms"]), reverse=True)
    title = (
        f"{found['model']}, {found['backend']}, {found['threads']} threads: "
        f"{found['step_ms']['median']:.0f} ms a denoising step"
    )
    rows = [Bar(str(o["name"]), float(o["ms"]), _bar_label(o)) for o in operations]
    charts = [bars(title, "ms a step", rows)]
    curves = (
        (
            "Denoising steps",
            "tokens before the canvas",
            "ms a step",
            [(c["n_past"], c["step_ms"]["median"]) for c in found["contexts"]],
        ),
        (
            "Prefill",
            "prompt tokens",
            "tokens/s",
            [(p["tokens"], p["tokens_per_s"]) for p in found["prefill"]],
        ),
    )
    for name, x_title, y_title, points in curves:
        if len(points) > 1:
            line = [Series(name, sorted(points), joined=True)]
            charts.append(chart(name, x_title, y_title, line, logarithmic=False))
    return stacked(charts)


def _bar_label(operation: dict[str, Any]) -> str:
    share = operation["shares"].get("int8_gop_per_s", 0.0)
    return f"{operation['ms']:.1f} ms" + (f", {100 * share:.0f} % of int8" if share else "")
