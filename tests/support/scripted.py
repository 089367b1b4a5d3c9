"""A server that says by a script what models/tiny was not taught, for agents that ask for more.

All but the denoising is real: routes, templates, encoding, the reading of calls. `running(…,
before=scripted({"Bash": {"command": "echo 42"}}))` has the model call the first of these tools that
a conversation offers, and then say what the tool answered.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from dgemma.generation import choices
from dgemma.generation.events import Commit
from dgemma.generation.generate import Answer
from dgemma.model import DiffusionGemma
from dgemma.tools import CALL, CALL_END, write_call

_CONTROL = re.compile(r"<(?!0x)[^<>▁]{2,}>")
TESTS = Path(__file__).resolve().parents[1]
GREETING = "The capital of France is Paris."
REPORT = "The tool answered: "
THOUGHT = "<|channel>thought\nA tool knows.<channel|>"
_RESPONSE = re.compile(r"<\|tool_response>response:[^{]*{(.*?)}<tool_response\|>", re.DOTALL)


def scripted(calls: Mapping[str, Any], *, thinking: bool = False) -> str:
    """Python that makes a server follow the script, for `running(before=…)`."""
    given = json.dumps([dict(calls), thinking])
    return (
        f"import json, sys; sys.path.insert(0, {str(TESTS)!r})\n"
        f"from support.scripted import install; install(*json.loads({given!r}))"
    )


def install(calls: Mapping[str, Any], thinking: bool) -> None:
    """Makes every answer of this process one of the script."""

    class Scripted(Answer):
        def _check(self) -> None:
            """Prompts of agents are longer than what models/tiny can read."""

        def events(self) -> Generator[Any, None, None]:
            text = said(self._tokenizer.decode(self.prompt, special=True), calls, thinking)
            self._text.append(text)
            self._finish = "stop"
            self.stats.canvases, self.stats.steps, self.stats.completion_tokens = 1, [1], 1
            half = len(text) // 2
            yield Commit(0, [], text[:half], 1, None)
            yield Commit(1, [], text[half:], 1, "stop")

    setattr(choices, "Answer", Scripted)  # noqa: B010
    DiffusionGemma.check_text_length = lambda *_: None  # type: ignore[method-assign]


def counting() -> str:
    """Python that makes a program's answers say which control tokens its prompt was encoded to."""
    return (
        f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
        "from support.scripted import install_counting; install_counting()"
    )


def install_counting() -> None:
    """Makes every answer of this process a JSON object: how often each control token stands."""

    class Counted(Answer):
        def events(self) -> Generator[Any, None, None]:
            tokens = [self._tokenizer.tokens[token] for token in self.prompt]
            found = Counter(token for token in tokens if _CONTROL.fullmatch(token))
            text = json.dumps({name.strip("<>"): n for name, n in sorted(found.items())})
            self._text.append(text)
            self._finish = "stop"
            self.stats.canvases, self.stats.steps, self.stats.completion_tokens = 1, [1], 1
            yield Commit(0, [], text, 1, "stop")

    setattr(choices, "Answer", Counted)  # noqa: B010


def said(prompt: str, calls: Mapping[str, Any], thinking: bool) -> str:
    """What the script says to a prompt."""
    begun = THOUGHT if thinking else ""
    last = prompt[prompt.rfind("<|turn>user") :]
    answers = _RESPONSE.findall(last)
    if answers:
        return f"{begun}{REPORT}{answers[-1]}"
    for name, arguments in calls.items():
        if f"declaration:{name}{{" in prompt:
            return f"{begun}{CALL}{write_call(name, arguments)}{CALL_END}"
    return begun + GREETING
