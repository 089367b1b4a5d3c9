"""The picture that `dgemma bench --plot` draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import Error


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
