"""The page in a real browser: a conversation, its drafts, the slider, stopping, narrow and dark."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import PROGRAM, Browser
from test_package_server import running

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium")

QUESTION = "What is the capital of France?"
# Draws of the canvas are seen as they happen; a screenshot of each state goes here when asked for.
PICTURES = os.environ.get("DGEMMA_SCREENSHOTS")


@pytest.fixture(scope="module")
def address(tiny_gguf: Path) -> Iterator[str]:
    with running(tiny_gguf) as (found, _):
        yield found


@pytest.fixture
def page(address: str, tmp_path: Path) -> Iterator[Browser]:
    browser = Browser(tmp_path)
    try:
        browser.open(address)
        yield browser
        assert browser.logged == []
    finally:
        browser.close()


def picture(page: Browser, name: str) -> None:
    if PICTURES:
        page.screenshot(Path(PICTURES) / f"{name}.png")


def say(page: Browser, text: str, seed: int = 1, max_steps: int | None = None) -> None:
    steps = "" if max_steps is None else str(max_steps)
    page.run(
        f"$('seed').value = '{seed}'; $('steps').value = '{steps}'; $('input').value = {text!r};"
    )
    page.run("$('form').requestSubmit()")


IDLE = "running === null && document.querySelectorAll('.answer').length === %d"


def test_a_conversation(page: Browser) -> None:
    picture(page, "empty")
    page.wait("$('model').textContent.includes('tiny')")
    page.run(
        "window.seen = {faint: 0, steps: 0};"
        "new MutationObserver(() => {"
        "  const spans = [...document.querySelectorAll('.text span')];"
        "  if (spans.length) seen.steps++;"
        "  if (spans.some((s) => s.style.opacity < 1)) seen.faint++;"
        "}).observe($('log'), {childList: true, subtree: true}); 0"
    )
    say(page, QUESTION)
    page.wait(IDLE % 1)
    assert "Paris" in page.run("document.querySelector('.answer .text').textContent")
    figures = page.run("document.querySelector('.foot').textContent")
    for part in ("seed 1", "steps", "tokens/s"):
        assert part in figures
    picture(page, "answer")
    # Not learnt, so it takes many steps: a known answer's two may pass between two drawings.
    say(page, "Reverse the word planet.")
    page.wait(IDLE % 2)
    assert page.run("seen.steps") >= 1
    assert page.run("seen.faint") >= 1
    assert [m["role"] for m in page.run("messages")] == ["user", "assistant"] * 2
    page.run("$('clear').click()")
    assert page.run("messages.length") == 0
    assert page.run("document.querySelectorAll('.turn').length") == 0


def test_the_slider_goes_through_the_steps(page: Browser) -> None:
    say(page, "Count from 3 to 12.")
    page.wait(IDLE % 1)
    finished = page.run("document.querySelector('.text').textContent")
    slide = (
        "(() => {{ const s = document.querySelector('input[type=range]'); s.value = {0};"
        "s.dispatchEvent(new Event('input')); }})()"
    )
    page.run(slide.format(1))
    assert page.run("document.querySelectorAll('.text span').length") > 0
    assert "step 2" in page.run("document.querySelector('.foot').textContent")
    picture(page, "slider")
    page.run(slide.format("s.max"))
    assert page.run("document.querySelector('.text').textContent") == finished


def test_stop(page: Browser) -> None:
    page.run("const ask0 = request; request = () => ({...ask0(), confidence_threshold: 1e-30}); 0")
    say(page, QUESTION, max_steps=10_000)
    page.wait("document.querySelectorAll('.text span').length > 0")
    assert page.run("$('send').textContent") == "Stop"
    picture(page, "settling")
    page.run("$('form').requestSubmit()")
    page.wait(IDLE % 1)
    assert "stopped" in page.run("document.querySelector('.foot').textContent")
    page.run("request = ask0; 0")
    say(page, QUESTION)
    page.wait(IDLE % 2)
    assert "Paris" in page.run("[...document.querySelectorAll('.text')].at(-1).textContent")


def test_errors_are_shown(page: Browser) -> None:
    say(page, "word " * 2000)
    page.wait(IDLE % 1)
    assert "context" in page.run("document.querySelector('.error').textContent")
    assert page.run("messages.length") == 0
    page.logged.clear()  # the browser itself notes the answer 400


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_and_dark(page: Browser, scheme: str) -> None:
    page.appearance(360, 640, scheme)
    say(page, QUESTION)
    page.wait(IDLE % 1)
    picture(page, f"narrow-{scheme}")
    assert page.run("document.documentElement.scrollWidth") <= 360
    background = page.run("getComputedStyle(document.body).backgroundColor")
    red = int(background.removeprefix("rgb(").split(",")[0])
    assert (red < 64) == (scheme == "dark")


def test_markup_in_a_message_stays_text(page: Browser) -> None:
    say(page, '<img src=x onerror="window.hurt=1"><b>bold</b>')
    page.wait(IDLE % 1)
    assert page.run("document.querySelector('.user img, .user b') === null")
    assert page.run("window.hurt === undefined")
