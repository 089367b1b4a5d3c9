"""Taking answers apart: thoughts, calls and text, whole and cut at every place."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma.tools import AnswerParser, parse_call, split_answer

ANSWER = (
    "<|channel>thought\nFirst, the <b>weather</b>.\n<channel|>Let me look. "
    '<|tool_call>call:weather{city:<|"|>Rome, {Italy} <tool_call|><|"|>,days:2}<tool_call|>'
    '<|tool_call>call:time{zone:{name:<|"|>CET<|"|>,offsets:[1,2.5,-3]},dst:true,x:null}<tool_call|>'
    "Done.<|tool_response>never shown"
)


def in_pieces(*texts: str) -> tuple[str, str, list[tuple[str, Any]]]:
    parser = AnswerParser()
    pieces = [piece for text in texts for piece in parser.feed(text)] + parser.finish()
    content = "".join(piece.content for piece in pieces)
    reasoning = "".join(piece.reasoning for piece in pieces)
    calls = [(p.call.name, json.loads(p.call.arguments)) for p in pieces if p.call is not None]
    return content, reasoning, calls


EXPECTED = (
    "Let me look. Done.",
    "First, the <b>weather</b>.\n",
    [
        ("weather", {"city": "Rome, {Italy} <tool_call|>", "days": 2}),
        ("time", {"zone": {"name": "CET", "offsets": [1, 2.5, -3]}, "dst": True, "x": None}),
    ],
)


def test_a_whole_answer() -> None:
    assert in_pieces(ANSWER) == EXPECTED


@pytest.mark.parametrize("at", range(1, len(ANSWER)))
def test_cut_anywhere(at: int) -> None:
    assert in_pieces(ANSWER[:at], ANSWER[at:]) == EXPECTED


def test_character_by_character_nothing_leaks() -> None:
    assert in_pieces(*ANSWER) == EXPECTED
    parser, seen = AnswerParser(), ""
    for character in ANSWER:
        seen += "".join(piece.content for piece in parser.feed(character))
        assert EXPECTED[0].startswith(seen)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|channel>thought\n<channel|>Yes.", ("Yes.", "", [])),
        ("<|channel>thought<channel|>Yes.", ("Yes.", "", [])),
        ("<|channel>thought\nnever closed", ("", "never closed", [])),
        ("a < b and <| c", ("a < b and <| c", "", [])),
        ("ends with <|chan", ("ends with <|chan", "", [])),
        ("stray<channel|> end", ("stray end", "", [])),
        ("<|tool_call>call:f{}<tool_call|>", ("", "", [("f", {})])),
        ("<|tool_call>call:f<tool_call|>", ("", "", [("f", {})])),
        ("<|tool_call>call:f{a:1", ("", "", [])),
        ("<|tool_call>nonsense<tool_call|>x", ("x", "", [])),
        ("", ("", "", [])),
    ],
)
def test_odd_answers(text: str, expected: tuple[str, str, list[Any]]) -> None:
    assert in_pieces(text) == expected


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("call:f{a:1,b:-2.5e3}", {"a": 1, "b": -2500.0}),
        ('call:f{<|"|>odd key<|"|>:<|"|><|"|>}', {"odd key": ""}),
        ('call:f{"a":"b"}', {"a": "b"}),
        ("call:f{a:word with spaces}", {"a": "word with spaces"}),
        ('call:f{a:[<|"|>x<|"|>,[],{}]}', {"a": ["x", [], {}]}),
        ('call:f{a:<|"|>cut off', {"a": "cut off"}),
        ("call:f{a:[1,2", {"a": [1, 2]}),
        ("call:f{,,:}", {}),
        ("call:f{a}", {}),
    ],
)
def test_arguments(text: str, arguments: dict[str, Any]) -> None:
    call = parse_call(text)
    assert call is not None
    assert json.loads(call.arguments) == arguments


@given(st.text(st.sampled_from('{}[],:" a1<|>\n')))
@settings(max_examples=500)
def test_any_arguments_end_and_are_json(text: str) -> None:
    call = parse_call("call:f{" + text)
    assert call is not None
    assert isinstance(json.loads(call.arguments), dict)


def test_deep_nesting_is_cut() -> None:
    call = parse_call("call:f{a:" + "[" * 100_000)
    assert call is not None
    json.loads(call.arguments)


@given(st.lists(st.sampled_from(["<|channel>", "thought\n", "<channel|>", "<|", "hi", "\n"])))
def test_splitting_a_stream_changes_nothing(pieces: list[str]) -> None:
    content, reasoning, calls = split_answer("".join(pieces))
    assert in_pieces(*pieces)[:2] == (content, reasoning)
    assert not calls


def test_ids_differ() -> None:
    _, _, calls = split_answer("<|tool_call>call:f{}<tool_call|>" * 20)
    assert len({call.id for call in calls}) == 20
