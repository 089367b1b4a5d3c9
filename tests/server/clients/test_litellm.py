"""LiteLLM: OpenAI's, Anthropic's and the text API, by its names of providers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from support.clients import CAPITAL, CLOUDY, PARIS, STORY, SUNNY, TOOL, WEATHER
from support.serving import KEY

litellm = pytest.importorskip("litellm", reason="needs the extra `clients`")

QUESTION = [{"role": "user", "content": CAPITAL}]


@pytest.fixture
def options(server: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("NO_PROXY", "*")
    return {"model": "openai/tiny", "api_base": f"{server}/v1", "api_key": KEY, "seed": 1}


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "lm_studio"])
def test_chat(options: dict[str, Any], provider: str) -> None:
    options = {**options, "model": f"{provider}/tiny", "messages": QUESTION, "temperature": 0}
    whole = litellm.completion(**options, top_p=0.9)
    assert whole.choices[0].message.content == PARIS
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens > 0
    told = list(litellm.completion(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in told if c.choices) == PARIS
    built = litellm.stream_chunk_builder(told)
    assert built.choices[0].message.content == PARIS
    assert built.usage.total_tokens == whole.usage.total_tokens


def test_coroutines(options: dict[str, Any]) -> None:
    whole = asyncio.run(litellm.acompletion(**options, messages=QUESTION))
    assert whole.choices[0].message.content == PARIS


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_and_its_result_answered(options: dict[str, Any], stream: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": SUNNY}]
    options = {**options, "tools": [TOOL]}
    answer = litellm.completion(**options, messages=messages, stream=stream)
    if stream:
        answer = litellm.stream_chunk_builder(list(answer))
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": WEATHER}]
    answer = litellm.completion(**options, messages=messages)
    assert answer.choices[0].message.content == CLOUDY


def test_anthropics_api(options: dict[str, Any], server: str) -> None:
    del options["seed"]  # which that API has not
    options |= {"model": "anthropic/claude-sonnet-4-5", "api_base": server}
    options |= {"messages": QUESTION, "max_tokens": 100, "temperature": 0}
    assert litellm.completion(**options).choices[0].message.content == PARIS
    told = litellm.completion(**options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in told) == PARIS


def test_responses(options: dict[str, Any]) -> None:
    options = {name: value for name, value in options.items() if name != "seed"}
    whole = litellm.responses(**options, input=CAPITAL, extra_body={"seed": 1})
    assert whole.output[0].content[0].text == PARIS


def test_texts(options: dict[str, Any]) -> None:
    options |= {"model": "text-completion-openai/tiny", "prompt": STORY, "max_tokens": 8}
    whole = litellm.text_completion(**options)
    told = litellm.text_completion(**options, stream=True)
    assert "".join(c.choices[0].text or "" for c in told) == whole.choices[0].text != ""


def test_errors(options: dict[str, Any]) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**options, messages=[{"role": "user", "content": "word " * 5000}])
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**{**options, "api_key": "wrong"}, messages=QUESTION)
