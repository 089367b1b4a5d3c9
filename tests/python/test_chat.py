"""Prompts from messages, with Gemma 4's template; and templates that mean harm."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import dgemma
from dgemma.chat import ChatTemplate, normalized, sandbox
from dgemma.chat.sandbox import Template

KEYS = {"tokenizer.ggml.tokens": ["<bos>", "<eos>"], "tokenizer.ggml.bos_token_id": 0}
BUILT_IN = ChatTemplate(KEYS)
NO_THOUGHT = "<|channel>thought\n<channel|>"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where"}},
            "required": ["city"],
        },
    },
}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


@pytest.fixture(scope="module")
def published(gemma4: Path) -> ChatTemplate:
    with dgemma.File(gemma4 / "vocab.gguf") as file:
        return ChatTemplate(dict(file.keys))


CONVERSATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "one question": (
        {"messages": [user(" Hi ")]},
        f"<bos><|turn>user\nHi<turn|>\n<|turn>model\n{NO_THOUGHT}",
    ),
    "thinking": (
        {"messages": [user("Hi")], "enable_thinking": True},
        "<bos><|turn>system\n<|think|><turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n",
    ),
    "system, several turns, an old thought": (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                user("Hi"),
                {"role": "assistant", "content": "<|channel>thought\nhm<channel|>Hello."},
                user("Bye"),
            ]
        },
        "<bos><|turn>system\nBe brief.<turn|>\n"
        "<|turn>user\nHi<turn|>\n<|turn>model\nHello.<turn|>\n"
        f"<|turn>user\nBye<turn|>\n<|turn>model\n{NO_THOUGHT}",
    ),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
        f"<bos><|turn>user\nHi<turn|>\n<|turn>model\n{NO_THOUGHT}",
    ),
    "a tool is declared": (
        {"messages": [user("Hi")], "tools": [WEATHER]},
        '<bos><|turn>system\n<|tool>declaration:weather{description:<|"|>Says the weather.<|"|>,'
        'parameters:{properties:{city:{description:<|"|>Where<|"|>,type:<|"|>STRING<|"|>}},'
        'required:[<|"|>city<|"|>],type:<|"|>OBJECT<|"|>}}<tool|><turn|>\n'
        f"<|turn>user\nHi<turn|>\n<|turn>model\n{NO_THOUGHT}",
    ),
    "a call, its response and the answer": (
        {
            "messages": [
                user("Weather?"),
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
                {"role": "assistant", "content": "Sunny."},
                user("Thanks"),
            ]
        },
        "<bos><|turn>user\nWeather?<turn|>\n<|turn>model\n"
        '<|tool_call>call:weather{city:<|"|>Rome<|"|>}<tool_call|>'
        '<|tool_response>response:weather{value:<|"|>sunny<|"|>}<tool_response|>Sunny.<turn|>\n'
        f"<|turn>user\nThanks<turn|>\n<|turn>model\n{NO_THOUGHT}",
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_built_in_template(name: str) -> None:
    arguments, expected = CONVERSATIONS[name]
    assert BUILT_IN.render(**arguments) == expected


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_published_template(published: ChatTemplate, name: str) -> None:
    arguments, expected = CONVERSATIONS[name]
    assert published.render(**arguments) == expected


def test_responses_find_their_calls() -> None:
    calls = [
        {"id": id, "function": {"name": name, "arguments": {}}}
        for id, name in (("a", "first"), ("b", "second"))
    ]
    found = normalized(
        [
            user("Go"),
            {"role": "assistant", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "b", "content": '{"x": 1}'},
            {"role": "tool", "content": "[1]"},
        ]
    )
    assert [(r["name"], r["response"]) for r in found[1]["tool_responses"]] == [
        ("second", {"x": 1}),
        ("second", "[1]"),
    ]


def test_a_named_template_for_tools() -> None:
    template = ChatTemplate(
        {"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "with tools"}
    )
    assert template.render([user("Hi")]) == "plain"
    assert template.render([user("Hi")], tools=[WEATHER]) == "with tools"


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        ("Hi", TypeError, "list"),
        ([], ValueError, "at least one"),
        (["Hi"], TypeError, r"messages\[0\]"),
        ([{"role": "robot", "content": ""}], ValueError, "robot"),
        ([{"role": "user", "content": 1}], TypeError, "content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], ValueError, "image_url"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], TypeError, "tool_calls"),
        ([{"role": "user", "tool_calls": "f"}], TypeError, "tool_calls"),
    ],
)
def test_malformed_messages(messages: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BUILT_IN.render(messages)


def test_a_template_may_refuse() -> None:
    template = ChatTemplate({"tokenizer.chat_template": "{{ raise_exception('no system') }}"})
    with pytest.raises(dgemma.ChatTemplateError, match="no system"):
        template.render([user("Hi")])


def test_what_templates_use() -> None:
    source = (
        "{%- for m in messages if m.n != 2 -%}{{ loop.index }}/{{ loop.length }}{{ m.n }}"
        "{%- if loop.last %}!{% else %},{% endif -%}{%- endfor -%}"
        "{%- for k, v in {'b': 1, 'a': [2]} | dictsort -%}{{ k ~ '=' ~ v }};{%- endfor -%}"
        "{%- for i in range(9) -%}{%- if i == 2 -%}{%- break -%}{%- endif -%}{{ i }}{%- endfor -%}"
        "{{ messages | map(attribute='n') | join('+') }}{{ {'x': none} | tojson }}"
        "{{ 'a-b'.split('-')[1].upper() }}{{ strftime_now('%Y') | length }}"
    )
    rendered = Template(source).render(messages=[{"n": 1}, {"n": 2}, {"n": 3}])
    assert rendered == '1/21,2/23!a=[2];b=1;011+2+3{"x": null}B4'


DOUBLING = (
    "{%% set ns = namespace(x=%s) %%}{%% for i in range(60) %%}{%% set ns.x = %s %%}{%% endfor %%}"
)
HOSTILE = {
    "loops without end": "{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% endfor %}{% endfor %}",
    "a generator in a loop": "{% for i in range(99999) %}{% for j in range(99999)|map('string') %}"
    "{% endfor %}{% endfor %}",
    "repetition": "{{ 'a' * 10**10 }}",
    "repetition of lists": "{{ [1] * 10**10 }}",
    "joining": DOUBLING % ("'aa'", "ns.x ~ ns.x"),
    "adding": DOUBLING % ("'aa'", "ns.x + ns.x"),
    "nesting": DOUBLING % ("[1]", "[ns.x, ns.x]") + "{{ ns.x }}",
    "nesting as JSON": DOUBLING % ("[1]", "[ns.x, ns.x]") + "{{ ns.x|tojson }}",
    "padding": "{{ 'a'.center(10**12) }}",
    "a wide field": "{{ '%9999999999d' % 1 }}",
    "a wide format": "{{ '{:9999999999}'.format(1) }}",
    "replacing": "{{ ('a' * 10**6)|replace('', 'b' * 10**6) }}",
    "replacing by a method": "{{ ('a' * 10**6).replace('', 'b' * 10**6) }}",
    "joining lists": "{{ range(90000)|map('string')|join('b' * 10**6) }}",
    "powers": "{{ 10 ** (10 ** 10) }}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "much output": "{% for a in range(9999) %}{% for b in range(9999) %}{{ 'xxxxxxxxxxxxx' }}"
    "{% endfor %}{% endfor %}",
    "Python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__.sys }}",
    "files": "{% include '/etc/passwd' %}",
    "the caller's data": "{{ messages.append(1) }}",
    "bad syntax": "{% for %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.5)
    with pytest.raises(dgemma.ChatTemplateError):
        Template(HOSTILE[name]).render(messages=[user("Hi")])


def test_a_loop_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.2)
    template = Template(HOSTILE["loops without end"])
    deadline = time.monotonic() + 60  # 10**10 rounds would take hours
    with pytest.raises(dgemma.ChatTemplateError, match="longer than"):
        template.render()
    assert time.monotonic() < deadline


def test_a_template_of_the_wrong_type() -> None:
    with pytest.raises(dgemma.ModelFileError, match="list"):
        ChatTemplate({"tokenizer.chat_template": ["x"]})
