"""Charts: what is drawn, where, and what cannot be."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from dgemma import Error
from dgemma.charts import Bar, Series, bars, chart, check_name, stacked


def test_chart() -> None:
    drawn = chart("a < b", "x", "y", [Series("one", [(1, 0.01), (20, 3)], ["p & q", "r"])])
    root = ElementTree.fromstring(drawn)
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"a < b", "p & q", "r", "0.01", "10"} <= set(texts)
    circles = [e for e in root.iter() if e.tag.endswith("circle")]
    assert len(circles) == 2
    low, high = sorted(circles, key=lambda c: float(c.attrib["cx"]))
    assert float(low.attrib["cy"]) > float(high.attrib["cy"])
    for circle in circles:
        assert 0 < float(circle.attrib["cx"]) < 760
        assert 0 < float(circle.attrib["cy"]) < 460
    assert chart("same", "x", "y", [Series("one", [(3, 1.0)])])
    # Labels of points that lie on each other do not.
    drawn = chart("near", "x", "y", [Series("one", [(1, 1.0), (1, 1.0), (2, 1.0)], ["aa", "bb"])])
    found = {e.text: e.attrib for e in ElementTree.fromstring(drawn).iter() if e.text}
    apart = [abs(float(found["aa"][side]) - float(found["bb"][side])) for side in "xy"]
    assert apart[0] > 10 or apart[1] > 10
    with pytest.raises(ValueError, match="above zero"):
        chart("none", "x", "y", [Series("one", [(1, 0.0)])])


def test_a_linear_axis_begins_at_zero() -> None:
    points = [(0, 0.0), (10, 5.0), (20, 10.0)]
    drawn = ElementTree.fromstring(
        chart("t", "x", "y", [Series("one", points, joined=True)], logarithmic=False)
    )
    heights = [float(e.attrib["cy"]) for e in drawn.iter() if e.tag.endswith("circle")]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    assert heights[0] == 460 - 60
    with pytest.raises(ValueError, match="zero or more"):
        chart("none", "x", "y", [Series("one", [(1, -1.0)])], logarithmic=False)


def test_bars() -> None:
    drawn = bars("t", "ms", [Bar("a & b", 4.0, "4 ms"), Bar("c", 1.0, "1 ms"), Bar("d", 0, "0")])
    root = ElementTree.fromstring(drawn)
    texts = [e.text for e in root.iter() if e.tag.endswith("text")]
    assert {"a & b", "4 ms", "c", "1 ms", "ms"} <= set(texts)
    rects = [e for e in root.iter() if e.tag.endswith("rect")][1:]  # behind the background
    widths = [float(e.attrib["width"]) for e in rects]
    assert widths == [pytest.approx(4 * widths[1], abs=0.3), widths[1], 0]
    assert all(float(e.attrib["x"]) + float(e.attrib["width"]) < 760 - 120 for e in rects)
    for rows in ([], [Bar("a", 0.0, "")]):
        with pytest.raises(ValueError, match="longer than 0"):
            bars("t", "ms", rows)


def test_charts_one_below_the_other() -> None:
    first = bars("first", "ms", [Bar("a", 1.0, "")])
    second = chart("second", "x", "y", [Series("one", [(1, 1.0)])])
    root = ElementTree.fromstring(stacked([first, second]))
    inner = [e for e in root if e.tag.endswith("svg")]
    height = int(inner[0].attrib["height"])
    assert [e.attrib["y"] for e in inner] == ["0", str(height)]
    assert int(root.attrib["height"]) == height + 460


@pytest.mark.parametrize("name", ["a.png", "a", "svg"])
def test_other_formats_are_refused(name: str) -> None:
    with pytest.raises(Error, match=r"ends with \.svg"):
        check_name(Path(name))
    check_name(Path("a.SVG"))
