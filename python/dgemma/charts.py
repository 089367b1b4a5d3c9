"""Small charts as SVG, without a plotting library; the same bytes everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import Error

WIDTH, HEIGHT = 760, 460
LEFT, RIGHT, TOP, BOTTOM = 90, 30, 50, 60
COLOURS = ("#4169b8", "#c2553a", "#4a8f57", "#8a5fb0")
NAMES_WIDTH, BAR_HEIGHT, BAR_GAP = 190, 18, 8


@dataclass(frozen=True)
class Series:
    """Points (x, y) of one colour; joined by lines, or with a label each."""

    name: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = ()
    joined: bool = False


@dataclass(frozen=True)
class Bar:
    """A bar of `value` (0 or more), named on its left and labelled at its end."""

    name: str
    value: float
    label: str


def check_name(path: Path) -> None:
    """Error where a chart's file is not named as one: only SVG is written."""
    if path.suffix.lower() != ".svg":
        raise Error(f"{path}: charts are SVG; expected a name that ends with .svg")


def escaped(text: str) -> str:
    """Text as XML takes it."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def chart(
    title: str, x_title: str, y_title: str, series: Sequence[Series], *, logarithmic: bool = True
) -> str:
    """The series over a linear x axis.

    The y axis is logarithmic, or linear from 0. ValueError without a point, or where one has no
    place on that axis.
    """
    frame = _Frame([point for one in series for point in one.points], logarithmic)
    parts = [*_head(title, x_title, y_title, HEIGHT), *frame.grid()]
    taken = _Taken([frame.place(x, y) for one in series for x, y in one.points])
    for number, one in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        placed = [frame.place(x, y) for x, y in one.points]
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


def bars(title: str, x_title: str, rows: Sequence[Bar]) -> str:
    """Horizontal bars from 0, the first on top; ValueError without one that is longer than 0."""
    ticks = _ticks(0.0, max((row.value for row in rows), default=0.0))
    if all(row.value == 0 for row in rows):
        raise ValueError("nothing to draw: no bar is longer than 0")
    step = BAR_HEIGHT + BAR_GAP
    height = TOP + step * len(rows) + BOTTOM
    # Labels stand behind their bars, so the longest must not reach the edge.
    scale = (WIDTH - NAMES_WIDTH - RIGHT - 120) / ticks[-1]
    parts = _head(title, x_title, "", height)
    for tick in ticks:
        x, bottom = NAMES_WIDTH + tick * scale, height - BOTTOM
        parts += [
            f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}" stroke="#e4e4e4"/>',
            f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>',
        ]
    for number, row in enumerate(rows):
        y = TOP + BAR_GAP / 2 + step * number
        middle, end = y + BAR_HEIGHT / 2 + 4, NAMES_WIDTH + row.value * scale
        parts += [
            f'<text x="{NAMES_WIDTH - 8}" y="{middle:.1f}" text-anchor="end">'
            f"{escaped(row.name)}</text>",
            f'<rect x="{NAMES_WIDTH}" y="{y:.1f}" width="{row.value * scale:.1f}" '
            f'height="{BAR_HEIGHT}" fill="{COLOURS[0]}"/>',
            f'<text x="{end + 6:.1f}" y="{middle:.1f}" font-size="11">{escaped(row.label)}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def stacked(charts: Sequence[str]) -> str:
    """Charts of this module one below the other, as one."""
    parts, top = [], 0
    for one in charts:
        parts.append(one.replace("<svg ", f'<svg y="{top}" ', 1))
        top += int(one.split('height="', 1)[1].split('"', 1)[0])
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top}">'
    return "\n".join([head, *parts, "</svg>", ""])


def _head(title: str, x_title: str, y_title: str, height: int) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="28" font-size="16">{escaped(title)}</text>',
        f'<text x="{WIDTH - RIGHT}" y="{height - 16}" text-anchor="end">{escaped(x_title)}</text>',
        f'<text x="18" y="{TOP - 8}" font-size="12">{escaped(y_title)}</text>',
    ]


class _Frame:
    """Where the values of a chart's axes lie in it."""

    def __init__(self, points: Sequence[tuple[float, float]], logarithmic: bool) -> None:
        lowest = min((y for _, y in points), default=-1.0)
        if lowest < 0 or (logarithmic and lowest == 0):
            least = "above zero" if logarithmic else "zero or more"
            raise ValueError(f"nothing to draw: there must be points, all of them {least}")
        self._logarithmic = logarithmic
        self._x_ticks = _ticks(min(x for x, _ in points), max(x for x, _ in points))
        highest = max(y for _, y in points)
        if logarithmic:
            low = math.floor(math.log10(lowest))
            high = max(math.ceil(math.log10(highest)), low + 1)
            self._y_ticks = [10.0**power for power in range(low, high + 1)]
        else:
            self._y_ticks = _ticks(0.0, highest)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """In pixels."""
        across = (x - self._x_ticks[0]) / (self._x_ticks[-1] - self._x_ticks[0])
        low, high, at = (self._scaled(v) for v in (self._y_ticks[0], self._y_ticks[-1], y))
        up = (at - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (
            HEIGHT - TOP - BOTTOM
        )

    def grid(self) -> list[str]:
        """Lines and numbers."""
        parts = []
        for tick in self._x_ticks:
            x, bottom = self.place(tick, self._y_ticks[0])
            parts += [
                f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom:.1f}" stroke="#e4e4e4"/>',
                f'<text x="{x:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{tick:g}</text>',
            ]
        for tick in self._y_ticks:
            left, y = self.place(self._x_ticks[0], tick)
            parts += [
                f'<line x1="{left:.1f}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" '
                'stroke="#d0d0d0"/>',
                f'<text x="{left - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>',
            ]
        return parts

    def _scaled(self, y: float) -> float:
        return math.log10(y) if self._logarithmic else y


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


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most `low` to at least `high`, four to ten of them."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    while span / step > 8:
        step *= 2.5 if f"{step:e}".startswith("2") else 2
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]
