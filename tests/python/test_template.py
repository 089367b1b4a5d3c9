"""Gemma 4's own template against ours, and our rendering of it against that of `transformers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

import dgemma
from dgemma.chat import ChatTemplate, normalized

KEYS = {"tokenizer.ggml.tokens": ["<bos>", "<eos>"], "tokenizer.ggml.bos_token_id": 0}
BUILT_IN = ChatTemplate(KEYS)


@pytest.fixture(scope="module")
def source(gemma4: Path) -> str:
    """The template that Gemma 4 was published with."""
    with dgemma.File(gemma4 / "vocab.gguf") as file:
        return str(file.keys["tokenizer.chat_template"])


# ---- Conversations of every shape ----------------------------------------------------------------

WORDS = st.sampled_from(["Hi", " two words ", "", "<b>", "ünï\ncode", "a: 1, {b}"])
NAMES = st.sampled_from(["city", "get_time", "b", "zone"])
LEAVES = st.one_of(WORDS, st.integers(-9, 99), st.booleans(), st.none(), st.just(1.5))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2),
    max_leaves=4,
)
OBJECTS = st.dictionaries(NAMES, VALUES, max_size=3)
DESCRIPTIONS = st.sampled_from(["", "Where to look"])


def field(**parts: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {}, optional={"description": DESCRIPTIONS, "nullable": st.booleans(), **parts}
    )


def typed(name: str, inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return inner.map(lambda found: {"type": name, **found})


SIMPLE = st.one_of(
    typed("string", field(enum=st.lists(WORDS, min_size=1, max_size=3))),
    typed("integer", field()),
    typed("boolean", field(default=st.booleans())),
)
SCHEMAS = st.recursive(
    SIMPLE,
    lambda inner: st.one_of(
        typed("array", field(items=inner)),
        typed(
            "object",
            st.fixed_dictionaries(
                {"properties": st.dictionaries(NAMES, inner, max_size=2)}
            ).flatmap(
                lambda found: field(required=st.lists(NAMES, max_size=2)).map(
                    lambda more: {**found, **more}
                )
            ),
        ),
    ),
    max_leaves=4,
)
PARAMETERS = st.fixed_dictionaries(
    {"type": st.just("object"), "properties": st.dictionaries(NAMES, SCHEMAS, max_size=3)},
    optional={"required": st.lists(NAMES, max_size=2)},
)
TOOLS = st.lists(
    st.fixed_dictionaries(
        {"name": NAMES, "description": WORDS, "parameters": PARAMETERS | st.just({})}
    ).map(lambda function: {"type": "function", "function": function}),
    max_size=2,
)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Messages in OpenAI's form: questions, answers with thoughts, calls and their responses."""
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(WORDS)})
    for turn in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(WORDS)})
        for _ in range(draw(st.integers(0, 2))):
            calls = draw(st.lists(st.tuples(NAMES, OBJECTS), min_size=1, max_size=2))
            ids = [f"call_{turn}_{n}" for n in range(len(calls))]
            messages.append(
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": id, "type": "function",
                         "function": {"name": name, "arguments": json.dumps(arguments)}}
                        for id, (name, arguments) in zip(ids, calls, strict=True)
                    ],
                }
            )  # fmt: skip
            for id in ids:
                content = draw(WORDS | OBJECTS.map(json.dumps))
                messages.append({"role": "tool", "tool_call_id": id, "content": content})
        if draw(st.booleans()):
            thought = draw(st.sampled_from(["", "<|channel>thought\nhm<channel|>"]))
            messages.append({"role": "assistant", "content": thought + draw(WORDS)})
    if messages[-1]["role"] == "assistant":
        messages.append({"role": "user", "content": draw(WORDS)})
    return messages


def by_transformers(
    source: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]], thinking: bool
) -> str:
    (rendered,), _ = render_jinja_template(
        conversations=[normalized(messages)],
        chat_template=source,
        tools=tools or None,
        add_generation_prompt=True,
        enable_thinking=thinking,
        bos_token="<bos>",
    )
    return str(rendered)


@given(conversations(), TOOLS, st.booleans())
@settings(max_examples=300, deadline=None)
def test_our_template_writes_what_the_published_one_writes(
    source: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]], thinking: bool
) -> None:
    expected = by_transformers(source, messages, tools, thinking)
    assert BUILT_IN.render(messages, tools=tools, enable_thinking=thinking) == expected


@given(conversations(), TOOLS, st.booleans())
@settings(max_examples=100, deadline=None)
def test_the_sandbox_renders_the_published_template_as_transformers_does(
    source: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]], thinking: bool
) -> None:
    published = ChatTemplate({**KEYS, "tokenizer.chat_template": source})
    expected = by_transformers(source, messages, tools, thinking)
    assert published.render(messages, tools=tools, enable_thinking=thinking) == expected


def test_the_tiny_models_template_is_the_built_in_one(tiny: Path) -> None:
    package = Path(dgemma.__file__).parent
    assert (tiny / "chat_template.jinja").read_text() == (
        package / "chat" / "gemma4.jinja"
    ).read_text()


def test_responses_as_messages_of_their_own_read_alike(tiny: Path) -> None:
    """As `transformers` passes them on; here they are put into the message that called."""
    source = (tiny / "chat_template.jinja").read_text()
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}
    messages = [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "f", "content": "done"},
        {"role": "assistant", "content": "It is done."},
        {"role": "user", "content": "Thanks"},
    ]
    for end in (3, 5):
        (raw,), _ = render_jinja_template(
            conversations=[messages[:end]],
            chat_template=source,
            add_generation_prompt=True,
            bos_token="<bos>",
        )
        assert raw == BUILT_IN.render(messages[:end])


@pytest.mark.parametrize("kind", ["image_url", "image", "input_audio", "video"])
def test_what_is_no_text_is_refused(kind: str) -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {"url": "x"}}]
    with pytest.raises(ValueError, match=rf"{kind}.*reads text only"):
        BUILT_IN.render([{"role": "user", "content": parts}])
