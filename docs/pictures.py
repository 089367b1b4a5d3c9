"""Draws the pictures of the documentation: the terminal (terminal.svg) and the page (page.png).

    python docs/pictures.py          # needs the package, models/tiny, and Chromium for the page

Both show models/tiny with a fixed seed.
"""

from __future__ import annotations

import io
import re
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

import dgemma
from dgemma.cli.live import draft_text
from dgemma.generation import Draft
from dgemma_convert import convert

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
QUESTION = "Count from 3 to 9."
SEED, COLUMNS = 1, 92


def terminal(model: Path) -> None:
    """Three states of one canvas, as `dgemma generate --live` draws them, and the answer."""
    console = Console(
        record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, highlight=False
    )
    console.print(f'$ dgemma generate -m tiny.gguf --chat --live -p "{QUESTION}"', style="bold")
    with dgemma.DiffusionGemma(model, n_ctx=512) as llm:
        messages = [{"role": "user", "content": QUESTION}]
        prompt = llm.chat_template.render(messages, add_generation_prompt=True)
        drafts: list[Draft] = []
        text = ""
        for event in llm.stream(prompt, seed=SEED):
            if isinstance(event, Draft):
                drafts += [event] if event.canvas == 0 else []
            else:
                text += getattr(event, "text", "")
        chosen = sorted({0, len(drafts) // 3, 2 * len(drafts) // 3})
        for index in chosen:
            previous = drafts[index - 1] if index else None
            console.print()
            console.print(draft_text(drafts[index], previous, llm.tokenizer))
            console.print(Text(f"canvas 1, step {drafts[index].step}", "dim italic"))
        console.print()
        console.print(text.strip())
    svg = console.export_svg(title="dgemma: the canvas settles")
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # of another server
    (DOCS / "terminal.svg").write_text(svg, encoding="utf-8")


def page(model: Path, folder: Path) -> None:
    """The server's page behind one answer, at one of its steps."""
    sys.path.insert(0, str(REPOSITORY / "tests"))
    from support.browser import Browser
    from support.serving import running

    with running(model) as (address, _):
        browser = Browser(folder, 900, 560)
        try:
            browser.appearance(900, 560, "light")
            browser.open(address)
            browser.wait("$('model').textContent.includes('tiny')")
            browser.run(f"$('seed').value = '{SEED}'; $('input').value = {QUESTION!r};")
            browser.run("$('form').requestSubmit()")
            browser.wait("running === null && document.querySelectorAll('.answer').length === 1")
            browser.run(
                "(() => { const s = document.querySelector('input[type=range]'); s.value = 2;"
                "s.dispatchEvent(new Event('input')); })()"
            )
            browser.screenshot(DOCS / "page.png")
        finally:
            browser.close()


def main() -> None:
    """Draws both."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tiny.gguf"
        convert(REPOSITORY / "models" / "tiny", model, "q8_0", progress=False)
        terminal(model)
        page(model, Path(folder) / "profile")


if __name__ == "__main__":
    main()
