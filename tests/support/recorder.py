"""A proxy that writes down what a program asks of a server, and trims it for the tests.

    python tests/support/recorder.py http://127.0.0.1:8080 8081 program.jsonl
    python tests/support/recorder.py --trim program.jsonl "Claude Code 2.1.197, 2026-11-27" \
        >tests/server/clients/recorded/claude_code.jsonl

What is kept of a recording is its shape: names of fields, of tools and of roles, the parts that
messages and schemas are made of. Texts of a program's own are replaced by a few words.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import AsyncIterator, Mapping
from typing import Any

MAX_TEXT = 48  # characters of a text that is kept as it is
MAX_WORDS = 24  # that stand for a text
MAX_TOOLS = 4
MAX_CHOICES = 4  # of an enumeration
# Headers of the connection, and what tells one machine or session from another.
_LEFT_OUT = re.compile(
    r"host|connection|content-length|accept-encoding|authorization|x-api-key|.*session.*|.*thread.*|"
    r".*request-id|.*window.*|.*turn.*|traceparent|tracestate"
)
_FOLDER = re.compile(r"/(?:tmp|home|root|work)/[\w./-]+")
_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{20,}|\b[0-9a-f]{24,}\b")
_TEXTS = ("text", "content", "description", "instructions", "system", "output", "title")


def trimmed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded request without what is the program's own."""
    headers = {n: v for n, v in record["headers"].items() if not _LEFT_OUT.fullmatch(n.lower())}
    body = _shape(record["body"], "")
    if isinstance(body, dict) and isinstance(body.get("tools"), list):
        body["tools"] = _some_of_each_kind(body["tools"])
    return {
        "method": record["method"],
        "path": record["path"],
        "headers": {name: _without_ids(value) for name, value in headers.items()},
        "body": body,
    }


def _some_of_each_kind(tools: list[Any]) -> list[Any]:
    """At most MAX_TOOLS of a type; those with the largest schemas say the most."""
    kept: list[Any] = []
    kinds = {str(tool.get("type")) for tool in tools}
    for kind in kinds:
        same = [tool for tool in tools if str(tool.get("type")) == kind]
        kept += sorted(same, key=lambda tool: len(json.dumps(tool)), reverse=True)[:MAX_TOOLS]
    return [tool for tool in tools if tool in kept]


def _shape(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        if value.get("type") == "namespace":
            value = {**value, "tools": value["tools"][:MAX_TOOLS]}
        return {key: _shape(item, key) for key, item in value.items()}
    if isinstance(value, list):
        items = value[:MAX_CHOICES] if name == "enum" else value
        return [_shape(item, name) for item in items]
    if not isinstance(value, str):
        return value
    if len(value) > MAX_TEXT and not value.startswith(("{", "data:", "x-")):
        words = "words " * min(MAX_WORDS, max(1, len(value) // 40))
        return words.strip() if name in _TEXTS else _without_ids(value)[:MAX_TEXT]
    return _without_ids(value)


def _without_ids(text: str) -> str:
    return _FOLDER.sub("/project", _ID.sub("0123456789abcdef", text))


def record(upstream: str, port: int, path: str) -> None:
    """Passes requests on until it is told to stop, and writes each to the file as it comes."""
    import httpx
    import uvicorn
    from starlette.requests import Request
    from starlette.responses import StreamingResponse

    client = httpx.AsyncClient(base_url=upstream, timeout=600, trust_env=False)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        body = await request.body()
        given = {n: v for n, v in request.headers.items() if n not in ("host", "content-length")}
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        kept = {"method": request.method, "path": target, "headers": given}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({**kept, "body": json.loads(body) if body else None}) + "\n")
        asked = client.build_request(request.method, target, headers=given, content=body)
        answer = await client.send(asked, stream=True)

        async def parts() -> AsyncIterator[bytes]:
            async for part in answer.aiter_raw():
                yield part

        hop = ("content-length", "transfer-encoding", "connection")
        headers = {n: v for n, v in answer.headers.items() if n not in hop}
        made = StreamingResponse(parts(), answer.status_code, headers)
        await made(scope, receive, send)

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def trim(path: str, title: str) -> None:
    """Prints a recording trimmed, under a line that says what it is of."""
    print(json.dumps({"recorded": title}))
    with open(path, encoding="utf-8") as file:
        for line in file:
            print(json.dumps(trimmed(json.loads(line)), ensure_ascii=False))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trim"]:
        trim(sys.argv[2], sys.argv[3])
    else:
        record(sys.argv[1], int(sys.argv[2]), sys.argv[3])
