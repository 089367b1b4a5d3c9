"""LangChain's ChatOpenAI and OpenAI; those for llama.cpp are in tests/python/test_llama.py."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from support.clients import CAPITAL, CLOUDY, PARIS, STORY, SUNNY, WEATHER
from support.serving import KEY

langchain_openai = pytest.importorskip("langchain_openai", reason="needs the extra `clients`")


def options(server: str) -> dict[str, Any]:
    return {
        "model": "tiny",
        "base_url": f"{server}/v1",
        "api_key": KEY,
        "http_client": httpx.Client(trust_env=False, timeout=120),
        "http_async_client": httpx.AsyncClient(trust_env=False, timeout=120),
        "seed": 1,
    }


@pytest.fixture
def chat(server: str) -> Any:
    return langchain_openai.ChatOpenAI(**options(server), temperature=0)


def test_chat(chat: Any) -> None:
    answer = chat.invoke(CAPITAL)
    assert answer.content == PARIS
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata["output_tokens"] > 0
    whole = None
    for chunk in chat.stream(CAPITAL, stream_usage=True):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    assert whole.content == PARIS
    assert whole.usage_metadata["total_tokens"] == answer.usage_metadata["total_tokens"]


def test_batches_and_coroutines(chat: Any) -> None:
    asked = [[("user", CAPITAL)], [("system", ""), ("user", CAPITAL)]]
    assert [answer.content for answer in chat.batch(asked[:1] * 3)] == [PARIS] * 3
    assert asyncio.run(chat.ainvoke(asked[1])).content == PARIS


def test_a_tool_is_called_and_its_result_answered(chat: Any) -> None:
    from langchain_core.messages import HumanMessage
    from langchain_core.tools import tool

    @tool
    def get_weather(city: str) -> str:
        """Weather in a city"""
        asked.append(city)
        return WEATHER

    asked: list[str] = []
    bound = chat.bind_tools([get_weather])
    messages: list[Any] = [HumanMessage(SUNNY)]
    message = bound.invoke(messages)
    (call,) = message.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Oslo"})
    messages += [message, get_weather.invoke(call)]
    assert asked == ["Oslo"]
    assert bound.invoke(messages).content == CLOUDY


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat: Any, method: str) -> None:
    class Degrees(BaseModel):
        """How warm it is."""

        warm: bool

    answer = chat.with_structured_output(Degrees, method=method).invoke(CAPITAL)
    assert isinstance(answer, Degrees)


def test_through_the_responses_api(server: str) -> None:
    given = {**options(server), "seed": None, "extra_body": {"seed": 1}}
    chat = langchain_openai.ChatOpenAI(**given, use_responses_api=True)
    assert chat.invoke(CAPITAL).text == PARIS
    assert "".join(chunk.text for chunk in chat.stream(CAPITAL)) == PARIS


def test_texts(server: str) -> None:
    llm = langchain_openai.OpenAI(**options(server), max_tokens=8, temperature=0)
    text = llm.invoke(STORY)
    assert "".join(llm.stream(STORY)) == text != ""
    assert llm.batch([STORY, STORY]) == [text, text]
