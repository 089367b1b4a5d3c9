"""Answers of a given form: how a canvas is checked and repaired, and that what comes out is valid.

models/tiny has never seen JSON. What it says in it means little, but it has to be JSON all the
same: it exercises the repairs more than a model that knows the form would.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dgemma
from dgemma import DiffusionGemma, Draft
from dgemma.chat import instructed
from dgemma.generation import generate as generation
from dgemma.generation.structured import Form, Verdict, call_form, json_form
from dgemma.tokenizer import CONTROL, NORMAL, USER_DEFINED, Tokenizer

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 8}},
        "required": ["city"], "additionalProperties": False}  # fmt: skip


def wanted(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


# ---- The form alone ------------------------------------------------------------------------------

# fmt: off
TEXTS = [
    "<end>", "<pad>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>',
    '{"', "ci", "ty", '":', " ", '"Rome', '"}', "}", "hello", "call:", "{", "a:", "go",
]
# fmt: on
TYPES = [CONTROL, CONTROL, CONTROL, CONTROL, *[USER_DEFINED] * 3, *[NORMAL] * 13]
TOKENIZER = Tokenizer(
    {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": TEXTS,
        "tokenizer.ggml.token_type": TYPES,
        "tokenizer.ggml.merges": [],
    }
)
ENDS = [0]


def ids(*texts: str) -> list[int]:
    return [TEXTS.index(text) for text in texts]


def city_form(**options: bool) -> Form:
    form, _ = json_form(wanted(CITY), **options)
    assert form is not None
    return form


def verdict(form: Form, *texts: str) -> Verdict:
    return form.check(ids(*texts), TOKENIZER, ENDS)


WHOLE = ('{"', "ci", "ty", '":', " ", '"Rome', '"}')


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (WHOLE, Verdict(7, complete=False, broken=False)),
        ((*WHOLE, "<end>", "hello"), Verdict(7, complete=True, broken=False)),
        ((*WHOLE, "hello"), Verdict(7, complete=True, broken=False)),
        ((*WHOLE[:4], "<end>"), Verdict(4, complete=False, broken=True)),
        ((*WHOLE[:4], "hello"), Verdict(4, complete=False, broken=True)),
        ((*WHOLE[:4], "<pad>"), Verdict(4, complete=False, broken=True)),
        (("hello", *WHOLE), Verdict(0, complete=False, broken=True)),
        ((" ", *WHOLE), Verdict(0, complete=False, broken=True)),
    ],
)
def test_how_far_a_canvas_follows(texts: Sequence[str], expected: Verdict) -> None:
    assert verdict(city_form(), *texts) == expected


def test_a_form_goes_over_canvases() -> None:
    form = city_form()
    form.take(ids(*WHOLE[:3]), TOKENIZER)
    assert verdict(form, *WHOLE[3:], "<end>") == Verdict(4, complete=True, broken=False)
    assert verdict(form, *WHOLE) == Verdict(0, complete=False, broken=True)


def test_a_thought_is_free_where_one_is_allowed() -> None:
    thought = ("<|channel>", "hello", "hello", "<channel|>")
    assert verdict(city_form(), *thought).broken
    form = city_form(after_thought=True)
    assert verdict(form, *thought, *WHOLE, "<end>") == Verdict(11, complete=True, broken=False)
    assert verdict(form, *thought, "hello") == Verdict(4, complete=False, broken=True)
    # A thought that ends the answer is closed, so that the answer can follow.
    assert verdict(form, "<|channel>", "hello", "<end>") == Verdict(2, complete=False, broken=True)
    logits = np.zeros(len(TEXTS), np.float32)
    chosen = form.most_probable(ids("<|channel>", "hello"), logits, TOKENIZER, ENDS)
    assert chosen == TEXTS.index("<channel|>")


def test_a_call_in_place_of_the_answer() -> None:
    call = ("<|tool_call>", "call:", "hello", "<end>")
    assert verdict(city_form(), *call).broken
    assert verdict(city_form(or_call=True), *call) == Verdict(3, complete=True, broken=False)


def test_the_most_probable_token_that_fits() -> None:
    form = city_form()
    logits = np.arange(len(TEXTS), dtype=np.float32)  # the last token is the most probable
    assert form.most_probable([], logits, TOKENIZER, ENDS) == TEXTS.index("{")
    assert form.most_probable(ids('{"', "ci"), logits, TOKENIZER, ENDS) == TEXTS.index("ty")
    assert form.most_probable(ids(*WHOLE), logits, TOKENIZER, ENDS) is None


def test_calls_have_names_and_arguments() -> None:
    form = call_form(["go", "hello"], named=False)
    quoted = ('<|"|>', "ci", "{", '<|"|>')
    assert verdict(form, "go", "{", "a:", *quoted, "}", "<tool_call|>", "<end>").complete
    assert verdict(form, "ci").broken
    assert verdict(form, "go", "{", "a:", "}").broken
    assert verdict(form, "go", "{", "a:", *quoted, "}", "<end>").broken
    named = call_form(["go"], named=True)
    assert verdict(named, "a:", *quoted, "}", "<tool_call|>", "<end>").complete
    assert verdict(named, "}", "<tool_call|>", "<|tool_call>", "call:", "go", "{", "}",
                   "<tool_call|>", "<end>").complete  # fmt: skip


@pytest.mark.parametrize(
    ("response_format", "error", "message"),
    [
        ("json", TypeError, "object"),
        ({"type": "xml"}, ValueError, "xml"),
        ({"type": "json_schema"}, ValueError, "schema is missing"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, ValueError, "schema is missing"),
        (wanted("text"), TypeError, "must be an object"),
        (wanted({"type": "nonsense"}), ValueError, "cannot be checked"),
        (wanted({"$ref": "http://127.0.0.1:1/schema"}), ValueError, "cannot be checked"),
        (wanted({"enum": ["x" * 2**20]}), ValueError, "characters"),
    ],
)
def test_malformed_formats(response_format: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        json_form(response_format)


def test_the_model_is_told() -> None:
    assert json_form({"type": "text"}) == (None, "")
    _, told = json_form(wanted(CITY))
    assert '"maxLength": 8' in told
    system, question = instructed(QUESTION, told)
    assert (system["role"], system["content"], question) == ("system", told, QUESTION[0])
    both = instructed([{"role": "system", "content": [{"type": "text", "text": "Hi."}]}], told)
    assert both == [{"role": "system", "content": f"Hi.\n\n{told}"}]


# ---- Arguments that fit a tool's parameters ------------------------------------------------------

PARAMETERS = {
    "type": "object",
    "properties": {
        "n": {"type": "integer"},
        "city": {"type": "string"},
        "unit": {"enum": ["C", "F", None]},
        "places": {"type": "array", "items": {"$ref": "#/$defs/place"}},
    },
    "required": ["city"],
    "$defs": {"place": {"properties": {"open": {"type": "boolean"},
                                       "next": {"$ref": "#/$defs/place"}}}},
}  # fmt: skip
MANY = {"properties": {name: {"type": ["integer", "null"]} for name in "edcbaf"}, "required": ["c"]}


def fits(parameters: Any, text: str) -> bool:
    tool = {"function": {"name": "f", "parameters": parameters}}
    matcher = call_form([tool, "g"], named=False)._matcher
    data = list(text.replace("'", '<|"|>').encode() + b"<tool_call|>")
    return bool(
        matcher.validate_tokens(data) == len(data)
        and matcher.consume_tokens(data)
        and matcher.is_accepting()
    )


@pytest.mark.parametrize(
    ("parameters", "text", "expected"),
    [
        (PARAMETERS, "f{city:'Oslo'}", True),
        (PARAMETERS, "f{n:-1,city:'Oslo',unit:'F'}", True),
        (PARAMETERS, "f{unit:null,city:'',places:[]}", True),
        (PARAMETERS, "f{city:'a',places:[{open:true,next:{next:{}}},{}]}", True),
        (PARAMETERS, "f{}", False),
        (PARAMETERS, "f{n:1}", False),
        (PARAMETERS, "f{city:'a',n:1.5}", False),
        (PARAMETERS, "f{city:'a',n:01}", False),
        (PARAMETERS, "f{city:1}", False),
        (PARAMETERS, "f{city:'a',unit:'K'}", False),
        (PARAMETERS, "f{city:'a',places:[{open:1}]}", False),
        (PARAMETERS, "f{city:'a',city:'b'}", False),
        (PARAMETERS, "f{city:'a',other:1}", False),
        (MANY, "f{a:1,c:2,f:null}", True),
        (MANY, "f{c:2}", True),
        (MANY, "f{a:1,f:2}", False),
        (MANY, "f{c:1,a:2}", False),
        ({}, "f{any:['thing',{x:1}]}", True),
        ({"type": "object"}, "f{}", True),
        ({"$ref": "#/$defs/a", "$defs": {"a": MANY}}, "f{}", False),
        ({"properties": {"odd key": {"const": "x"}}}, "f{'odd key':'x'}", True),
        (PARAMETERS, "g{any:1}", True),
        (PARAMETERS, "h{}", False),
    ],
)
def test_calls_fit_the_parameters(parameters: Any, text: str, expected: bool) -> None:
    assert fits(parameters, text) is expected


def test_parameters_that_are_too_deep() -> None:
    deep: Any = {}
    for _ in range(500):
        deep = {"items": deep}
    chain = {
        f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}, "type": "array"} for i in range(1200)
    }
    for bad in (deep, {"properties": {"a": {"$ref": "#/$defs/d0"}}, "$defs": chain}):
        tools = ["f", {"function": {"name": "g", "parameters": bad}}]
        with pytest.raises(dgemma.OptionError) as caught:
            call_form(tools, named=False)
        assert str(caught.value.param).startswith("tools")


def test_a_forced_call_fits_its_parameters(tiny_gguf: Path) -> None:
    numbers = {"type": "object", "required": ["n", "kind"],
               "properties": {"n": {"type": "integer"}, "kind": {"enum": ["a", "b"]}}}  # fmt: skip
    tool = {"type": "function", "function": {"name": "count", "parameters": numbers}}
    with DiffusionGemma(tiny_gguf, n_ctx=1024, n_threads=1) as model:
        answer = model.create_chat_completion(
            QUESTION, tools=[tool], tool_choice="required", seed=1, max_tokens=200
        )
    (choice,) = answer["choices"]
    for call in choice["message"].get("tool_calls", []):
        arguments = json.loads(call["function"]["arguments"])
        assert list(arguments) in (["n", "kind"], ["kind", "n"])
        assert isinstance(arguments["n"], int)
        assert arguments["kind"] in ("a", "b")
    assert choice["message"].get("tool_calls") or choice["finish_reason"] == "length"


# ---- With a model --------------------------------------------------------------------------------


def message(llm: DiffusionGemma, response_format: Any, **options: Any) -> dict[str, Any]:
    answer = llm.create_chat_completion(QUESTION, response_format=response_format, **options)
    assert answer["choices"][0]["finish_reason"] == "stop"
    found: dict[str, Any] = answer["choices"][0]["message"]
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "schema",
    [
        {"enum": ["Paris", "Rome"]},
        {"type": "integer", "minimum": 0, "maximum": 99},
        CITY,
        {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    ],
    ids=["enum", "integer", "object", "array"],
)
def test_what_comes_out_follows_the_schema(llm: DiffusionGemma, schema: Any, seed: int) -> None:
    value = json.loads(message(llm, wanted(schema), seed=seed)["content"])
    if "enum" in schema:
        assert value in schema["enum"]
    elif schema["type"] == "integer":
        assert isinstance(value, int)
        assert 0 <= value <= 99
    elif schema["type"] == "object":
        assert list(value) == ["city"]
        assert len(value["city"]) <= 8
    else:
        assert 2 <= len(value) <= 4
        assert {type(item) for item in value} == {bool}


def test_any_object(llm: DiffusionGemma) -> None:
    content = message(llm, {"type": "json_object"}, seed=1)["content"]
    assert isinstance(json.loads(content), dict)


def test_a_thought_comes_first(llm: DiffusionGemma) -> None:
    found = message(llm, wanted({"enum": ["Paris", "Rome"]}), seed=1, enable_thinking=True)
    assert json.loads(found["content"]) in ("Paris", "Rome")


def test_streams_give_out_only_what_is_valid(llm: DiffusionGemma) -> None:
    options: dict[str, Any] = {"response_format": wanted(CITY), "seed": 1}
    whole = llm.create_chat_completion(QUESTION, **options)["choices"][0]["message"]["content"]
    chunks = llm.create_chat_completion(QUESTION, **options, stream=True)
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole


def test_repairs_are_counted_and_keep_what_was_valid(llm: DiffusionGemma) -> None:
    form, _ = json_form(wanted(CITY))
    prompt = llm.chat_template.render(QUESTION)
    answer = llm.choices([prompt], form=form, seed=1).answers[0]
    drafts = [event for event in answer if isinstance(event, Draft)]
    stats = answer.result.stats
    assert stats.repairs > 0
    assert [draft.step for draft in drafts] == [
        step for n in stats.steps for step in range(1, n + 1)
    ]
    brace = llm.tokenizer.encode("{")[0]
    assert drafts[-1].text.startswith("{") or drafts[-1].tokens[0] == brace


def test_max_tokens_cuts_a_valid_beginning(llm: DiffusionGemma) -> None:
    answer = llm.create_chat_completion(
        QUESTION, response_format=wanted(CITY), seed=1, max_tokens=3
    )
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["message"]["content"].startswith("{")


def test_too_many_repairs_are_an_error(
    llm: DiffusionGemma, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "MAX_REPAIRS", 1)
    with pytest.raises(dgemma.ResponseFormatError, match="after 1 repairs"):
        llm.create_chat_completion(QUESTION, response_format=wanted(CITY), seed=1)
    monkeypatch.undo()
    assert message(llm, wanted(CITY), seed=1)  # the session is still usable


def test_a_pinned_token_that_does_not_fit(llm: DiffusionGemma) -> None:
    word = llm.tokenizer.encode("a")[0]
    with pytest.raises(dgemma.ResponseFormatError, match="pinned"):
        llm.create_chat_completion(QUESTION, response_format=wanted(CITY), seed=1, pinned={0: word})


def test_the_same_seed_repairs_in_the_same_way(llm: DiffusionGemma) -> None:
    assert message(llm, wanted(CITY), seed=5) == message(llm, wanted(CITY), seed=5)
