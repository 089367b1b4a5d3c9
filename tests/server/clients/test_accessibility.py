"""The page under axe, the checker of the web's accessibility rules, in each of its states."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.browser import PROGRAM, Browser
from support.serving import running

REPOSITORY = Path(__file__).resolve().parents[3]
INSTALLED = Path(os.environ.get("DGEMMA_PROGRAMS") or REPOSITORY / "build" / "clients")
AXE = INSTALLED / "node_modules" / "axe-core" / "axe.min.js"
PICTURES = os.environ.get("DGEMMA_SCREENSHOTS")
SIZES = {"narrow": (360, 640), "usual": (900, 800), "wide": (2560, 1200)}

pytestmark = [
    pytest.mark.skipif(PROGRAM is None, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.skipif(not AXE.exists(), reason="needs axe-core: `make test-clients` installs it"),
]


@pytest.fixture(scope="module")
def address(tiny_gguf: Path) -> Iterator[str]:
    with running(tiny_gguf) as (found, _):
        yield found


def violations(page: Browser) -> list[str]:
    """The rules that are broken, and where."""
    page.run(
        "window.found = null; axe.run(document, {resultTypes: ['violations']})"
        ".then((r) => { window.found = r.violations; }); 0"
    )
    page.wait("window.found !== null")
    found: list[dict[str, Any]] = json.loads(page.run("JSON.stringify(window.found)"))
    return [f"{rule['id']}: {node['html'][:120]}" for rule in found for node in rule["nodes"]]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_no_rule_is_broken(address: str, tmp_path: Path, size: str, theme: str) -> None:
    width, height = SIZES[size]
    page = Browser(tmp_path, width, height)
    try:
        page.appearance(width, height, theme)
        page.open(address)
        page.run(AXE.read_text("utf-8") + "; 0")
        page.wait("$('model').textContent.includes('tiny')")
        assert violations(page) == []
        page.run("$('seed').value = '1'; $('input').value = 'What is the capital of France?'")
        page.run("$('form').requestSubmit()")
        page.wait("running === null && document.querySelectorAll('.answer').length === 1")
        card = "document.querySelector('.answer').getBoundingClientRect().right"
        last = "document.querySelector('.replay output').getBoundingClientRect().right"
        assert page.run(f"{last} < {card} - 8")  # inside of its card, however narrow
        if PICTURES:
            page.screenshot(Path(PICTURES) / f"{size}-{theme}.png")
        assert violations(page) == []
    finally:
        page.close()
