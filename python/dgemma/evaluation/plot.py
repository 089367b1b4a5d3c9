"""Small charts as SVG, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 760, 460
LEFT, RIGHT, TOP, BOTTOM = 90, 30, 50, 60
COLOURS = ("#4169b8", "#c2553a", "#4a8f57", "#8a5fb0")


@dataclass(frozen=True)
class Series:
    """Points (x, y) of one colour, y above 0; joined by lines, or with a label each."""

    name: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = ()
    joined: bool = False


def escaped(text: str) -> str:
    """Text as XML takes it."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def chart(title: str, x_title: str, y_title: str, series: Sequence[Series]) -> str:
    """The series over a linear x axis and a logarithmic y axis; ValueError without a point."""
    points = [point for one in series for point in one.points]
    if not points or min(y for _, y in points) <= 0:
        raise ValueError("nothing to draw: there must be points, all of them above zero")
    x_ticks = _x_ticks(min(x for x, _ in points), max(x for x, _ in points))
    low = math.floor(math.log10(min(y for _, y in points)))
    high = max(math.ceil(math.log10(max(y for _, y in points))), low + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (math.log10(y) - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (
            HEIGHT - TOP - BOTTOM
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="28" font-size="16">{escaped(title)}</text>',
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 16}" text-anchor="end">{escaped(x_title)}</text>',
        f'<text x="18" y="{TOP - 8}" font-size="12">{escaped(y_title)}</text>',
    ]
    for tick in x_ticks:
        x, bottom = place(tick, 10.0**low)
        parts += [
            f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom:.1f}" stroke="#e4e4e4"/>',
            f'<text x="{x:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{tick:g}</text>',
        ]
    for power in range(low, high + 1):
        left, y = place(x_ticks[0], 10.0**power)
        parts += [
            f'<line x1="{left:.1f}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" '
            'stroke="#d0d0d0"/>',
            f'<text x="{left - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>',
        ]
    taken = _Taken([place(x, y) for x, y in points])
    for number, one in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        placed = [place(x, y) for x, y in one.points]
        if one.joined:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in placed]
        for (x, y), label in zip(placed, one.labels, strict=False):
            left, middle = taken.free_place(x, y, label)
            parts.append(
                f'<text x="{left:.1f}" y="{middle + 4:.1f}" font-size="11" fill="{colour}">'
                f"{escaped(label)}</text>"
            )
        if len(series) > 1:
            y = TOP + 14 + 18 * number
            parts += [
                f'<circle cx="{WIDTH - RIGHT - 190}" cy="{y - 4}" r="4" fill="{colour}"/>',
                f'<text x="{WIDTH - RIGHT - 178}" y="{y}">{escaped(one.name)}</text>',
            ]
    return "\n".join([*parts, "</svg>", ""])


class _Taken:
    """Where points and labels are: a label goes where it covers none of them, if there is room."""

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        self._boxes = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]

    def free_place(self, x: float, y: float, label: str) -> tuple[float, float]:
        """Left end and middle of a label of the point (x, y)."""
        width = 6.0 * len(label)
        places = [
            (left, y + down)
            for down in (-6, 6, 0, -14, 14, -22, 22)
            for left in (x + 7, x - 7 - width)
        ]
        left, middle = min(places, key=lambda at: self._covered(at[0], at[1], width))
        self._boxes.append((left, middle - 5, left + width, middle + 5))
        return left, middle

    def _covered(self, left: float, middle: float, width: float) -> int:
        """How many boxes a label there would touch; one that leaves the chart touches all."""
        if left < LEFT or left + width > WIDTH:
            return len(self._boxes) + 1
        return sum(
            left < x1 and left + width > x0 and middle - 5 < y1 and middle + 5 > y0
            for x0, y0, x1, y1 in self._boxes
        )


def _x_ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most `low` to at least `high`, four to ten of them."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    while span / step > 8:
        step *= 2.5 if f"{step:e}".startswith("2") else 2
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]
