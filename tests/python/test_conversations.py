"""Conversations with the trained checkpoint: tools that the model chooses, and what turns cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dgemma import DiffusionGemma
from dgemma.generation import generate as generation

# fmt: off
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{what} in a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Name of the city"}},
                "required": ["city"],
            },
        },
    }
    for name, what in (("get_weather", "Weather"), ("get_time", "Time"))
]
# fmt: on


THOUGHT = "<|channel>thought\n<channel|>"  # empty: how a prompt says that there is no thinking


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def ask(llm: DiffusionGemma, *messages: dict[str, Any], **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = llm.create_chat_completion(list(messages), seed=1, **options)
    return found


# ---- Tools ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [None, "auto", "required"])
@pytest.mark.parametrize(
    ("question", "name", "city"),
    [
        ("Is it sunny in Oslo?", "get_weather", "Oslo"),
        ("What time is it in Rome?", "get_time", "Rome"),
    ],
)
def test_the_model_chooses_a_tool(
    llm: DiffusionGemma, question: str, name: str, city: str, choice: str | None
) -> None:
    answer = ask(llm, user(question), tools=TOOLS, tool_choice=choice)
    (found,) = answer["choices"]
    assert found["finish_reason"] == "tool_calls"
    assert found["message"]["content"] is None
    (call,) = found["message"]["tool_calls"]
    assert call["function"]["name"] == name
    assert json.loads(call["function"]["arguments"]) == {"city": city}


def test_a_named_tool_is_called_whatever_the_question(llm: DiffusionGemma) -> None:
    choice = {"type": "function", "function": {"name": "get_time"}}
    answer = ask(llm, user("Is it sunny in Oslo?"), tools=TOOLS, tool_choice=choice)
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == (
        "get_time",
        {"city": "Oslo"},
    )


@pytest.mark.parametrize("question", ["What is the capital of France?", "Reverse the list: a b"])
def test_required_makes_a_call_of_any_question(llm: DiffusionGemma, question: str) -> None:
    for seed in range(4):
        answer = llm.create_chat_completion(
            [user(question)], tools=TOOLS, tool_choice="required", seed=seed, max_tokens=200
        )
        calls = answer["choices"][0]["message"].get("tool_calls", [])
        assert calls or answer["choices"][0]["finish_reason"] == "length"
        for call in calls:
            assert call["function"]["name"] in ("get_weather", "get_time")
            assert isinstance(json.loads(call["function"]["arguments"]), dict)


def test_none_never_calls(llm: DiffusionGemma) -> None:
    for question in ("Is it sunny in Oslo?", "What time is it in Rome?"):
        answer = ask(llm, user(question), tools=TOOLS, tool_choice="none", max_tokens=64)
        assert "tool_calls" not in answer["choices"][0]["message"]


def test_a_streamed_call(llm: DiffusionGemma) -> None:
    chunks = ask_stream(llm, user("Is it sunny in Oslo?"), tools=TOOLS)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert all("content" not in delta for delta in deltas)
    (calls,) = (delta["tool_calls"] for delta in deltas if "tool_calls" in delta)
    (call,) = calls
    assert call["index"] == 0
    assert call["id"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def ask_stream(llm: DiffusionGemma, *messages: Any, **options: Any) -> list[dict[str, Any]]:
    return list(llm.create_chat_completion(list(messages), seed=1, stream=True, **options))


def test_the_answer_to_a_response(llm: DiffusionGemma) -> None:
    question = user("Is it sunny in Oslo?")
    called = ask(llm, question, tools=TOOLS)["choices"][0]["message"]
    response = {
        "role": "tool",
        "tool_call_id": called["tool_calls"][0]["id"],
        "content": json.dumps({"sky": "cloudy", "degrees": 12}),
    }
    answer = ask(llm, question, called, response, tools=TOOLS)
    assert "cloudy in Oslo" in answer["choices"][0]["message"]["content"]


# ---- What a turn costs ---------------------------------------------------------------------------


def encoded(usage: dict[str, Any]) -> int:
    """Tokens of a prompt that had to be encoded."""
    return int(usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"])


def test_the_second_turn_costs_its_own_tokens(llm: DiffusionGemma) -> None:
    llm.reset()
    opening = "My name is Emma. I live in Rome and I have a blue boat."
    first = ask(llm, user(opening))
    assert encoded(first["usage"]) == first["usage"]["prompt_tokens"]
    said = first["choices"][0]["message"]
    second = ask(llm, user(opening), said, user("Where do I live?"))
    # The first turn's prompt ends with an empty thought, which the template drops once the turn is
    # over. Everything before it is reused.
    prompt = llm.encode_prompt(llm.chat_template.render([user(opening)]))
    thought = llm.tokenizer.encode(THOUGHT)
    assert prompt[-len(thought) :] == thought
    n_reused = len(prompt) - len(thought)
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == n_reused
    new = llm.tokenizer.encode(
        f"{said['content']}<turn|>\n<|turn>user\nWhere do I live?<turn|>\n<|turn>model\n{THOUGHT}"
    )
    assert encoded(second["usage"]) == len(new)
    assert "Rome" in second["choices"][0]["message"]["content"]


def test_going_on_after_a_call_costs_the_call_and_its_response(llm: DiffusionGemma) -> None:
    llm.reset()
    question = user("Is it sunny in Oslo?")
    first = ask(llm, question, tools=TOOLS)
    called = first["choices"][0]["message"]
    response = {"role": "tool", "tool_call_id": called["tool_calls"][0]["id"], "content": "sunny"}
    second = ask(llm, question, called, response, tools=TOOLS)
    n_thought = len(llm.tokenizer.encode(THOUGHT))
    reused = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert reused == first["usage"]["prompt_tokens"] - n_thought


@pytest.mark.parametrize("n_rewind", [1024, 0])
def test_a_turn_after_an_answer_of_many_canvases(llm: DiffusionGemma, n_rewind: int) -> None:
    """The sliding layers keep enough to go back to where the answer began, if they are told to."""
    length = llm.info.canvas_length
    prompt = llm.encode_prompt(llm.chat_template.render([user("Count from 3 to 9.")]))
    pinned = dict.fromkeys(range(6 * length), prompt[-3])  # no end token fits in
    with llm.session(n_batch=16, n_rewind=n_rewind) as session:
        long = llm.generate(prompt, session=session, max_tokens=6 * length, pinned=pinned, seed=0)
        assert long.stats.canvases == 6
        assert session.n_past == len(prompt) + 5 * length
        back = llm.generate(prompt[:-2], session=session, max_tokens=4, seed=0)
    assert back.stats.cached_tokens == (len(prompt) - 2 if n_rewind else 0)
    with llm.session(n_batch=16) as other:
        fresh = llm.generate(prompt[:-2], session=other, max_tokens=4, seed=0)
    assert back.tokens == fresh.tokens


def test_a_saved_conversation_goes_on_without_encoding_it_again(
    llm: DiffusionGemma, tmp_path: Path
) -> None:
    messages = [user("What is the capital of France?")]
    prompt = llm.chat_template.render(messages)
    expected = llm.generate(prompt, seed=3)
    llm.save(tmp_path / "session")
    with llm.session() as session:
        session.load(tmp_path / "session")
        again = llm.generate(prompt, seed=3, session=session)
    assert again.tokens == expected.tokens
    assert again.stats.cached_tokens == again.stats.prompt_tokens


def test_sessions_do_not_disturb_each_other(llm: DiffusionGemma) -> None:
    texts = ["My name is Emma. I live in Rome.", "My name is Ben. I live in Oslo."]
    with llm.session() as one, llm.session() as two:
        sessions = (one, two)
        for text, session in zip(texts, sessions, strict=True):
            ask(llm, user(text), session=session)
        turns = [
            ask(llm, user(text), {"role": "assistant", "content": "Hello."},
                user("Where do I live?"), session=session)
            for text, session in zip(texts, sessions, strict=True)
        ]  # fmt: skip
    said = [turn["choices"][0]["message"]["content"] for turn in turns]
    assert "Rome" in said[0]
    assert "Oslo" in said[1]
    assert all(turn["usage"]["prompt_tokens_details"]["cached_tokens"] > 0 for turn in turns)


# ---- Editing in place ----------------------------------------------------------------------------


def test_a_form_keeps_its_labels(llm: DiffusionGemma) -> None:
    """Labels are pinned, the blanks between them are denoised."""
    labels = {0: "city", 4: "sky"}
    pinned = {at: llm.tokenizer.encode(text)[0] for at, text in labels.items()}
    result = llm.generate("A form:", pinned=pinned, max_tokens=8, seed=2)
    for at, token in pinned.items():
        if at < len(result.tokens):
            assert result.tokens[at] == token


def test_editing_in_place_starts_from_the_text_given(
    llm: DiffusionGemma, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = llm.encode_prompt("The old man")
    text = llm.tokenizer.encode(" sees the red fox near the lake.")
    begun: list[Any] = []
    original = generation.Session.begin_canvas

    def watched(session: Any, *arguments: Any, **options: Any) -> None:
        begun.append(options["start"])
        original(session, *arguments, **options)

    monkeypatch.setattr(generation.Session, "begin_canvas", watched)
    keep = dict(enumerate(text[:3]))
    result = llm.generate(prompt, start=text, pinned=keep, max_tokens=len(text), seed=0)
    np.testing.assert_array_equal(begun[0][: len(text)], text)
    assert result.tokens[:3] == text[:3]
