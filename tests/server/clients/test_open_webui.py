"""Open WebUI: a streamed chat and the tasks behind it, by requests of its shape."""

from __future__ import annotations

from typing import Any

import httpx

from support.clients import CAPITAL, PARIS, chunks, text_of

USER = {
    "X-OpenWebUI-User-Name": "Zo%C3%AB",
    "X-OpenWebUI-User-Id": "5b0c1f0e",
    "X-OpenWebUI-User-Email": "zoe@localhost",
    "X-OpenWebUI-User-Role": "admin",
    "X-OpenWebUI-Chat-Id": "c7a9",
}
HISTORY = f"<chat_history>\nUSER: {CAPITAL}\nASSISTANT: {PARIS}\n</chat_history>"


def chat(http: httpx.Client, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    body = {
        "stream": True,
        "model": "tiny",
        "messages": messages,
        "temperature": 0,
        "top_p": 0.9,
        "top_k": 40,
        "frequency_penalty": 0.1,
        "stop": ["<end>"],
        "seed": 1,
        "stream_options": {"include_usage": True},
    }
    return chunks(http.post("/v1/chat/completions", json=body, headers=USER))


def task(http: httpx.Client, wanted: str, form: str) -> httpx.Response:
    """A task of its own, such as a title: one message with the whole chat in it, not streamed."""
    text = f"### Task:\n{wanted}\n### Output:\nJSON format: {form}\n### Chat History:\n{HISTORY}"
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": text}],
        "stream": False,
        "max_completion_tokens": 40,
        "seed": 1,
    }
    return http.post("/v1/chat/completions", json=body, headers=USER)


TASKS = [
    ("Name this chat in three words.", '{ "title": "the title" }'),
    ("Give one to three tags for what it is about.", '{ "tags": ["tag1", "tag2"] }'),
    ("Suggest what the user may ask next.", '{ "follow_ups": ["Question 1?"] }'),
    ("Say what to search for, or nothing.", '{ "queries": [] }'),
]


def test_the_list_of_models(http: httpx.Client) -> None:
    answer = http.get("/v1/models", headers=USER)
    assert answer.status_code == 200
    assert [(m["id"], m["object"], m["owned_by"]) for m in answer.json()["data"]] == [
        ("tiny", "model", "dgemma")
    ]


def test_a_chat_goes_on_after_its_title_and_tags(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": CAPITAL}]
    first = chat(http, messages)
    assert text_of(first) == PARIS
    assert [c["finish_reason"] for chunk in first for c in chunk["choices"]][-1] == "stop"
    assert first[-1]["choices"] == []
    assert first[-1]["usage"]["completion_tokens"] > 0
    for wanted, form in TASKS:
        answer = task(http, wanted, form)
        assert answer.status_code == 200, answer.text
        (choice,) = answer.json()["choices"]
        assert choice["message"]["role"] == "assistant"
        assert choice["finish_reason"] in ("stop", "length")
        assert answer.json()["usage"]["completion_tokens"] <= 40
    # The chat's own beginning is still encoded: the tasks were other conversations.
    messages += [{"role": "assistant", "content": PARIS}]
    messages += [{"role": "user", "content": "Name the opposite of loud."}]
    second = chat(http, messages)
    assert text_of(second) == "The opposite of loud is quiet."
    usage = second[-1]["usage"]
    opening = 4  # tokens with which the template opens an answer, which are others in a history
    wanted = first[-1]["usage"]["prompt_tokens"] - opening
    assert usage["prompt_tokens_details"]["cached_tokens"] == wanted


def test_its_check_of_a_connection(server: str) -> None:
    with httpx.Client(base_url=server, trust_env=False, timeout=60) as nobody:
        refused = nobody.get("/v1/models", headers={"Authorization": "Bearer wrong"})
        assert refused.status_code == 401
        assert "key" in refused.json()["error"]["message"]
