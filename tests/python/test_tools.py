"""Taking answers apart: thoughts, calls and text, whole and cut at every place."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma.tools import AnswerParser, parse_call, split_answer, write_call
from dgemma.tools.reader import QUOTE, read_object

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
        ("<|tool_call>call:f{a:1", ("call:f{a:1", "", [])),
        ("<|tool_call>nonsense<tool_call|>x", ("nonsensex", "", [])),
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


# ---- What models really write --------------------------------------------------------------------


def calls_of(text: str) -> tuple[str, list[tuple[str, Any]]]:
    content, _, calls = split_answer(text)
    return content, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("call:f{zip:01234}", [("f", {"zip": "01234"})]),
        ("call:f{n:1e999}", [("f", {"n": "1e999"})]),
        (
            "call:f{n:-1e999,m:NaN,o:Infinity}",
            [("f", {"n": "-1e999", "m": "NaN", "o": "Infinity"})],
        ),
        (
            "call:f{n:1.,m:.5,o:+1,p:1_000}",
            [("f", {"n": "1.", "m": ".5", "o": "+1", "p": "1_000"})],
        ),
        ("call:f(x=1)", [("f", {"x": 1})]),
        (
            "call:f(x='it\\'s', y=<|\"|>z<|\"|>, ok=True)",
            [("f", {"x": "it's", "y": "z", "ok": True})],
        ),
        ("call:f()", [("f", {})]),
        ("f{x:1}", [("f", {"x": 1})]),
        ("call:f{x:1", [("f", {"x": 1})]),
        ("call:f{x:[1,{y:2", [("f", {"x": [1, {"y": 2}]})]),
        ("call:f{x:1}call:g{y:2}", [("f", {"x": 1}), ("g", {"y": 2})]),
        ("call:f{x:1}, call:g{y:2};call:h", [("f", {"x": 1}), ("g", {"y": 2}), ("h", {})]),
        ('call:f{"a":"he said \\"hi\\", ok"}', [("f", {"a": 'he said "hi", ok'})]),
        ('call:f{"a":"\\u00e9\\n\\d","b":"C:\\\\x"}', [("f", {"a": "é\n\\d", "b": "C:\\x"})]),
        ('{"name":"f","arguments":{"x":[1,2]}}', [("f", {"x": [1, 2]})]),
        (
            '[{"name":"f","arguments":"{\\"x\\":1}"},{"function":{"name":"g"}}]',
            [("f", {"x": 1}), ("g", {})],
        ),
        ('{"name":"f","parameters":{"x":1}}', [("f", {"x": 1})]),
        ("call:srv.tool/do-it:v2{x:1}", [("srv.tool/do-it:v2", {"x": 1})]),
        ("  call: f {\n x : 1 ,\n y : two words\n}\n", [("f", {"x": 1, "y": "two words"})]),
        (
            'call:f{a:<|"|>x<|"|> and <|"|>y, z<|"|>}',
            [("f", {"a": '<|"|>x<|"|> and <|"|>y, z<|"|>'})],
        ),
    ],
)
def test_calls_as_they_come(text: str, calls: list[tuple[str, Any]]) -> None:
    assert calls_of(f"<|tool_call>{text}<tool_call|>") == ("", calls)
    assert calls_of(f"Well. <|tool_call>{text}<tool_call|>Done.") == ("Well. Done.", calls)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        # Whole but for the mark behind it: a call. Cut off: text, and nothing is carried out.
        ("<|tool_call>call:f{x:1}", "", [("f", {"x": 1})]),
        ("<|tool_call>call:f{x:1}call:g{y", "call:f{x:1}call:g{y", []),
        ('<|tool_call>call:rm{path:<|"|>/tm', 'call:rm{path:"/tm', []),
        ("<|tool_call>let me see<tool_call|>", "let me see", []),
        ("<|tool_call>call:f{x:1} and more<tool_call|>.", "and more.", [("f", {"x": 1})]),
        ("<|tool_call>call:f(1, 2)<tool_call|>", "call:f(1, 2)", []),
        ("<|tool_call><tool_call|>", "", []),
        # Marks that close or open nothing.
        ('Yes<tool_call|> and <|"|>no<|"|><tool_response|>', "Yes and no", []),
        # A quotation mark that is never closed does not take the rest of the answer along.
        ('<|tool_call>call:f{a:<|"|>x}<tool_call|>Hi.', "Hi.", [("f", {"a": "x}"})]),
        ('<|tool_call>call:f{a:5" wide}<tool_call|>Hi.', "Hi.", [("f", {"a": '5" wide'})]),
    ],
)
def test_nothing_is_lost(text: str, content: str, calls: list[tuple[str, Any]]) -> None:
    assert calls_of(text) == (content, calls)


def test_a_thought_without_a_name_is_kept() -> None:
    assert split_answer("<|channel>I wonder, why?<channel|>Yes.")[:2] == ("Yes.", "I wonder, why?")
    assert split_answer("<|channel>I wonder")[:2] == ("", "I wonder")


def test_what_is_too_deep_is_kept_as_text() -> None:
    source = "[" * 200 + "1" + "]" * 200
    ((_, arguments),) = calls_of(f"<|tool_call>call:f{{a:{source}}}<tool_call|>")[1]
    value, levels = arguments["a"], 0
    while isinstance(value, list):
        (value,), levels = value, levels + 1
    assert "[" * levels + value + "]" * levels == source


JSON_LEAVES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])), st.booleans(), st.none(),
    st.integers(-(10**30), 10**30), st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["<tool_call|>", QUOTE, "{", "a, b: c}", '"', "\\", "'", "null", "01", "f{"]),
)  # fmt: skip
KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8) | st.just(QUOTE)
JSON_VALUES = st.recursive(
    JSON_LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)
CALLS = st.lists(
    st.tuples(
        st.from_regex(r"[A-Za-z_][A-Za-z0-9_.:/-]{0,12}", fullmatch=True),
        st.dictionaries(KEYS, JSON_VALUES, max_size=4),
    ),
    min_size=1,
    max_size=3,
)


def written(calls: list[tuple[str, dict[str, Any]]]) -> str:
    return "".join(f"<|tool_call>{write_call(*call)}<tool_call|>" for call in calls)


@given(CALLS)
@settings(max_examples=400, deadline=None)
def test_what_is_written_is_read_again(calls: list[tuple[str, dict[str, Any]]]) -> None:
    assert calls_of(written(calls)) == ("", calls)
    as_one = "".join(write_call(*call) for call in calls)
    assert calls_of(f"<|tool_call>{as_one}<tool_call|>") == ("", calls)
    as_json = json.dumps([{"name": n, "arguments": a} for n, a in calls], ensure_ascii=False)
    assert calls_of(f"<|tool_call>{as_json}<tool_call|>") == ("", calls)


@given(CALLS, st.data())
@settings(max_examples=400, deadline=None)
def test_damage_gives_calls_or_text(calls: list[tuple[str, dict[str, Any]]], data: Any) -> None:
    text = written(calls)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(text)))
        n = data.draw(st.integers(0, 8))
        noise = data.draw(st.text(st.sampled_from("{}[](),:=\"'\\<|>a1 \n"), max_size=3))
        text = text[:at] + noise + text[at + n :]
    whole = split_answer(text)
    for call in whole[2]:
        assert call.name
        assert isinstance(json.loads(call.arguments, parse_constant=pytest.fail), dict)
    cut = data.draw(st.integers(0, len(text)))
    content, reasoning, found = in_pieces(text[:cut], text[cut:])
    assert (content, reasoning) == whole[:2]
    assert found == [(call.name, json.loads(call.arguments)) for call in whole[2]]
    for mark in ("<|tool_call>", "<tool_call|>", QUOTE):
        assert mark not in content


@given(st.text(max_size=200), st.integers(0, 100))
@settings(max_examples=300, deadline=None)
def test_any_text_has_arguments(text: str, at: int) -> None:
    assert isinstance(read_object(text), dict)
    whole = json.dumps({"text": text, "n": [1, {"x": None}]}, ensure_ascii=False)
    assert isinstance(read_object(whole[:at]), dict)
    assert read_object(whole) == json.loads(whole)
