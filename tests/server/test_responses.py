"""Responses that are kept: conversations that go on from an id, by one owner, within a budget."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from dgemma.server.dialects.response_writer import ResponseWriter
from dgemma.server.dialects.responses import asked
from dgemma.server.store import OwnPast, ResponseStore
from support.clients import CAPITAL, CLOUDY, PARAMETERS, PARIS, SUNNY, WEATHER, events
from support.serving import KEY, keeping_responses, running

OTHER_KEY = "another-key"
GET_WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather in a city",
    "parameters": PARAMETERS,
}
NOWHERE = OwnPast(ResponseStore(0), "")


@pytest.fixture(scope="module")
def server(tiny_gguf: Path) -> Iterator[str]:
    with running(tiny_gguf, "--api-key", KEY, "--api-key", OTHER_KEY) as (address, _):
        yield address


def client_with(server: str, key: str = KEY) -> openai.OpenAI:
    http = httpx.Client(trust_env=False, timeout=120)
    return openai.OpenAI(base_url=f"{server}/v1", api_key=key, max_retries=0, http_client=http)


@pytest.fixture
def client(server: str) -> openai.OpenAI:
    return client_with(server)


def respond(client: openai.OpenAI, given: Any, **options: Any) -> Any:
    return client.responses.create(
        model="tiny", input=given, extra_body={"seed": 1}, tools=[GET_WEATHER], **options
    )


@keeping_responses
def test_a_conversation_goes_on_from_its_id(client: openai.OpenAI) -> None:
    first = respond(client, SUNNY)
    (call,) = first.output
    assert (first.store, call.type, call.name) == (True, "function_call", "get_weather")
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": WEATHER}
    second = respond(client, [result], previous_response_id=first.id)
    assert second.output_text == CLOUDY
    assert second.previous_response_id == first.id
    # The same as where the whole conversation is sent.
    sent = [{"type": "message", "role": "user", "content": SUNNY}, call.model_dump(), result]
    assert respond(client, sent, store=False).usage.input_tokens == second.usage.input_tokens
    third = respond(
        client, "Say the same again, in capital letters.", previous_response_id=second.id
    )
    assert third.usage.input_tokens > second.usage.input_tokens


@keeping_responses
def test_instructions_are_those_of_the_newest_request_alone(client: openai.OpenAI) -> None:
    first = client.responses.create(model="tiny", input=CAPITAL, instructions="Be brief. " * 20)
    with_them = client.responses.input_tokens.count(
        model="tiny", input=CAPITAL, previous_response_id=first.id
    )
    again = client.responses.create(model="tiny", input=CAPITAL, previous_response_id=first.id)
    assert with_them.input_tokens == again.usage.input_tokens
    assert again.usage.input_tokens < first.usage.input_tokens + 20


@keeping_responses
def test_a_stream_can_be_gone_on_from_when_it_has_ended(http: httpx.Client) -> None:
    body = {"input": CAPITAL, "stream": True, "seed": 1}
    last = events(http.post("/v1/responses", json=body))[-1]["response"]
    assert last["store"] is True
    kept = http.get(f"/v1/responses/{last['id']}").json()
    assert kept == last
    assert kept["output"][0]["content"][0]["text"] == PARIS
    body = {"input": "And?", "previous_response_id": last["id"], "max_output_tokens": 4}
    assert http.post("/v1/responses", json=body).status_code == 200


@keeping_responses
def test_it_can_be_fetched_listed_and_forgotten(client: openai.OpenAI) -> None:
    made = client.responses.create(model="tiny", input=CAPITAL, metadata={"a": "b"})
    kept = client.responses.retrieve(made.id)
    assert kept.model_dump() == made.model_dump()
    assert kept.metadata == {"a": "b"}
    (item,) = client.responses.input_items.list(made.id)
    assert item.content[0].text == CAPITAL
    assert item.id.startswith("msg_")
    assert client.responses.cancel(made.id).status == "completed"
    client.responses.delete(made.id)
    for again in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError) as told:
            again(made.id)
        assert told.value.code == "response_not_found"


@keeping_responses
def test_items_are_listed_in_pages(client: openai.OpenAI) -> None:
    items: Any = [{"role": "user", "content": f"Say {i}."} for i in range(5)]
    made = client.responses.create(model="tiny", input=items, max_output_tokens=4)
    page = client.responses.input_items.list(made.id, limit=2)
    assert [item.content[0].text for item in page.data] == ["Say 4.", "Say 3."]
    assert page.has_more
    assert [item.content[0].text for item in page] == [f"Say {i}." for i in (4, 3, 2, 1, 0)]
    with pytest.raises(openai.BadRequestError, match="limit"):
        client.responses.input_items.list(made.id, limit=1000)


@keeping_responses
def test_items_may_be_named_by_their_id_alone(client: openai.OpenAI) -> None:
    first = respond(client, SUNNY)
    given = [
        {"role": "user", "content": SUNNY},
        {"type": "item_reference", "id": first.output[0].id},
        {"type": "function_call_output", "call_id": first.output[0].call_id, "output": WEATHER},
    ]
    assert respond(client, given, store=False).output_text == CLOUDY
    assert respond(client, [given[0], {"id": first.output[0].id}, given[2]]).output_text == CLOUDY


def test_what_is_not_to_be_stored_is_not(client: openai.OpenAI) -> None:
    made = client.responses.create(model="tiny", input=CAPITAL, store=False)
    assert made.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    with pytest.raises(openai.BadRequestError) as told:
        client.responses.create(model="tiny", input="And?", previous_response_id=made.id)
    assert (told.value.code, told.value.param) == (
        "previous_response_not_found",
        "previous_response_id",
    )


@keeping_responses
def test_nobody_sees_what_was_asked_with_another_key(server: str, client: openai.OpenAI) -> None:
    made = respond(client, SUNNY)
    other = client_with(server, OTHER_KEY)
    with pytest.raises(openai.NotFoundError):
        other.responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        other.responses.delete(made.id)
    with pytest.raises(openai.BadRequestError):
        respond(other, "And?", previous_response_id=made.id)
    with pytest.raises(openai.BadRequestError):
        respond(other, [{"type": "item_reference", "id": made.output[0].id}])
    assert client.responses.retrieve(made.id).id == made.id


def test_items_that_mean_nothing_here_are_named(http: httpx.Client) -> None:
    given = [
        {"type": "compaction", "id": "cmp_1", "encrypted_content": "gAAA"},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {}},
        {"type": "message", "role": "user", "content": CAPITAL},
    ]
    answer = http.post("/v1/responses", json={"input": given, "seed": 1})
    assert answer.json()["warnings"] == [
        "input[0] is an item of type 'compaction' and was left out",
        "input[2] is an item of type 'web_search_call' and was left out",
    ]
    assert "compaction" in answer.headers["x-dgemma-warnings"]


def test_functions_in_a_namespace_are_called_by_both_names() -> None:
    inner = [{"type": "function", "name": "close", "parameters": PARAMETERS}]
    tools = [{"type": "namespace", "name": "agents", "tools": inner}, GET_WEATHER]
    found = asked({"input": "x", "tools": tools}, NOWHERE)
    assert [tool["name"] for tool in found.fields["tools"]] == ["agents.close", "get_weather"]
    writer = ResponseWriter({}, "tiny", found.called, stored=False)
    function = {"name": "agents.close", "arguments": "{}"}
    call = {"index": 0, "id": "call_1", "type": "function", "function": function}
    told = list(writer.feed({"tool_calls": [call]}))
    (item,) = writer.response["output"]
    assert (item["name"], item["namespace"]) == ("close", "agents")
    assert [e["name"] for e in told if e["type"].endswith("arguments.done")] == ["close"]
    again = asked({"input": [item]}, NOWHERE).fields["messages"][0]["tool_calls"][0]
    assert again["function"] == function


def test_calls_of_tools_of_all_kinds_are_history() -> None:
    items = [
        {"type": "local_shell_call", "call_id": "a", "action": {"command": ["ls"]}},
        {"type": "local_shell_call_output", "call_id": "a", "output": "a.py"},
        {"type": "apply_patch_call", "call_id": "b", "operation": {"type": "delete_file"}},
        {"type": "apply_patch_call_output", "call_id": "b", "output": "done"},
        {"type": "mcp_call", "id": "c", "name": "look", "arguments": "{}", "output": "seen"},
    ]
    found = asked({"input": items}, NOWHERE)
    assert found.notes == ()
    told = [
        (m["tool_calls"][0]["function"]["name"] if m["role"] == "assistant" else m["content"])
        for m in found.fields["messages"]
    ]
    assert told == ["local_shell", "a.py", "apply_patch", "done", "look", "seen"]


# ---- The store -----------------------------------------------------------------------------------


def response(id: str, text: str = "") -> dict[str, Any]:
    return {"id": id, "output": [{"id": f"msg_{id}", "text": text}]}


def test_the_longest_unused_goes_first_and_a_conversation_from_its_end() -> None:
    store = ResponseStore(100_000)
    text = "x" * 20_000
    store.add("", response("a1", text), [], None)
    store.add("", response("a2", text), [], "a1")
    store.add("", response("b1", text), [], None)
    store.add("", response("a3", text), [], "a2")  # uses a2 and a1
    store.add("", response("c1", text), [], None)
    assert store.get("", "b1") is None
    assert store.conversation("", "a3") is not None
    store.add("", response("c2", text), [], "c1")
    assert store.get("", "a3") is None
    assert store.conversation("", "a2") is not None
    assert store.item("", "msg_a3") is None
    assert store.n_bytes <= 100_000


def test_what_is_larger_than_the_budget_is_not_kept() -> None:
    store = ResponseStore(10_000)
    store.add("", response("a", "x" * 20_000), [], None)
    assert (len(store), store.n_bytes) == (0, 0)


def test_a_conversation_whose_beginning_was_forgotten_is_gone() -> None:
    store = ResponseStore(100_000)
    store.add("", response("a1"), [], None)
    store.add("", response("a2"), [], "a1")
    assert [item["id"] for item in store.conversation("", "a2") or []] == ["msg_a1", "msg_a2"]
    assert store.delete("", "a1")
    assert store.conversation("", "a2") is None
    assert store.n_bytes > 0
    assert store.delete("", "a2")
    assert store.n_bytes == 0
