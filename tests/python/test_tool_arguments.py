"""Arguments of calls that the model makes of its own accord: fitted, repaired, never an error."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher

from dgemma import DiffusionGemma
from dgemma.compat.chat import ChatCompletion, _Reader
from dgemma.generation import generate as generation
from dgemma.generation.arguments import fitted
from dgemma.generation.call_grammar import call_grammar
from dgemma.generation.events import Commit
from dgemma.generation.free_calls import FreeCalls
from dgemma.generation.grammars import matcher
from dgemma.generation.structured import Form, Verdict, json_form
from dgemma.tokenizer import CONTROL, NORMAL, USER_DEFINED, Tokenizer

LOOP = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [
        ({"type": "integer"}, "3", 3),
        ({"type": "integer"}, 3.0, 3),
        ({"type": "integer"}, 3.5, None),
        ({"type": "integer"}, True, None),
        ({"type": "number"}, "-2.5", -2.5),
        ({"type": "number"}, "two", None),
        ({"type": "number"}, "1e999", None),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, 1, None),
        ({"type": "string"}, 1234, "1234"),
        ({"type": "string"}, ["a"], None),
        ({"type": ["integer", "string"]}, "3", "3"),
        ({"type": "array", "items": {"type": "integer"}}, "3", [3]),
        ({"type": "array", "items": {"type": "integer"}}, '[1, "2"]', [1, 2]),
        ({"type": "array", "items": {"type": "string"}}, "a", ["a"]),
        ({"type": "object"}, '{"a": 1}', {"a": 1}),
        ({"enum": [1, 2]}, "2", 2),
        ({"enum": ["C", "F"]}, "K", None),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "3", "3"),
        ({"anyOf": [{"type": "integer"}, {"type": "boolean"}]}, "true", True),
        ({"type": "integer", "minimum": 1, "maximum": 5}, "5", 5),
        ({"type": "integer", "minimum": 1, "maximum": 5}, 6, None),
        ({"type": "number", "exclusiveMinimum": 0}, 0, None),
        ({"type": "number", "multipleOf": 0.1}, 0.3, 0.3),
        ({"type": "number", "multipleOf": 0.1}, 0.35, None),
        ({"type": "integer", "exclusiveMinimum": True}, 0, 0),
        ({"type": "string", "minLength": 2, "maxLength": 3}, "abc", "abc"),
        ({"type": "string", "minLength": 2, "maxLength": 3}, "abcd", None),
        ({"type": "string", "maxLength": 3}, 12345, None),
        ({"type": "string", "pattern": "^[A-Z]{2}$"}, "OS", "OS"),
        ({"type": "string", "pattern": "^[A-Z]{2}$"}, "Oslo", None),
        ({"type": "string", "pattern": "sl"}, "Oslo", "Oslo"),
        ({"type": "string", "pattern": "(?=x)y"}, "Oslo", "Oslo"),
        ({"type": "string", "pattern": "(a+)+$"}, "a" * 5000 + "b", None),
        ({"type": "array", "minItems": 2}, [1], None),
        ({"type": "array", "maxItems": 1}, [1, 2], None),
        ({"type": "array", "maxItems": 1}, "x", ["x"]),
        (LOOP, "x", "x"),
        ({}, {"any": ["thing"]}, {"any": ["thing"]}),
    ],
)
def test_what_is_plainly_meant(schema: Any, value: Any, expected: Any) -> None:
    parameters = {"properties": {"x": schema}, "required": ["x"], "$defs": schema.get("$defs", {})}
    found = fitted({"x": value}, parameters)
    assert repr(found) == repr(None if expected is None else {"x": expected})


def test_properties() -> None:
    schema: Any = {"properties": {"a": {"type": "string"}, "n": {"type": "integer"}},
                   "required": ["a"]}  # fmt: skip
    assert fitted({"a": "x", "n": None}, schema) == {"a": "x"}
    assert fitted({"a": None}, schema) is None
    assert fitted({"n": 1}, schema) is None
    assert fitted({"a": "x", "other": 1}, schema) == {"a": "x", "other": 1}
    assert fitted({"a": "x", "other": 1}, {**schema, "additionalProperties": False}) is None
    assert fitted({"a": 1}, None) == {"a": 1}
    assert fitted({"a": 1}, {"properties": 7, "required": [[]]}) is None


# ---- The form alone ------------------------------------------------------------------------------


# fmt: off
TEXTS = [
    "<end>", "<pad>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>',
    "}", "hello", "call:", "{", "a:", "go", "5", "true",
]
# fmt: on


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer(
        {
            "tokenizer.ggml.model": "gemma4",
            "tokenizer.ggml.tokens": TEXTS,
            "tokenizer.ggml.token_type": [CONTROL] * 4 + [USER_DEFINED] * 3 + [NORMAL] * 8,
            "tokenizer.ggml.merges": [],
        }
    )


def walk(form: FreeCalls, words: Tokenizer, *texts: str) -> Verdict:
    return form.check([TEXTS.index(text) for text in texts], words, [0])


GO = {"function": {"name": "go", "parameters": {
    "properties": {"a": {"type": "integer"}}, "required": ["a"]}}}  # fmt: skip
CALL = ("<|tool_call>", "call:", "go", "{")


def test_text_is_free_and_calls_are_not(words: Tokenizer) -> None:
    form = FreeCalls([GO])
    free = Verdict(1, complete=False, broken=False)
    assert walk(form, words, "hello", "<end>", "<pad>") == free
    for value in (["5"], ['<|"|>', "5", '<|"|>']):
        n = 7 + len(value)
        texts = [*CALL, "a:", *value, "}", "<tool_call|>"]
        assert walk(form, words, *texts, "<end>") == Verdict(n, complete=False, broken=False)
        assert walk(form, words, *texts[:-1], "<end>") == Verdict(
            n - 1, complete=False, broken=False
        )
        twice = [*texts, *CALL, "}", "<tool_call|>"]
        assert walk(form, words, *twice) == Verdict(n + 4, complete=False, broken=True)
    assert walk(form, words, *CALL, "a:", "true", "}", "<tool_call|>") == Verdict(
        5, complete=False, broken=True
    )
    thought = ["<|channel>", *CALL, "}", "<tool_call|>", "<channel|>", "hello", "<end>"]
    assert walk(form, words, *thought) == Verdict(9, complete=False, broken=False)


def test_the_most_probable_that_fits(words: Tokenizer) -> None:
    form = FreeCalls([GO])
    logits = np.arange(len(TEXTS), dtype=np.float32)
    kept = [TEXTS.index(text) for text in (*CALL, "a:")]
    assert form.most_probable(kept, logits, words, [0]) == TEXTS.index("5")
    assert form.most_probable(kept[:2], logits, words, [0]) == TEXTS.index("go")


def test_a_call_goes_on_in_the_next_canvas(words: Tokenizer) -> None:
    form = FreeCalls([GO])
    form.take([TEXTS.index(text) for text in (*CALL, "a:")], words)
    assert walk(form, words, "true") == Verdict(0, complete=False, broken=True)
    assert walk(form, words, "5", "}", "<tool_call|>", "go") == Verdict(
        4, complete=False, broken=False
    )


@pytest.mark.parametrize("schema", [{}, {"maxLength": 60}, {"pattern": "a"}], ids=str)
def test_a_text_cannot_go_on_behind_its_call(schema: dict[str, Any]) -> None:
    """A quotation mark that is never closed would let the marks behind it be part of a text."""
    parameters = {"properties": {"a": {"type": "string", **schema}}, "required": ["a"]}
    tool = {"function": {"name": "go", "parameters": parameters}}
    grammar = LLMatcher.grammar_from_lark(call_grammar([tool], named=True))
    for text, fits in (
        ("a <b>table</b> of < and > and |>", True),
        ("a}<tool_call|>", False),
        ("a<|tool_call>call:go{", False),
        ("a<turn|>", False),
    ):
        call = f'a:<|"|>{text}<|"|>}}<tool_call|>'.encode()
        assert (matcher(grammar, "tools").validate_tokens(list(call)) == len(call)) == fits


def test_an_answer_in_a_form_may_be_a_call_instead(words: Tokenizer) -> None:
    """One that begins with a call has the form of calls, in this canvas and in those behind it."""

    def fresh() -> Form:
        made, _ = json_form(
            {"type": "json_schema", "json_schema": {"schema": {"type": "boolean"}}},
            after_thought=True,
            calls=FreeCalls([GO]),
        )
        assert made is not None
        return made

    def check(form: Form, *texts: str) -> Verdict:
        return form.check([TEXTS.index(text) for text in texts], words, [0])

    form = fresh()
    assert check(form, "true", "<end>") == Verdict(1, complete=True, broken=False)
    assert form.binding
    thought = ("<|channel>", "hello", "<channel|>")
    for before in ((), thought):
        form, n = fresh(), len(before)
        broken = check(form, *before, *CALL, "a:", "true", "}", "<tool_call|>")
        assert broken == Verdict(n + 5, complete=False, broken=True)
        assert not form.binding
        kept = [TEXTS.index(text) for text in (*before, *CALL, "a:")]
        logits = np.arange(len(TEXTS), dtype=np.float32)
        assert form.most_probable(kept, logits, words, [0]) == TEXTS.index("5")
        form.take(kept, words)
        assert check(form, "true") == Verdict(0, complete=False, broken=True)
        whole = check(form, "5", "}", "<tool_call|>", "<end>", "<pad>")
        assert whole == Verdict(3, complete=False, broken=False)
    form = fresh()
    assert check(form, *thought, "hello") == Verdict(3, complete=False, broken=True)
    assert form.binding


def test_tools_without_a_grammar_leave_calls_as_they_are(words: Tokenizer) -> None:
    deep: Any = {"type": "integer"}
    for _ in range(500):
        deep = {"type": "array", "items": deep}
    tool = {"function": {"name": "go", "parameters": {"properties": {"a": deep}}}}
    form = FreeCalls([tool])
    assert walk(form, words, *CALL, "a:", "}", "hello") == Verdict(7, complete=False, broken=False)


def test_calls_come_out_as_their_tools_want_them() -> None:
    reader = _Reader("", True, {"go": GO["function"]["parameters"]})
    text = (
        '<|tool_call>call:go{a:<|"|>5<|"|>}<tool_call|><|tool_call>call:go{b:1}<tool_call|>'
        f"<|tool_call>call:go{{a:{'9' * 5000}}}<tool_call|>"
    )
    calls = [piece.call for piece in reader.pieces(Commit(0, [], text, 1, "stop")) if piece.call]
    assert [call.arguments for call in calls[:2]] == ['{"a": 5}', '{"b": 1}']


# ---- With a model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(tiny_gguf: Path) -> Iterator[DiffusionGemma]:
    with DiffusionGemma(tiny_gguf, n_ctx=1024, n_threads=1) as model:
        yield model


QUESTION = [{"role": "user", "content": "Is it sunny in Oslo?"}]


def tools(schema: Any) -> list[dict[str, Any]]:
    """The tool that models/tiny calls with {"city": "Oslo"}, with another schema of the city."""
    parameters = {"type": "object", "properties": {"city": schema}, "required": ["city"]}
    described = {"name": "get_weather", "description": "Weather in a city"}
    return [{"type": "function", "function": {**described, "parameters": parameters}}]


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "string", "description": "Name of the city"}, ["Oslo"]),
        ({"type": "array", "items": {"type": "string"}}, [["Oslo"]]),
        ({"enum": ["Rome", "Paris"]}, ["Rome", "Paris"]),
        ({"type": "string", "pattern": "^[a-d]{2}$"}, [a + b for a in "abcd" for b in "abcd"]),
        ({"type": "string", "minLength": 1, "maxLength": 1}, list(string.printable)),
        ({"type": "integer", "minimum": 7, "maximum": 9}, [7, 8, 9]),
    ],
    ids=["fits", "list", "repaired", "pattern", "length", "bounds"],
)
def test_arguments_under_auto(llm: DiffusionGemma, schema: Any, expected: list[Any]) -> None:
    answer = llm.create_chat_completion(QUESTION, tools=tools(schema), seed=1)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    found = [json.loads(c["function"]["arguments"]) for c in choice["message"]["tool_calls"]]
    assert found
    for arguments in found:
        assert arguments["city"] in expected
    chunks = llm.create_chat_completion(QUESTION, tools=tools(schema), seed=1, stream=True)
    streamed = [
        json.loads(call["function"]["arguments"])
        for chunk in chunks
        for call in chunk["choices"][0]["delta"].get("tool_calls", [])
    ]
    assert streamed == found


@pytest.mark.parametrize("form", ["json_object", "json_schema"])
def test_calls_beside_a_response_format_are_repaired(llm: DiffusionGemma, form: str) -> None:
    schema = {"type": "object", "properties": {"sky": {"type": "string"}}, "required": ["sky"]}
    asked: Any = {"type": form, "json_schema": {"name": "weather", "schema": schema}}
    given: Any = tools({"enum": ["Rome", "Paris"]})
    # Told to answer with JSON, models/tiny forgets its tool: its call is begun for it.
    begun = "<|tool_call>call:get_weather{city:"
    made = ChatCompletion(llm, QUESTION, tools=given, response_format=asked, seed=1)  # type: ignore[arg-type]
    start = llm.tokenizer.encode(begun)
    made.choices = llm.choices(
        [made.choices.prompts[0]],
        form=made.choices.answers[0]._options.form,
        pinned=dict(enumerate(start)),
        seed=1,
        max_tokens=64,
    )
    (choice,) = made.whole()["choices"]
    for call in choice["message"]["tool_calls"]:
        assert json.loads(call["function"]["arguments"])["city"] in ("Rome", "Paris")


def test_repairs_that_lead_nowhere_are_no_error(
    llm: DiffusionGemma, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "MAX_REPAIRS", 0)
    answer = llm.create_chat_completion(QUESTION, tools=tools({"enum": ["Rome"]}), seed=1)
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}
