"""The HTTP server as a program on loopback: the API, the public client, requests that are wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from support.serving import KEY, QUESTION, ask, counted, running


@pytest.fixture
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{server}/v1",
        api_key=KEY,
        max_retries=0,
        http_client=httpx.Client(trust_env=False, timeout=120),
    )


# ---- The public client ---------------------------------------------------------------------------


def test_chat(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=QUESTION, seed=1)  # type: ignore[arg-type]
    assert "Paris" in (whole.choices[0].message.content or "")
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.completion_tokens > 0
    stream = client.chat.completions.create(
        model="tiny",
        messages=QUESTION,  # type: ignore[arg-type]
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_completion(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt="The old man", seed=1, max_tokens=8)
    stream = client.completions.create(
        model="tiny", prompt="The old man", seed=1, max_tokens=8, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 8


CITY = {"type": "string", "description": "Name of the city"}
PARAMETERS = {"type": "object", "properties": {"city": CITY}, "required": ["city"]}
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "description": f"{what} in a city", "parameters": PARAMETERS},
    }
    for name, what in (("get_weather", "Weather"), ("get_time", "Time"))
]
SUNNY = {"role": "user", "content": "Is it sunny in Oslo?"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_and_its_response_answered(client: openai.OpenAI, stream: bool) -> None:
    options: dict[str, Any] = {"model": "tiny", "seed": 1, "tools": TOOLS}
    if stream:
        chunks = list(client.chat.completions.create(messages=[SUNNY], stream=True, **options))
        assert all(not chunk.choices[0].delta.content for chunk in chunks)
        (call,) = (c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or [])
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
    else:
        whole = client.chat.completions.create(messages=[SUNNY], **options)
        assert whole.choices[0].finish_reason == "tool_calls"
        (call,) = whole.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    function = {"name": call.function.name, "arguments": call.function.arguments}
    messages: list[Any] = [
        SUNNY,
        {
            "role": "assistant",
            "tool_calls": [{"id": call.id, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": call.id, "content": '{"sky": "cloudy", "degrees": 12}'},
    ]
    answer = client.chat.completions.create(messages=messages, **options)
    assert "cloudy in Oslo" in answer.choices[0].message.content


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("none", set()),
        ("auto", {"get_weather"}),
        ("required", {"get_weather"}),
        ({"type": "function", "function": {"name": "get_time"}}, {"get_time"}),
    ],
    ids=["none", "auto", "required", "named"],
)
def test_tool_choice(client: openai.OpenAI, choice: Any, names: set[str]) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=[SUNNY], seed=1, max_tokens=64, tools=TOOLS, tool_choice=choice
    )  # type: ignore[call-overload]
    message = answer.choices[0].message
    assert {call.function.name for call in message.tool_calls or []} == names


def test_a_tool_choice_without_its_tool(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="none of the tools"):
        client.chat.completions.create(
            model="tiny",
            messages=[SUNNY],
            tools=TOOLS,
            tool_choice={"type": "function", "function": {"name": "get_rich"}},
        )  # type: ignore[call-overload]


@pytest.mark.parametrize("stream", [False, True])
def test_answers_by_a_schema(client: openai.OpenAI, stream: bool) -> None:
    schema = {"enum": ["Paris", "Rome"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    answer = client.chat.completions.create(
        model="tiny", messages=QUESTION, seed=1, response_format=wanted, stream=stream
    )  # type: ignore[call-overload]
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    else:
        text = answer.choices[0].message.content
    assert json.loads(text) in schema["enum"]
    with pytest.raises(openai.BadRequestError, match="xml"):
        client.chat.completions.create(
            model="tiny", messages=QUESTION, response_format={"type": "xml"}
        )  # type: ignore[call-overload]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_errors_reach_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="logprobs"):
        client.chat.completions.create(model="tiny", messages=QUESTION, logprobs=True)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="context") as problem:
        client.completions.create(model="tiny", prompt="word " * 1000)
    assert problem.value.type == "exceed_context_size_error"


# ---- Other endpoints -----------------------------------------------------------------------------


def test_tokens_and_templates(http: httpx.Client) -> None:
    tokens = http.post("/tokenize", json={"content": "<|turn>hello 🦙"}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": tokens}).json() == {
        "content": "<|turn>hello 🦙"
    }
    prompt = http.post("/apply-template", json={"messages": QUESTION}).json()["prompt"]
    assert "<|turn>user\nWhat is the capital of France?<turn|>" in prompt
    props = http.get("/props").json()
    assert props["n_ctx"] == 512
    assert props["sampling"]["max_denoising_steps"] >= 1


def test_options_of_the_command_hold_where_a_request_is_silent(tiny_gguf: Path) -> None:
    options = ("--seed", 7, "--max-denoising-steps", 3, "--confidence-threshold", 1e-30)
    with (
        running(tiny_gguf, *options) as (address, _),
        httpx.Client(base_url=address, timeout=120, trust_env=False) as http,
    ):
        assert http.get("/props").json()["sampling"]["max_denoising_steps"] == 3
        texts, steps = [], [0]
        for changes in ({}, {"seed": 7}, {"max_denoising_steps": 2}):
            body = {"prompt": "Once there was a", "max_tokens": 8, **changes}
            texts.append(http.post("/v1/completions", json=body).json()["choices"][0]["text"])
            steps.append(counted(http, "denoising_steps"))
        assert texts[0] == texts[1]
        assert np.diff(steps).tolist() == [3, 3, 2]


def test_metrics_count(http: httpx.Client) -> None:
    before = counted(http, "requests")
    assert ask(http, max_tokens=1).status_code == 200
    assert counted(http, "requests") == before + 1


def test_the_page_uses_nothing_from_outside(http: httpx.Client) -> None:
    page = http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page.text)


def test_drafts_are_asked_for(http: httpx.Client) -> None:
    plain = ask(http, stream=True).text
    assert "event:" not in plain
    events = ask(http, stream=True, drafts=True).text.split("\n\n")
    drafts = [e.split("data: ", 1)[1] for e in events if e.startswith("event: draft\n")]
    assert drafts
    for line in drafts:
        draft = json.loads(line)
        assert len(draft["tokens"]) == len(draft["pieces"]) == len(draft["entropies"])
    rest = [e for e in events if not e.startswith("event:")]
    assert [e.split(":")[0] for e in rest if e] == ["data"] * (len(rest) - 1)
    assert rest[-2] == "data: [DONE]"

    def content(lines: list[str]) -> str:
        chunks = [json.loads(e[6:]) for e in lines if e.startswith("data: {")]
        return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)

    assert content(rest) == content(plain.split("\n\n"))


# ---- Who may ask ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/v1/models", "/props", "/metrics", "/nowhere"])
def test_the_key_protects_everything(server: str, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic !"}):
        response = httpx.get(server + path, headers=headers, trust_env=False)
        assert response.status_code == 401
    assert httpx.get(server + "/health", trust_env=False).json() == {"status": "ok"}


def test_a_browser_may_send_the_key_as_a_password(server: str) -> None:
    assert httpx.get(server, auth=("", KEY), trust_env=False).status_code == 200


def test_foreign_names_and_origins(http: httpx.Client) -> None:
    assert http.get("/v1/models", headers={"Host": "attacker.example"}).status_code == 403
    response = http.get("/v1/models", headers={"Origin": "https://attacker.example"})
    assert "access-control-allow-origin" not in response.headers


# ---- Requests that are wrong ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "JSON"),
        (b"{", 400, "JSON"),
        (b"\xff\xfe", 400, "UTF-8"),
        (b'{"messages": NaN}', 400, "NaN"),
        (b'{"messages": [], "seed": 1e999}', 400, "large"),
        (b"[" * 100_000, 400, "JSON|nested"),
        (b"{}", 400, "messages"),
        (b'{"messages": []}', 400, "messages"),
        (b'{"messages": "hi"}', 400, "messages"),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', 400, "robot"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "surrogate"),
        (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 2.5}', 400, "max_tokens"),
        (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": -5}', 400, "max_tokens"),
        (b'{"messages": [{"role": "user", "content": "x"}], "seed": "x"}', 400, "seed"),
        (b'{"messages": [{"role": "user", "content": "x"}], "logprobs": true}', 400, "logprobs"),
        (b'{"messages": [{"role": "user", "content": "x"}], "t_min": 0}', 400, "t_min"),
        (b'"' + b"x" * (9 * 2**20) + b'"', 413, "larger"),
    ],
    ids=range(17),
)
def test_bad_bodies(http: httpx.Client, body: bytes, status: int, message: str) -> None:
    headers = {"Content-Type": "application/json"}
    response = http.post("/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == status
    assert re.search(message, response.json()["error"]["message"])
    assert ask(http, max_tokens=1).status_code == 200


def test_other_content_types_and_methods(http: httpx.Client) -> None:
    response = http.post(
        "/v1/chat/completions", content=b"{}", headers={"Content-Type": "text/plain"}
    )
    assert response.status_code == 415
    assert http.get("/v1/chat/completions").status_code == 405
    assert http.get("/nowhere").json()["error"]["type"] == "invalid_request_error"
