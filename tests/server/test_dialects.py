"""The other APIs over one model: OpenAI's responses, Anthropic's messages, llama.cpp's own."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from dgemma.server.dialects.messages import chat_fields as messages_fields
from dgemma.server.dialects.response_writer import ResponseWriter
from dgemma.server.dialects.responses import asked
from dgemma.server.store import OwnPast, ResponseStore
from support.serving import KEY, QUESTION, ask

SUNNY = "Is it sunny in Oslo?"
CLOUDY = '{"sky": "cloudy", "degrees": 12}'
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "Name of the city"}},
    "required": ["city"],
}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, each under its own name; comments are left out."""
    assert response.status_code == 200, response.text
    found = []
    for block in response.text.split("\n\n"):
        lines = [line for line in block.split("\n") if not line.startswith(":")]
        if lines and lines != [""]:
            name, data = lines
            value = json.loads(data.removeprefix("data: "))
            assert name == f"event: {value['type']}"
            found.append(value)
    return found


# ---- Responses -----------------------------------------------------------------------------------


@pytest.fixture
def client(server: str) -> openai.OpenAI:
    http = httpx.Client(trust_env=False, timeout=120)
    return openai.OpenAI(base_url=f"{server}/v1", api_key=KEY, max_retries=0, http_client=http)


def test_responses_with_the_public_client(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "input": "What is the capital of France?"}
    options["extra_body"] = {"seed": 1}
    whole = client.responses.create(**options, instructions="Be brief.")
    assert "Paris" in whole.output_text
    assert whole.status == "completed"
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    with client.responses.stream(**options, instructions="Be brief.") as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == whole.output_text
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"


CODEX: dict[str, Any] = {
    "model": "gpt-x",
    "instructions": "You are a coding agent.",
    "input": [
        {"type": "message", "role": "developer", "content": [
            {"type": "input_text", "text": "<permissions>none</permissions>"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": SUNNY}]},
    ],
    "tools": [
        {"type": "function", "name": "get_weather", "description": "Weather in a city",
         "strict": False, "parameters": PARAMETERS},
        {"type": "web_search", "external_web_access": False},
        {"type": "custom", "name": "apply_patch", "description": "Edits files",
         "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": None,
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0199-abc",
    "text": {"verbosity": "medium"},
    "seed": 1,
}  # fmt: skip


def test_what_codex_sends(http: httpx.Client) -> None:
    # The whole request: models/tiny was not taught what such an agent is told.
    told = events(http.post("/v1/responses", json=CODEX))
    assert told[-1]["type"] in ("response.completed", "response.incomplete")
    warnings = told[-1]["response"]["warnings"]
    assert [w.partition(":")[0] for w in warnings] == ["tools[1] is a tool of type 'web_search'"]
    # Without what it does not know, it calls and answers.
    short = {**CODEX, "instructions": None, "input": CODEX["input"][1:]}
    short["tools"] = CODEX["tools"][:1]
    first = events(http.post("/v1/responses", json=short))
    assert [event["sequence_number"] for event in first] == list(range(len(first)))
    last = first[-1]["response"]
    (call,) = (item for item in last["output"] if item["type"] == "function_call")
    assert call["name"] == "get_weather"
    assert json.loads(call["arguments"]) == {"city": "Oslo"}
    assert {**call} in [e["item"] for e in first if e["type"] == "response.output_item.done"]
    done = next(e for e in first if e["type"] == "response.function_call_arguments.done")
    assert done["arguments"] == call["arguments"]
    assert done["item_id"] == call["id"]
    output = {"type": "function_call_output", "call_id": call["call_id"],
              "output": [{"type": "input_text", "text": CLOUDY}]}  # fmt: skip
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA"}
    body = {**short, "input": [*short["input"], thought, call, output]}
    second = events(http.post("/v1/responses", json=body))
    texts = [e["delta"] for e in second if e["type"] == "response.output_text.delta"]
    assert "cloudy in Oslo" in "".join(texts)
    (item,) = second[-1]["response"]["output"]
    assert item["content"][0]["text"] == "".join(texts)


def test_a_free_form_tool_takes_text() -> None:
    patch = "*** Begin Patch\n+ é\n"
    past = OwnPast(ResponseStore(0), "")
    found = asked({**CODEX, "tools": CODEX["tools"][2:]}, past)
    (tool,) = found.fields["tools"]
    assert tool["function"]["parameters"]["required"] == ["input"]
    writer = ResponseWriter(CODEX, "tiny", found.called, stored=False)
    function = {"name": "apply_patch", "arguments": json.dumps({"input": patch})}
    call = {"index": 0, "id": "call_1", "type": "function", "function": function}
    told = [*writer.begin(), *writer.feed({"tool_calls": [call]})]
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    told += writer.finish("tool_calls", usage)
    (item,) = writer.response["output"]
    assert (item["type"], item["name"], item["input"]) == (
        "custom_tool_call", "apply_patch", patch
    )  # fmt: skip
    kinds = [event["type"] for event in told]
    assert "response.custom_tool_call_input.done" in kinds
    again = asked({**CODEX, "input": [item]}, past)
    sent = again.fields["messages"][-1]["tool_calls"][0]["function"]
    assert json.loads(sent["arguments"]) == {"input": patch}


def test_an_answer_cut_short_is_incomplete(http: httpx.Client) -> None:
    body = {"input": "Count from 3 to 40.", "max_output_tokens": 4, "seed": 1}
    whole = http.post("/v1/responses", json=body).json()
    assert whole["status"] == "incomplete"
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
    streamed = events(http.post("/v1/responses", json={**body, "stream": True}))
    assert streamed[-1]["type"] == "response.incomplete"
    texts = [e["delta"] for e in streamed if e["type"] == "response.output_text.delta"]
    assert "".join(texts) == whole["output"][0]["content"][0]["text"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": [5]}, "input[0]"),
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "x", "tools": [{"type": "function"}]}, "tools[0].function.name"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"input": "x", "max_output_tokens": -3}, "max_tokens"),
    ],
    ids=str,
)
def test_wrong_responses_requests(http: httpx.Client, body: Any, param: str) -> None:
    answer = http.post("/v1/responses", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_json_by_a_schema_in_responses(http: httpx.Client) -> None:
    schema = {"enum": ["Paris", "Rome"]}
    form = {"type": "json_schema", "name": "city", "schema": schema, "strict": True}
    body = {"input": "What is the capital of France?", "text": {"format": form}, "seed": 1}
    answer = http.post("/v1/responses", json=body).json()
    assert json.loads(answer["output"][0]["content"][0]["text"]) in schema["enum"]


# ---- Messages ------------------------------------------------------------------------------------

CLAUDE: dict[str, Any] = {
    "model": "claude-x",
    "max_tokens": 200,
    "stream": True,
    "system": [
        {"type": "text", "text": "You are a helpful agent."},
        {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
    ],
    "messages": [
        {"role": "user", "content": [
            {"type": "text", "text": SUNNY, "cache_control": {"type": "ephemeral"}}]},
    ],
    "tools": [
        {"name": "get_weather", "description": "Weather in a city", "input_schema": PARAMETERS},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
    ],
    "metadata": {"user_id": "user_1_account__session_2"},
    "thinking": {"type": "disabled"},
    "context_management": {"edits": []},
    "seed": 1,
}  # fmt: skip
HEADERS = {"anthropic-version": "2023-06-01", "anthropic-beta": "interleaved-thinking-2025-05-14"}


def test_a_line_for_who_sends_the_bill_is_not_the_models() -> None:
    """It changes from one request to the next, and would keep all behind it from being cached."""
    block = {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=0a1b2;"}
    system = [block, {"type": "text", "text": "Be brief."}]
    told = messages_fields({"messages": QUESTION, "system": system})["messages"]
    assert told == [{"role": "system", "content": "Be brief."}, *QUESTION]
    assert messages_fields({"messages": QUESTION, "system": [block]})["messages"] == QUESTION


def test_what_claude_code_sends(http: httpx.Client) -> None:
    first = events(http.post("/v1/messages?beta=true", json=CLAUDE, headers=HEADERS))
    kinds = [e["type"] for e in first if e["type"] != "ping"]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    start = next(e for e in first if e["type"] == "content_block_start")
    assert start["content_block"]["type"] == "tool_use"
    assert start["content_block"]["input"] == {}
    (part,) = (e["delta"]["partial_json"] for e in first if e["type"] == "content_block_delta")
    assert json.loads(part) == {"city": "Oslo"}
    ended = next(e for e in first if e["type"] == "message_delta")
    assert ended["delta"]["stop_reason"] == "tool_use"
    assert ended["usage"]["output_tokens"] > 0
    used = {**start["content_block"], "input": json.loads(part)}
    result = {"type": "tool_result", "tool_use_id": used["id"],
              "content": [{"type": "text", "text": CLOUDY}]}  # fmt: skip
    thought = {"type": "thinking", "thinking": "hm", "signature": "dgemma"}
    messages = [
        *CLAUDE["messages"],
        {"role": "assistant", "content": [thought, used]},
        {"role": "user", "content": [result]},
    ]
    body = {**CLAUDE, "messages": messages}
    second = events(http.post("/v1/messages", json=body, headers=HEADERS))
    deltas = [e["delta"] for e in second if e["type"] == "content_block_delta"]
    text = "".join(delta["text"] for delta in deltas)
    assert "cloudy in Oslo" in text
    whole = http.post("/v1/messages", json={**body, "stream": False}).json()
    assert whole["content"] == [{"type": "text", "text": text}]
    assert whole["stop_reason"] == "end_turn"
    counted = http.post("/v1/messages/count_tokens", json=body).json()
    usage = whole["usage"]
    assert counted["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]


def test_the_key_as_anthropic_sends_it(server: str) -> None:
    body = {"model": "x", "max_tokens": 2, "messages": QUESTION}
    url = f"{server}/v1/messages"
    with httpx.Client(trust_env=False, timeout=60) as plain:
        assert plain.post(url, json=body, headers={"x-api-key": KEY}).status_code == 200
        assert plain.post(url, json=body, headers={"x-api-key": "no"}).status_code == 401


def test_wrong_messages_requests_have_anthropics_form(http: httpx.Client) -> None:
    answer = http.post("/v1/messages", json={"max_tokens": 5})
    assert answer.status_code == 400
    body = answer.json()
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["param"] == "messages"


def test_a_thread_is_not_continued_without_its_beginning(http: httpx.Client) -> None:
    body = {"max_tokens": 5, "messages": QUESTION}
    begun = http.post("/v1/messages", json={**body, "thread": {"type": "create"}})
    assert begun.status_code == 200
    assert [warning.partition(" ")[0].strip(":") for warning in begun.json()["warnings"]] == [
        "thread"
    ]
    thread = {"type": "continue", "previous_message_id": begun.json()["id"]}
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        answer = http.post(path, json={**body, "thread": thread})
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert error["type"] == "not_found_error"
        assert error["param"] == "thread"
        # At this the anthropic package sends the whole conversation.
        assert error["details"] == {"error_code": "thread_not_found"}


def test_tools_of_other_servers_are_named(http: httpx.Client) -> None:
    elsewhere = [{"type": "url", "url": "https://tools.invalid", "name": "t"}]
    body = {"max_tokens": 5, "messages": QUESTION, "mcp_servers": elsewhere}
    answer = http.post("/v1/messages", json=body)
    assert answer.status_code == 200
    (warning,) = answer.json()["warnings"]
    assert warning.startswith("mcp_servers")


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_tool_that_must_be_used(http: httpx.Client, choice: Any) -> None:
    body = {**CLAUDE, "stream": False, "tool_choice": choice}
    answer = http.post("/v1/messages", json=body).json()
    assert [block["type"] for block in answer["content"]] == ["tool_use"]


# ---- llama.cpp -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_completion(http: httpx.Client, stream: bool) -> None:
    body = {"prompt": "The old man", "n_predict": 8, "seed": 1, "cache_prompt": True, "top_k": 40}
    answer = http.post("/completion", json={**body, "stream": stream})
    alike = {"prompt": "The old man", "max_tokens": 8, "seed": 1}
    wanted = http.post("/v1/completions", json=alike).json()
    if stream:
        told = [json.loads(e[6:]) for e in answer.text.split("\n\n") if e.startswith("data: ")]
        assert [e["stop"] for e in told] == [False] * (len(told) - 1) + [True]
        assert "[DONE]" not in answer.text
        text, last = "".join(e["content"] for e in told), told[-1]
    else:
        last = answer.json()
        text = last["content"]
    assert text == wanted["choices"][0]["text"]
    cut = wanted["choices"][0]["finish_reason"] == "length"
    assert last["stop_type"] == ("limit" if cut else "eos")
    assert last["tokens_predicted"] == wanted["usage"]["completion_tokens"] <= 8
    assert last["tokens_evaluated"] == wanted["usage"]["prompt_tokens"]


def test_infill(http: httpx.Client) -> None:
    body = {"input_prefix": "The old man ", "input_suffix": " by the sea.", "n_predict": 6}
    answer = http.post("/infill", json={**body, "seed": 1}).json()
    assert 1 <= answer["tokens_predicted"] <= 6
    assert not answer["content"].endswith(" by the sea.")
    alike = {"prompt": "The old man ", "suffix": " by the sea.", "max_tokens": 6, "seed": 1}
    wanted = http.post("/v1/completions", json=alike).json()
    assert answer["content"] == wanted["choices"][0]["text"]


def test_tokenize_has_a_limit_of_its_own(http: httpx.Client) -> None:
    refused = http.post("/tokenize", json={"content": "a" * (2**18 + 1)})
    assert refused.status_code == 413
    assert refused.json()["error"]["param"] == "content"
    pieces = http.post("/tokenize", json={"content": "é🦙", "with_pieces": True}).json()["tokens"]
    data = b"".join(
        p["piece"].encode() if isinstance(p["piece"], str) else bytes(p["piece"]) for p in pieces
    )
    assert data.decode() == "é🦙"


def test_slots_and_props(http: httpx.Client) -> None:
    assert ask(http, max_tokens=1).status_code == 200
    slots = http.get("/slots").json()
    assert max(slot["n_past"] for slot in slots) > 0
    assert {slot["n_ctx"] for slot in slots} == {512}
    props = http.get("/props").json()
    assert props["default_generation_settings"]["n_ctx"] == 512
    assert len(slots) <= props["total_slots"]


def test_no_embeddings(http: httpx.Client) -> None:
    answer = http.post("/v1/embeddings", json={"input": "x"})
    assert answer.status_code == 501
    assert "embeddings" in answer.json()["error"]["message"]
