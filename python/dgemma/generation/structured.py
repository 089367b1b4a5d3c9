"""Answers of a given form: JSON by a schema, or whatever else a grammar describes.

A canvas settles everywhere at once, so a grammar cannot steer it token by token. It is checked when
the canvas has settled: what follows the grammar is kept, the first token that does not is replaced
by the most probable one that does, and the rest is denoised again behind the two. Every such repair
brings the answer at least one token further.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from llguidance import LLMatcher

from ..errors import OptionTypeError, OptionValueError
from ..tokenizer import Tokenizer
from ..tools.answer import CALL, THOUGHT, THOUGHT_END
from ..values import FloatArray
from .call_grammar import call_grammar
from .grammars import matcher, schema_grammar

# Of one canvas. Each is a denoising of its own; a model that needs more does not see the form.
MAX_REPAIRS = 32


@dataclass(frozen=True)
class Verdict:
    """How far a canvas follows the form: its first `n_valid` tokens do.

    `complete`: they are a whole answer, and nothing may follow. `broken`: the token behind them
    does not fit.
    """

    n_valid: int
    complete: bool
    broken: bool


class Form:
    """The form of one answer, over its canvases.

    Args:
        grammar: as llguidance takes it.
        after_thought: the answer may begin with a thought, to which the grammar does not apply.
        or_call: an answer that begins with a tool call is free.
        calls: the form of an answer that begins with a tool call, in place of this one.
        param: what asks for it, for errors.
    """

    binding = True  # an answer that cannot be brought into the form is an error

    def __init__(
        self,
        grammar: str,
        *,
        after_thought: bool = False,
        or_call: bool = False,
        calls: Form | None = None,
        param: str = "response_format",
    ) -> None:
        self._matcher = matcher(grammar, param)
        free_starts = [THOUGHT] if after_thought else []
        self._free_starts = (*free_starts, CALL) if or_call else tuple(free_starts)
        self._calls = calls
        self._in_calls = False  # the answer began with a call
        self._at_start = True
        self._thinking = self._free = False

    def check(self, tokens: Sequence[int], tokenizer: Tokenizer, ends: Iterable[int]) -> Verdict:
        """How far these tokens, which follow those that were taken, keep to the form."""
        here = self.copy()
        verdict = here._walk(tokens, tokenizer, frozenset(ends))
        self.binding = here.binding
        return verdict

    def take(self, tokens: Sequence[int], tokenizer: Tokenizer) -> None:
        """Makes tokens that keep to the form part of the answer."""
        self._walk(tokens, tokenizer, frozenset())

    def most_probable(
        self, taken: Sequence[int], logits: FloatArray, tokenizer: Tokenizer, ends: Iterable[int]
    ) -> int | None:
        """The token with the highest of `logits` (vocabulary,) that may follow `taken`, if any."""
        here = self.copy()
        here._walk(taken, tokenizer, frozenset())
        if here._thinking:
            return tokenizer.id(THOUGHT_END)
        if here._calls is not None and here._in_calls:
            return here._calls.most_probable((), logits, tokenizer, ends)
        return here._most_probable(logits, tokenizer, ends)

    def _most_probable(
        self, logits: FloatArray, tokenizer: Tokenizer, ends: Iterable[int]
    ) -> int | None:
        """The token with the highest of `logits` that the grammar lets stand here."""
        end_tokens = frozenset(ends)
        for token in np.argsort(-logits, kind="stable").tolist():
            data = tokenizer.token_bytes(token)
            may_stand = data and token not in end_tokens
            if may_stand and self._matcher.validate_tokens(list(data)) == len(data):
                return int(token)
        return None

    def give_up(self) -> None:
        """Lets the rest of the answer be as it is, for a form that is not binding."""
        self._free = True

    def copy(self) -> Form:
        """Another one, as far as this one has come."""
        made = Form.__new__(Form)
        vars(made).update(vars(self))
        made._matcher = self._matcher.deep_copy()
        made._calls = self._calls and self._calls.copy()
        return made

    def _walk(self, tokens: Sequence[int], tokenizer: Tokenizer, ends: frozenset[int]) -> Verdict:
        for n, token in enumerate(tokens):
            if self._calls is not None and self._begins_call(token, tokenizer):
                found = self._calls._walk(tokens[n:], tokenizer, ends)
                return Verdict(n + found.n_valid, found.complete, found.broken)
            if token in ends:
                complete = self._free or self._matcher.is_accepting()
                return Verdict(n, complete, broken=not complete)
            data = tokenizer.token_bytes(token)
            if self._passes_freely(data.decode("utf-8", "replace")):
                continue
            # Tokens that spell nothing would let a canvas go on for ever.
            if not data or self._matcher.validate_tokens(list(data)) < len(data):
                complete = self._matcher.is_accepting()
                return Verdict(n, complete, broken=not complete)
            self._matcher.consume_tokens(list(data))
        return Verdict(len(tokens), complete=False, broken=False)

    def _begins_call(self, token: int, tokenizer: Tokenizer) -> bool:
        """Whether the answer is one that begins with a call, now or before."""
        may_begin = self._at_start and not self._free and not self._thinking
        if may_begin and tokenizer.token_bytes(token) == CALL.encode():
            self._in_calls, self._at_start, self.binding = True, False, False
        return self._in_calls and not self._free

    def _passes_freely(self, text: str) -> bool:
        """Whether the grammar has no say in this token."""
        if self._free or self._thinking:
            self._thinking = self._thinking and text != THOUGHT_END
            return True
        if not self._at_start:
            return False
        if text in self._free_starts:
            self._thinking, self._free = text == THOUGHT, text == CALL
            return True
        self._at_start = False
        return False


def json_form(
    response_format: Mapping[str, Any],
    *,
    after_thought: bool = False,
    or_call: bool = False,
    calls: Form | None = None,
) -> tuple[Form | None, str]:
    """The form that a `response_format` asks for, and what tells the model about it.

    Known are OpenAI's {"type": "text"}, {"type": "json_object"} and {"type": "json_schema",
    "json_schema": {"schema": …}}, and llama-cpp-python's {"type": "json_object", "schema": …}.
    `or_call`, `calls`: see `Form`.
    Errors: TypeError and ValueError, also for schemas that cannot be checked.
    """
    if not isinstance(response_format, Mapping):
        raise OptionTypeError(
            "response_format must be an object such as {'type': 'json_object'}",
            param="response_format",
        )
    kind = response_format.get("type")
    if kind == "text":
        return None, ""
    if kind == "json_object":
        schema = response_format.get("schema")
    elif kind == "json_schema":
        wrapped = response_format.get("json_schema")
        schema = wrapped.get("schema") if isinstance(wrapped, Mapping) else None
        if schema is None:
            raise OptionValueError(
                "response_format.json_schema.schema is missing", param="response_format"
            )
    else:
        raise OptionValueError(
            f"response_format.type is {kind!r}: expected 'text', 'json_object' or 'json_schema'",
            param="response_format.type",
        )
    grammar = schema_grammar({"type": "object"} if schema is None else schema, "response_format")
    form = Form(grammar, after_thought=after_thought, or_call=or_call, calls=calls)
    if schema is None:
        return form, "Answer with one JSON object and nothing else."
    text = json.dumps(schema, ensure_ascii=False, default=str)
    return form, f"Answer with JSON and nothing else. It must follow this JSON schema: {text}"


def call_form(tools: Sequence[str | Mapping[str, Any]], *, named: bool) -> Form:
    """The form of an answer that consists of calls of these tools, with arguments that fit them.

    A tool is a declaration, or a name alone: then its arguments are any. `<|tool_call>call:`
    already stands; where it is `named`, so do the only name and its brace.
    """
    declared = [{"function": {"name": t}} if isinstance(t, str) else t for t in tools]
    return Form(LLMatcher.grammar_from_lark(call_grammar(declared, named=named)), param="tools")
