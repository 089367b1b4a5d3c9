"""The anthropic package: messages plain and streamed, tools, thinking, and counted tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from support.clients import CAPITAL, CLOUDY, PARAMETERS, PARIS, SUNNY, WEATHER
from support.serving import KEY

anthropic = pytest.importorskip("anthropic", reason="needs the extra `clients`")

OPTIONS: dict[str, Any] = {
    "model": "claude-sonnet-4-5",
    "max_tokens": 200,
    "extra_body": {"seed": 1},
}
QUESTION = [{"role": "user", "content": CAPITAL}]
WEATHER_TOOL = {
    "name": "get_weather",
    "description": "Weather in a city",
    "input_schema": PARAMETERS,
}


@pytest.fixture
def client(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("NO_PROXY", "*")
    with anthropic.Anthropic(base_url=server, api_key=KEY, timeout=120) as client:
        yield client


def test_a_message(client: Any) -> None:
    message = client.messages.create(**OPTIONS, messages=QUESTION)
    (block,) = message.content
    assert (block.type, block.text) == ("text", PARIS)
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens > 0
    counted = client.messages.count_tokens(model="claude-sonnet-4-5", messages=QUESTION)
    usage = message.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_a_streamed_message(client: Any) -> None:
    with client.messages.stream(**OPTIONS, messages=QUESTION) as stream:
        assert "".join(stream.text_stream) == PARIS
        final = stream.get_final_message()
    assert [block.text for block in final.content] == [PARIS]
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens > 0
    told = client.messages.create(**OPTIONS, messages=QUESTION, stream=True)
    assert [event.type for event in told if event.type != "content_block_delta"] == [
        "message_start",
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_and_its_result_answered(client: Any, stream: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": SUNNY}]
    options = {**OPTIONS, "tools": [WEATHER_TOOL], "tool_choice": {"type": "auto"}}
    if stream:
        with client.messages.stream(**options, messages=messages) as told:
            message = told.get_final_message()
    else:
        message = client.messages.create(**options, messages=messages)
    assert message.stop_reason == "tool_use"
    (used,) = message.content
    assert (used.type, used.name, used.input) == ("tool_use", "get_weather", {"city": "Oslo"})
    result = {"type": "tool_result", "tool_use_id": used.id, "content": WEATHER}
    messages += [{"role": "assistant", "content": message.content}]
    messages += [{"role": "user", "content": [result]}]
    answer = client.messages.create(**options, messages=messages)
    assert [block.text for block in answer.content] == [CLOUDY]


def test_its_tool_runner(client: Any) -> None:
    """It sends only what is new, until it is told that answers are not kept here."""

    @anthropic.beta_tool(**WEATHER_TOOL)
    def get_weather(city: str) -> str:
        asked.append(city)
        return WEATHER

    asked: list[str] = []
    runner = client.beta.messages.tool_runner(
        **OPTIONS, tools=[get_weather], messages=[{"role": "user", "content": SUNNY}]
    )
    last = runner.until_done()
    assert asked == ["Oslo"]
    assert last.content[-1].text == CLOUDY


def test_its_threads(client: Any) -> None:
    thread = client.beta.messages.thread(**OPTIONS)
    assert thread.send({"role": "user", "content": CAPITAL}).content[0].text == PARIS
    answer = thread.send({"role": "user", "content": "Name the opposite of loud."})
    assert answer.content[0].text == "The opposite of loud is quiet."


def test_thinking(client: Any) -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    options = {**OPTIONS, "max_tokens": 2048, "thinking": thinking}
    with client.messages.stream(**options, messages=QUESTION) as stream:
        final = stream.get_final_message()
    thought, text = final.content
    assert thought.thinking
    assert thought.signature
    assert text.text == PARIS


def test_errors(client: Any) -> None:
    with pytest.raises(anthropic.BadRequestError) as refused:
        client.messages.create(**OPTIONS, messages=[{"role": "user", "content": "word " * 5000}])
    assert refused.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="wrong").messages.create(**OPTIONS, messages=QUESTION)
