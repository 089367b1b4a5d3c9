"""LlamaIndex's OpenAILike: chat, streams, functions, and texts."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from support.clients import CAPITAL, CLOUDY, PARIS, STORY, SUNNY, WEATHER
from support.serving import KEY

openai_like = pytest.importorskip(
    "llama_index.llms.openai_like", reason="needs the extra `clients`"
)


@pytest.fixture
def options(server: str) -> dict[str, Any]:
    return {
        "model": "tiny",
        "api_base": f"{server}/v1",
        "api_key": KEY,
        "context_window": 2048,
        "temperature": 0,
        "additional_kwargs": {"seed": 1},
        "http_client": httpx.Client(trust_env=False, timeout=120),
        "async_http_client": httpx.AsyncClient(trust_env=False, timeout=120),
    }


@pytest.fixture
def chat(options: dict[str, Any]) -> Any:
    return openai_like.OpenAILike(**options, is_chat_model=True, is_function_calling_model=True)


def test_chat(chat: Any) -> None:
    from llama_index.core.llms import ChatMessage

    assert chat.chat([ChatMessage(role="user", content=CAPITAL)]).message.content == PARIS
    *_, last = chat.stream_chat([ChatMessage(role="user", content=CAPITAL)])
    assert last.message.content == PARIS
    assert chat.complete(CAPITAL).text == PARIS
    assert asyncio.run(chat.acomplete(CAPITAL)).text == PARIS


def test_a_tool_is_called_and_its_result_answered(chat: Any) -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool

    asked: list[str] = []

    def get_weather(city: str) -> str:
        asked.append(city)
        return WEATHER

    tool = FunctionTool.from_defaults(get_weather, description="Weather in a city")
    question = ChatMessage(role="user", content=SUNNY)
    called = chat.chat_with_tools([tool], chat_history=[question])
    (call,) = chat.get_tool_calls_from_response(called)
    assert (call.tool_name, call.tool_kwargs) == ("get_weather", {"city": "Oslo"})
    result = ChatMessage(
        role="tool",
        content=str(tool.call(**call.tool_kwargs)),
        additional_kwargs={"tool_call_id": call.tool_id},
    )
    assert asked == ["Oslo"]
    answer = chat.chat_with_tools([tool], chat_history=[question, called.message, result])
    assert answer.message.content == CLOUDY


def test_texts(options: dict[str, Any]) -> None:
    llm = openai_like.OpenAILike(**options, is_chat_model=False, max_tokens=8)
    text = llm.complete(STORY).text
    *_, last = llm.stream_complete(STORY)
    assert last.text == text != ""
