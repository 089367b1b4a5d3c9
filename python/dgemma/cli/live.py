"""Shows answers in the terminal: the canvas as it settles, or plain text where there is none."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.text import Text

from ..generation.events import Commit, Draft
from ..tokenizer import Tokenizer

# Entropy in nats, from which on a token is shown in that style: what is certain stands out.
SHADES = ((1.0, "grey30"), (0.3, "grey42"), (0.05, "grey58"), (0.005, "grey74"), (0.0, "default"))
CHANGED = "underline"


def shade(entropy: float) -> str:
    """Style of a token of that entropy."""
    return next(style for least, style in SHADES if entropy >= least)


def draft_text(draft: Draft, previous: Draft | None, tokenizer: Tokenizer) -> Text:
    """A draft up to its first end token: confidence as shade, changed tokens underlined."""
    text, decoder = Text(), tokenizer.decoder()
    same_canvas = previous is not None and previous.canvas == draft.canvas
    for position, token in enumerate(draft.tokens[: draft.end]):
        style = shade(float(draft.entropies[position]))
        if previous is not None and same_canvas and previous.tokens[position] != token:
            style += " " + CHANGED
        text.append(_visible(decoder.feed(token)), style)
    text.append(_visible(decoder.finish()))
    return text


def _visible(text: str) -> str:
    """Without what would move the terminal's cursor or change its colours."""
    return "".join(
        c if c == "\n" or c.isprintable() else " " if c == "\t" else "\ufffd" for c in text
    )


class _Region:
    """Lines at the end of the output that are drawn again and again.

    Terminals break lines anew when they become narrower, so what is erased is counted at the width
    of the moment, not at the one it was drawn with.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._drawn: list[int] = []  # the width of each line, in cells

    def draw(self, text: Text) -> None:
        """Replaces the region's lines, as many of the last ones as the terminal is high."""
        console = self._console
        with console.capture() as captured:
            # One cell stays free: a full line would leave the cursor on the next one in some
            # terminals, and not in others.
            lines = list(text.wrap(console, max(1, console.width - 1)))[
                -max(1, console.height - 1) :
            ]
            for index, line in enumerate(lines):
                line.rstrip()
                console.print(line, end="\n" if index + 1 < len(lines) else "", soft_wrap=True)
        console.file.write("\x1b[?25l" + self._erasing() + captured.get())
        console.file.flush()
        self._drawn = [line.cell_len for line in lines]

    def clear(self) -> None:
        """Takes the region away; what is printed next stands in its place."""
        self._console.file.write(self._erasing() + "\x1b[?25h")
        self._console.file.flush()
        self._drawn = []

    def _erasing(self) -> str:
        width = max(1, self._console.width)
        rows = sum(max(1, -(-cells // width)) for cells in self._drawn)
        return "\r" + (f"\x1b[{rows - 1}A" if rows > 1 else "") + "\x1b[J"


class LiveAnswer:
    """Prints one answer to standard output.

    On a terminal the canvas under way is redrawn after every step below what is certain; elsewhere,
    or with `live` off, only certain text is written. Leaving the context puts the terminal right,
    also after Ctrl-C.
    """

    def __init__(self, tokenizer: Tokenizer, *, live: bool) -> None:
        self._tokenizer = tokenizer
        self._console = Console(highlight=False)
        self._region: _Region | None = None
        if live and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._region = _Region(self._console)
        self._previous: Draft | None = None
        self._tail = ""  # the certain text's last line: the draft goes on behind it

    def __enter__(self) -> LiveAnswer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._region is None:
            sys.stdout.write("\n")
            sys.stdout.flush()
            return
        self._region.clear()
        text = Text(self._tail)
        if kind is KeyboardInterrupt:
            text.append(" (stopped)" if self._tail else "(stopped)", "dim italic")
        self._console.print(text, soft_wrap=True)

    def show(self, event: Draft | Commit) -> None:
        """Draws a draft, or writes what a commit made certain."""
        if isinstance(event, Commit):
            self._commit(event.text)
        elif self._region is not None:
            text = Text(self._tail)
            text.append_text(draft_text(event, self._previous, self._tokenizer))
            text.append(f"\ncanvas {event.canvas + 1}, step {event.step}", "dim italic")
            self._region.draw(text)
            self._previous = event

    def _commit(self, text: str) -> None:
        if self._region is None:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        whole, newline, self._tail = (self._tail + _visible(text)).rpartition("\n")
        if newline:
            self._region.clear()
            self._console.print(Text(whole), soft_wrap=True)
