"""The openai package: chat, streams, tools, structured output, responses, and texts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from support.clients import CAPITAL, CLOUDY, PARAMETERS, PARIS, STORY, SUNNY, TOOL, WEATHER
from support.serving import KEY

QUESTION: list[Any] = [{"role": "user", "content": CAPITAL}]


@pytest.fixture
def client(server: str) -> Iterator[openai.OpenAI]:
    http = httpx.Client(trust_env=False, timeout=120)
    with openai.OpenAI(base_url=f"{server}/v1", api_key=KEY, http_client=http) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "seed": 1, "temperature": 0}
    whole = client.chat.completions.create(**options, top_p=0.9, presence_penalty=0.5)
    assert whole.choices[0].message.content == PARIS
    assert whole.choices[0].finish_reason == "stop"
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = client.chat.completions.create(**options, **streamed)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == PARIS
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.total_tokens == whole.usage.total_tokens


def test_its_own_stream_puts_the_answer_together(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny", messages=QUESTION, seed=1, stream_options={"include_usage": True}
    ) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert final.choices[0].message.content == text == PARIS
    assert final.usage is not None


def test_several_at_once(server: str) -> None:
    async def ask() -> list[str | None]:
        http = httpx.AsyncClient(trust_env=False, timeout=120)
        async with openai.AsyncOpenAI(
            base_url=f"{server}/v1", api_key=KEY, http_client=http
        ) as client:
            create = client.chat.completions.create
            calls = [create(model="tiny", messages=QUESTION, seed=1) for _ in range(4)]
            return [whole.choices[0].message.content for whole in await asyncio.gather(*calls)]

    assert asyncio.run(ask()) == [PARIS] * 4


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_and_its_result_answered(client: openai.OpenAI, stream: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": SUNNY}]
    options: dict[str, Any] = {"model": "tiny", "tools": [TOOL], "seed": 1}
    if stream:
        with client.chat.completions.stream(messages=messages, **options) as told:
            message = told.get_final_completion().choices[0].message
    else:
        message = client.chat.completions.create(messages=messages, **options).choices[0].message
    (call,) = message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": WEATHER}]
    answer = client.chat.completions.create(messages=messages, **options)
    assert answer.choices[0].message.content == CLOUDY


def test_parsed_answers(client: openai.OpenAI) -> None:
    class Degrees(BaseModel):
        warm: bool

    told = client.chat.completions.parse(
        model="tiny", messages=QUESTION, response_format=Degrees, seed=1
    )
    assert isinstance(told.choices[0].message.parsed, Degrees)
    answer = client.responses.parse(
        model="tiny", input=CAPITAL, text_format=Degrees, extra_body={"seed": 1}
    )
    assert isinstance(answer.output_parsed, Degrees)


def test_texts(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": STORY, "seed": 1, "max_tokens": 8}
    whole = client.completions.create(**options)
    chunks = client.completions.create(**options, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text != ""
    several = client.completions.create(**{**options, "prompt": [STORY, STORY]})
    assert [choice.index for choice in several.choices] == [0, 1]


def test_responses_with_a_tool(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "name": "get_weather", "description": "Weather in a city"}
    tools = [{**tool, "parameters": PARAMETERS, "strict": None}]
    options: dict[str, Any] = {"model": "tiny", "tools": tools, "extra_body": {"seed": 1}}
    items: list[Any] = [{"role": "user", "content": SUNNY}]
    with client.responses.stream(input=items, **options) as stream:
        kinds = [event.type for event in stream]
        first = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    (call,) = first.output
    assert call.type == "function_call"
    assert json.loads(call.arguments) == {"city": "Oslo"}
    items += first.output
    items += [{"type": "function_call_output", "call_id": call.call_id, "output": WEATHER}]
    assert client.responses.create(input=items, **options).output_text == CLOUDY


def test_models_and_errors(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("gpt-4o")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=QUESTION, logprobs=True)
    assert refused.value.param == "logprobs"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt="word " * 5000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
