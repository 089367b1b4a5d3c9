"""The page in a real browser: a conversation, its drafts, the slider, stopping, narrow and dark."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.browser import PROGRAM, Browser
from support.serving import running

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium: apt-get install chromium")

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


def press(page: Browser, key: str, **more: object) -> None:
    """A key of the keyboard, as a person presses it."""
    for kind in ("keyDown", "keyUp"):
        page.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, **more)


NEVER_CONFIDENT = (
    "const ask0 = request; request = () => ({...ask0(), confidence_threshold: 1e-30}); 0"
)
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
    # Not learnt, and never confident enough to end early: few steps may pass between two drawings.
    page.run(NEVER_CONFIDENT)
    say(page, "Reverse the word planet.", max_steps=300)
    page.wait(IDLE % 2)
    assert page.run("seen.steps") >= 1
    assert page.run("seen.faint") >= 1
    assert [m["role"] for m in page.run("messages")] == ["user", "assistant"] * 2
    page.run("$('clear').click()")
    assert page.run("messages.length") == 0
    assert page.run("document.querySelectorAll('.user, .answer').length") == 0
    assert page.run("document.querySelector('.hello') !== null")


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
    # The map has a cell for every position of the canvas.
    assert page.run("document.querySelectorAll('.map i').length === canvasLength")
    assert page.run("document.querySelector('.map').checkVisibility()")
    picture(page, "slider")
    page.run(slide.format("s.max"))
    assert page.run("document.querySelector('.text').textContent") == finished
    assert not page.run("document.querySelector('.map').checkVisibility()")
    page.run(
        "[...document.querySelectorAll('button')].find((b) => b.textContent === 'Replay').click()"
    )
    page.wait("document.querySelectorAll('.text span').length > 0")
    page.wait("document.querySelector('.replay output').textContent === 'finished'")
    assert page.run("document.querySelector('.text').textContent") == finished


def test_stop(page: Browser) -> None:
    page.run(NEVER_CONFIDENT)
    say(page, QUESTION, max_steps=10_000)
    page.wait("document.querySelectorAll('.text span').length > 0")
    assert page.run("$('send').textContent") == "Stop"
    picture(page, "settling")
    press(page, "Escape")
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


def test_a_server_that_has_gone(tiny_gguf: Path, tmp_path: Path) -> None:
    browser = Browser(tmp_path)
    try:
        with running(tiny_gguf) as (address, process):
            browser.open(address)
            browser.wait("$('model').textContent.includes('tiny')")
            slow = "confidence_threshold: 1e-30, max_denoising_steps: 10000"
            browser.run(f"const ask0 = request; request = () => ({{...ask0(), {slow}}}); 0")
            say(browser, QUESTION)
            browser.wait("document.querySelectorAll('.text span').length > 0")
            process.kill()
            browser.wait(IDLE % 1)
        assert browser.run("document.querySelector('[role=alert]').textContent.length") > 10
        browser.run("request = ask0; 0")
        say(browser, QUESTION)
        browser.wait(IDLE % 2)
        told = "[...document.querySelectorAll('[role=alert]')].at(-1).textContent"
        assert browser.run(told) == "The server cannot be reached."
    finally:
        browser.close()


def test_with_the_keyboard_alone(page: Browser) -> None:
    assert page.run("document.activeElement === $('input')")
    page.send("Input.insertText", text="What is the capital")
    press(page, "Enter", text="\r", windowsVirtualKeyCode=13, modifiers=8)  # with Shift: a new line
    assert page.run("$('input').value") == "What is the capital\n"
    page.send("Input.insertText", text="of France?")
    press(page, "Enter", text="\r", windowsVirtualKeyCode=13)
    page.wait(IDLE % 1)
    page.run("document.querySelector('input[type=range]').focus()")
    press(page, "ArrowLeft", windowsVirtualKeyCode=37)
    assert page.run("document.querySelectorAll('.text span').length") > 0
    page.run("document.activeElement.blur()")
    press(page, "/", text="/", windowsVirtualKeyCode=191)
    assert page.run("document.activeElement === $('input')")
    assert page.run("$('input').value") == ""


def test_again_asks_the_same_question_anew(page: Browser) -> None:
    say(page, QUESTION)
    page.wait(IDLE % 1)
    page.run(
        "[...document.querySelectorAll('button')].find((b) => b.textContent === 'Again').click()"
    )
    page.wait(IDLE % 1)
    assert [m["role"] for m in page.run("messages")] == ["user", "assistant"]
    assert page.run("document.querySelectorAll('.user').length") == 1


def test_options_are_sent_and_checked(page: Browser) -> None:
    page.run(
        "$('system').value = 'Be brief.'; $('tokens').value = '5'; $('temperature').value = '0.5'"
    )
    page.run("$('seed').value = '7'; $('steps').value = '9'; $('think').checked = true")
    body = page.run("request()")
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["seed"], body["max_tokens"], body["temperature"]) == (7, 5, 0.5)
    assert body["max_denoising_steps"] == 9
    assert body["chat_template_kwargs"] == {"enable_thinking": True}
    say(page, QUESTION, seed=7)
    page.wait(IDLE % 1)
    page.run("$('seed').value = 'x'; $('input').value = 'Hi'; $('form').requestSubmit()")
    assert not page.run("$('options').hidden")
    assert page.run("document.querySelectorAll('.answer').length") == 1


def test_what_a_screen_reader_is_told(page: Browser) -> None:
    names = "[...document.querySelectorAll('button, input, textarea')].map((e) => "
    say(page, "Count from 3 to 12.")
    page.wait(IDLE % 1)
    page.run("$('more').click()")
    unnamed = page.run(
        names
        + "e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.[0]?.textContent)"
        ".filter((name) => !name).length"
    )
    assert unnamed == 0
    assert page.run("$('status').textContent").startswith("The answer: 3 4 5")
    assert page.run("document.querySelector('.answer').getAttribute('aria-busy')") is None


MARKDOWN = {
    "**bold** *thin* `a*b*c`": "<p><strong>bold</strong> <em>thin</em> <code>a*b*c</code></p>",
    "# One\ntext\nmore": "<h1>One</h1><p>text\nmore</p>",
    "- a\n  - b\n- c": "<ul><li>a<ul><li>b</li></ul></li><li>c</li></ul>",
    "3. a\n4. b": '<ol start="3"><li>a</li><li>b</li></ol>',
    "```py\n<b> **x**\n```\nend": "<pre><code>&lt;b&gt; **x**</code></pre><p>end</p>",
    "```\nnever closed": "<pre><code>never closed</code></pre>",
    "> said\n> twice": "<blockquote><p>said\ntwice</p></blockquote>",
    "| a | b |\n|---|---|\n| 1 | 2 |": "<table><thead><tr><th>a</th><th>b</th></tr></thead>"
    "<tbody><tr><td>1</td><td>2</td></tr></tbody></table>",
    "2 * 3 * 4 and a_b_c": "<p>2 * 3 * 4 and a_b_c</p>",
    "<script>x</script>": "<p>&lt;script&gt;x&lt;/script&gt;</p>",
    "[x](javascript:alert(1))": "<p>[x](javascript:alert(1))</p>",
    "see https://a.b/c_d.": '<p>see <a href="https://a.b/c_d" target="_blank" '
    'rel="noopener noreferrer">https://a.b/c_d</a>.</p>',
    '[a](https://x.y/"onclick="z)': '<p><a href="https://x.y/&quot;onclick=&quot;z" '
    'target="_blank" rel="noopener noreferrer">a</a></p>',
}


def test_markdown(page: Browser) -> None:
    for text, expected in MARKDOWN.items():
        made = page.run(
            f"(() => {{ const d = document.createElement('div'); markdown(d, {json.dumps(text)});"
            "return d.innerHTML; })()"
        )
        assert made == expected, text


def test_any_markdown_ends_and_keeps_its_words(page: Browser) -> None:
    """Thousands of made-up texts: no error, no hanging, no element that text could have made."""
    found = page.run(
        """(() => {
        const bits = ["**", "*", "`", "```", "\\n", "- ", "1. ", "> ", "|", "---", "# ", "word",
                      " ", "<img src=x onerror=hurt()>", "[a](https://x)", "~~", "  "];
        let seed = 1;
        const next = (n) => (seed = (seed * 48271) % 2147483647) % n;
        const allowed = new Set(("P STRONG EM S CODE PRE A UL OL LI BLOCKQUOTE TABLE THEAD TBODY "
          + "TR TH TD H1 H2 H3 H4 HR").split(" "));
        let lost = 0;
        for (let i = 0; i < 3000; i++) {
          const text = Array.from({ length: 1 + next(24) }, () => bits[next(bits.length)]).join("");
          const made = document.createElement("div");
          markdown(made, text);
          for (const e of made.querySelectorAll("*"))
            if (!allowed.has(e.tagName)) return e.outerHTML;
          const count = (t) => t.split("word").length;
          if (count(made.textContent) > count(text)) return text;
          lost += count(made.textContent) < count(text);
        }
        return lost;
        })()"""
    )
    # A word behind a fence is its language, and cells beside a table's rule are part of the rule.
    assert isinstance(found, int), found
    assert found < 300


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_and_dark(page: Browser, scheme: str) -> None:
    page.appearance(380, 640, scheme)
    say(page, QUESTION)
    page.wait(IDLE % 1)
    picture(page, f"narrow-{scheme}")
    assert page.run("document.documentElement.scrollWidth") <= 380
    background = page.run("getComputedStyle(document.body).backgroundColor")
    red = int(background.removeprefix("rgb(").split(",")[0])
    assert (red < 64) == (scheme == "dark")


def test_markup_in_a_message_stays_text(page: Browser) -> None:
    say(page, '<img src=x onerror="window.hurt=1"><b>bold</b>')
    page.wait(IDLE % 1)
    assert page.run("document.querySelector('.user img, .user b') === null")
    assert page.run("window.hurt === undefined")


# ---- Conversations, editing, copying, saving -----------------------------------------------------


def test_the_card_alone_shows_the_focus_of_its_text_field(page: Browser) -> None:
    page.run("$('send').focus()")
    press(page, "Tab", windowsVirtualKeyCode=9, modifiers=8)
    page.run("$('input').focus()")
    assert page.run("getComputedStyle($('input')).outlineStyle") == "none"
    assert page.run("getComputedStyle($('input').closest('.box')).boxShadow").count("0px") > 1
    accent = page.run("getComputedStyle($('send')).backgroundColor")
    assert page.run("getComputedStyle($('input').closest('.box')).borderTopColor") == accent
    picture(page, "focus")


def test_conversations_are_kept(page: Browser, address: str) -> None:
    say(page, QUESTION)
    page.wait(IDLE % 1)
    answer = page.run("document.querySelector('.answer .text').textContent")
    page.open(address)  # loaded again, it is there
    page.wait("messages.length === 2")
    assert page.run("document.querySelector('.answer .text').textContent") == answer
    assert "seed 1" in page.run("document.querySelector('.foot').textContent")
    page.run("$('clear').click()")
    say(page, "Count from 3 to 12.")
    page.wait(IDLE % 1)
    page.run("$('kept').click()")
    titles = page.run("[...document.querySelectorAll('#list .open')].map((b) => b.textContent)")
    assert titles == ["Count from 3 to 12.", QUESTION]
    picture(page, "chats")
    page.run("document.querySelectorAll('#list .open')[1].click()")
    assert page.run("messages[1].content") == answer
    assert not page.run("$('chats').open")
    say(page, "What is the capital of Italy?")  # and it goes on
    page.wait(IDLE % 2)
    assert page.run("kept().map((one) => one.messages.length)") == [4, 2]
    page.run("$('kept').click()")
    page.run("document.querySelector('#list .quiet').click()")
    assert page.run("kept().map((one) => one.title)") == ["Count from 3 to 12."]
    assert page.run("messages.length") == 0


def test_a_question_is_edited_and_sent_again(page: Browser) -> None:
    for n, text in enumerate((QUESTION, "Count from 3 to 12."), 1):
        say(page, text)
        page.wait(IDLE % n)
    page.run("document.querySelector('.user .quiet').click()")
    assert page.run("document.activeElement.value") == QUESTION
    page.run("document.activeElement.value = 'What is the capital of Italy?'")
    picture(page, "edit")
    press(page, "Enter", text="\r", windowsVirtualKeyCode=13)
    page.wait(IDLE % 1)
    assert page.run("messages.map((m) => m.role)") == ["user", "assistant"]
    assert "Rome" in page.run("messages[1].content")
    page.run("document.querySelector('.user .quiet').click()")
    press(page, "Escape", windowsVirtualKeyCode=27)
    assert (
        page.run("document.querySelector('.said').textContent") == "What is the capital of Italy?"
    )


def test_code_can_be_copied_and_calls_are_shown(page: Browser) -> None:
    page.run(
        "(() => { const a = new Answer(0);"
        "a.delta({content: 'Look:\\n\\n```py\\nprint(1)\\n```', reasoning_content: 'Hm.'});"
        "a.delta({tool_calls: [{function: {name: 'get_time', arguments: '{\"city\":\"Rome\"}'}}]});"
        "a.finish(); })()"
    )
    label = "document.querySelector('.code button').getAttribute('aria-label')"
    assert page.run(label) == "Copy this code"
    assert page.run("document.querySelector('.code pre').textContent") == "print(1)"
    assert page.run("document.querySelector('.call summary').textContent") == "Calls get_time"
    assert '"city": "Rome"' in page.run("document.querySelector('.call pre').textContent")
    assert not page.run("document.querySelector('.thoughts').open")
    picture(page, "code")


def test_the_settling_canvas_is_saved_as_an_animation(page: Browser) -> None:
    page.run(NEVER_CONFIDENT)
    say(page, "Reverse the word planet.", max_steps=6)
    page.wait(IDLE % 1)
    page.run(
        "window.made = null;"
        "animation(document.querySelector('.answer').answer.steps)"
        ".then((b) => b.arrayBuffer()).then((b) => { made = [...new Uint8Array(b)]; }); 0"
    )
    page.wait("made !== null")
    data = bytes(page.run("made"))
    if PICTURES:
        (Path(PICTURES) / "canvas.png").write_bytes(data)
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    names, at, n_rows = [], 8, 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        name, inner = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert zlib.crc32(name + inner) == int.from_bytes(
            data[at + 8 + size : at + 12 + size], "big"
        )
        if name == b"IHDR":
            n_rows = int.from_bytes(inner[4:8], "big")
        if name in (b"IDAT", b"fdAT"):
            pixels = zlib.decompress(inner[4:] if name == b"fdAT" else inner)
            assert len(pixels) == n_rows * (1 + 3 * 640)
        names.append(name)
        at += 12 + size
    n_steps = page.run("document.querySelector('.answer').answer.steps.length")
    assert min(n_steps, 32) <= names.count(b"fcTL") <= 65
    assert names.count(b"fdAT") == names.count(b"fcTL") - 1
    assert names[:3] == [b"IHDR", b"acTL", b"fcTL"]
    assert names[-1] == b"IEND"
