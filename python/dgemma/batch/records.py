"""The lines of a batch: what is read, and what stands in the answer.

The format is that of OpenAI's Batch API: `{"custom_id", "method", "url", "body"}` a line, and
`{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}` for each of them.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Error
from ..server.inprocess import HttpRequest

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")

Record = dict[str, Any]


class BatchError(Error):
    """A batch that cannot begin or go on: the file itself is wrong, not one of its requests."""


@dataclass(frozen=True)
class Line:
    """One line of the input; `problem` says why it is no request, where it is none."""

    number: int
    """From 1, as an editor counts; lines that are empty are passed over."""
    custom_id: str | None
    url: str = ""
    body: Record | None = None
    problem: str | None = None

    def request(self) -> HttpRequest:
        """The line as the server would have received it."""
        assert self.body is not None
        body = {name: value for name, value in self.body.items() if name != "stream"}
        data = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
        return HttpRequest("POST", self.url, data, [(b"content-type", b"application/json")])


def read_lines(path: Path) -> Iterator[Line]:
    """The requests of a file in its order; what is no request is one with a `problem`.

    Errors: BatchError for a `custom_id` that stands on two lines, since answers are told apart by
    it; OSError.
    """
    seen: dict[str, int] = {}
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip() or (number == 1 and not raw.strip(b"\xef\xbb\xbf \t\r\n")):
                continue
            line = _line(number, raw)
            if line.custom_id is not None:
                first = seen.setdefault(line.custom_id, number)
                if first != number:
                    raise BatchError(
                        f"{path}: custom_id {line.custom_id!r} stands on the lines {first} and "
                        f"{number}: expected another one on each line, as answers are found by it"
                    )
            yield line


def _line(number: int, raw: bytes) -> Line:
    try:
        value = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (ValueError, RecursionError) as problem:
        return Line(number, None, problem=f"line {number} is not JSON: {problem}")
    if not isinstance(value, dict):
        return Line(number, None, problem=f"line {number} is no JSON object")
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str):
        return Line(number, None, problem=f"line {number} has no custom_id; expected a string")
    url = value.get("url", URLS[0])
    if value.get("method", "POST") != "POST" or url not in URLS:
        wanted = " or ".join(URLS)
        return Line(number, custom_id, problem=f'expected "method": "POST" and "url": {wanted}')
    body = value.get("body")
    if not isinstance(body, dict):
        return Line(number, custom_id, problem="body is missing; expected a JSON object")
    return Line(number, custom_id, url, body)


def answered(line: Line, status: int, body: bytes) -> Record:
    """The record of a request that the server's routes have answered, well or not."""
    try:
        value: Any = json.loads(body)
    except ValueError:
        value = {"error": {"message": body.decode("utf-8", "replace"), "type": "server_error"}}
    response = {"status_code": status, "request_id": f"req_{secrets.token_hex(12)}", "body": value}
    return _record(line, response, None)


def failed(line: Line, code: str, message: str) -> Record:
    """The record of a line that never became a request, or whose answer was lost for good."""
    return _record(line, None, {"code": code, "message": message})


def refused(line: Line) -> Record:
    """The record of a line that is no request."""
    return failed(line, "invalid_request", line.problem or "")


def succeeded(record: Record) -> bool:
    """Whether a record holds an answer."""
    return record["error"] is None and record["response"]["status_code"] == 200


def _record(line: Line, response: Record | None, error: Record | None) -> Record:
    return {
        "id": f"batch_req_{secrets.token_hex(12)}",
        "custom_id": line.custom_id,
        "response": response,
        "error": error,
    }
