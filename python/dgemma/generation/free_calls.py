"""The form of answers that may call tools: any text, and calls whose arguments fit their tools.

A call that fits, or plainly means what fits, stands in whatever syntax it was written. Any other is
repaired by the grammar of calls, as answers in a form are. The form is a wish: where repairs lead
nowhere, the answer stands as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llguidance import LLMatcher

from ..errors import OptionError
from ..tokenizer import Tokenizer
from ..tools.answer import CALL, CALL_END, RESPONSE, THOUGHT, THOUGHT_END
from ..tools.reader import read_calls
from ..values import FloatArray
from .arguments import fitted
from .call_grammar import call_grammar
from .grammars import matcher
from .structured import Form, Verdict


class FreeCalls(Form):
    """The form of one answer under the tool choice "auto", over its canvases.

    Args:
        tools: the declarations of those that may be called.
    """

    binding = False

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._tools = list(tools)
        self._parameters = {
            tool["function"]["name"]: tool["function"].get("parameters") for tool in tools
        }
        self._matcher: Any = None  # of the call that is open
        self._fresh: list[Any] = []  # shared by copies: made when the first call does not fit
        self._inside = ""  # THOUGHT, CALL or RESPONSE
        self._call = b""  # what is taken of the call that is open

    def give_up(self) -> None:
        """Lets the rest of the answer be as it is."""
        self._inside = RESPONSE

    def copy(self) -> FreeCalls:
        """Another one, as far as this one has come."""
        made = FreeCalls.__new__(FreeCalls)
        vars(made).update(vars(self))
        made._matcher = self._matcher and self._matcher.deep_copy()
        return made

    def most_probable(
        self, taken: Sequence[int], logits: FloatArray, tokenizer: Tokenizer, ends: Iterable[int]
    ) -> int | None:
        """The token with the highest of `logits` (vocabulary,) that may follow in a call."""
        here = self.copy()
        here._walk(taken, tokenizer, frozenset())
        return here._most_probable(logits, tokenizer, ends) if here._inside == CALL else None

    def _walk(self, tokens: Sequence[int], tokenizer: Tokenizer, ends: frozenset[int]) -> Verdict:
        at = 0
        while at < len(tokens):
            mark = tokenizer.token_bytes(tokens[at]).decode("utf-8", "replace")
            if self._inside == CALL or (not self._inside and mark == CALL):
                at, broken = self._walk_call(at, tokens, tokenizer, ends)
                if broken:
                    return Verdict(at, complete=False, broken=True)
                continue
            if tokens[at] in ends:
                return Verdict(at, complete=False, broken=False)
            if not self._inside and mark in (THOUGHT, RESPONSE):
                self._inside = mark
            elif self._inside == THOUGHT and mark == THOUGHT_END:
                self._inside = ""
            at += 1
        return Verdict(len(tokens), complete=False, broken=False)

    def _walk_call(
        self, first: int, tokens: Sequence[int], tokenizer: Tokenizer, ends: frozenset[int]
    ) -> tuple[int, bool]:
        """Where the call that stands at `first` ends, or breaks; and whether it breaks."""
        spelled = [tokenizer.token_bytes(token) for token in tokens[first:]]
        end = next(
            (i for i, data in enumerate(spelled)
             if tokens[first + i] in ends or data == CALL_END.encode()), len(spelled)
        )  # fmt: skip
        if end < len(spelled) and self._fits(self._call + b"".join(spelled[:end])):
            self._leave()
            return first + end + (tokens[first + end] not in ends), False
        if not self._begin():
            self.give_up()
            return first, False
        for i, data in enumerate(spelled):
            stands = data and tokens[first + i] not in ends
            if not stands or self._matcher.validate_tokens(list(data)) < len(data):
                return first + i, True
            self._matcher.consume_tokens(list(data))
            self._call += data
            if self._matcher.is_accepting():
                self._leave()
                return first + i + 1, False
        return len(tokens), False

    def _begin(self) -> bool:
        """Sees to the matcher of the open call; False where the tools have no grammar."""
        self._inside = CALL
        if self._matcher is not None:
            return True
        if not self._fresh:
            try:
                grammar = call_grammar(self._tools, named=False, whole=True)
                made = matcher(LLMatcher.grammar_from_lark(grammar), "tools")
            except (OptionError, TypeError, ValueError):
                made = None
            self._fresh.append(made)
        self._matcher = self._fresh[0] and self._fresh[0].deep_copy()
        return self._matcher is not None

    def _leave(self) -> None:
        self._inside, self._call, self._matcher = "", b"", None

    def _fits(self, call: bytes) -> bool:
        read = read_calls(call.decode("utf-8", "replace").removeprefix(CALL))
        return (
            bool(read.calls)
            and not read.cut
            and all(
                name in self._parameters and fitted(arguments, self._parameters[name]) is not None
                for name, arguments in read.calls
            )
        )
