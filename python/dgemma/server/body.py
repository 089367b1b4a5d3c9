"""Bodies of requests: read within bounds, and parsed without holding anybody else up."""

from __future__ import annotations

import asyncio
import json
import math
import re
from concurrent.futures import Executor
from typing import Any

import pydantic_core
from starlette.requests import ClientDisconnect, Request

from .failures import BadRequestError

BODY_SECONDS = 30.0  # a request that is sent more slowly is dropped
# The parser holds the interpreter's lock: so many values take it some 40 ms.
MAX_VALUES = 300_000
MAX_KEYS = 100_000
_NO_NUMBER = re.compile(rb"NaN|-?Infinity")
MAX_NUMBER = 2**64  # no option means anything beyond it


async def read_json(request: Request, max_bytes: int, executor: Executor) -> Any:
    """The JSON value in a request's body; BadRequestError says what is wrong with it."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise BadRequestError("the body must be sent as Content-Type: application/json", 415)
    try:
        body = await asyncio.wait_for(_body(request, max_bytes), BODY_SECONDS)
    except asyncio.TimeoutError:  # another class than TimeoutError before 3.11
        raise BadRequestError("the body did not arrive in time", 408) from None
    except ClientDisconnect:  # nobody reads this, and no log need be filled with it
        raise BadRequestError("the client left before its body was whole") from None
    return await asyncio.get_running_loop().run_in_executor(executor, parse_json, body)


async def _body(request: Request, max_bytes: int) -> bytes:
    said = request.headers.get("content-length", "")
    if said.isdigit() and int(said) > max_bytes:
        raise BadRequestError(f"the body is larger than {max_bytes} bytes", 413)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise BadRequestError(f"the body is larger than {max_bytes} bytes", 413)
    return bytes(body)


def parse_json(body: bytes) -> Any:
    """The value; BadRequestError where it is no JSON, or has more values than a request needs."""
    _bound(body)
    try:
        body.decode("utf-8")
    except UnicodeDecodeError:
        raise BadRequestError("the body is not UTF-8", code="invalid_json") from None
    try:
        value = pydantic_core.from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as problem:
        raise BadRequestError(
            f"the body is not JSON: {_reason(body, problem)}", code="invalid_json"
        ) from None
    _check_numbers(value)
    return value


def _no_json(reason: str) -> BadRequestError:
    return BadRequestError(f"the body is not JSON: {reason}", code="invalid_json")


def _reason(body: bytes, problem: ValueError) -> str:
    text = str(problem)
    if "recursion" in text:
        return "it is nested too deeply"
    column = re.search(r"column (\d+)", text)
    if "hex escape" in text:
        return "it has half a surrogate pair, which is no Unicode"
    if "expected value" in text and column is not None:
        found = _NO_NUMBER.search(body, max(0, int(column[1]) - 12))
        return f"{found[0].decode()} is no JSON number" if found else text
    return text


def _bound(body: bytes) -> None:
    """Refuses a body of very many values; texts count as one, whatever is in them."""
    commas, colons = body.count(b","), body.count(b":")
    if commas + body.count(b"[") <= MAX_VALUES and colons <= MAX_KEYS:
        return
    n_values = n_keys = at = 0
    while n_values <= MAX_VALUES and n_keys <= MAX_KEYS:
        begin = body.find(b'"', at)
        end = len(body) if begin < 0 else begin
        n_values += (
            body.count(b",", at, end) + body.count(b"[", at, end) + body.count(b"{", at, end)
        )
        n_keys += body.count(b":", at, end)
        if begin < 0:
            break
        at = _end_of_text(body, begin + 1)
        n_values += 1
    if n_values <= MAX_VALUES and n_keys <= MAX_KEYS:
        return
    raise BadRequestError(
        f"the body has more than {MAX_VALUES} values or {MAX_KEYS} keys",
        413,
        code="too_many_values",
    )


def _end_of_text(body: bytes, at: int) -> int:
    """Where a JSON text ends whose first byte is `at`: behind its quotation mark."""
    while True:
        end = body.find(b'"', at)
        if end < 0:
            return len(body)
        backslashes = end - 1
        while backslashes >= at and body[backslashes] == 0x5C:
            backslashes -= 1
        at = end + 1
        if (end - 1 - backslashes) % 2 == 0:
            return at


def _check_numbers(value: Any) -> None:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, float | int) and not isinstance(item, bool):
            if not math.isfinite(item) if isinstance(item, float) else abs(item) >= MAX_NUMBER:
                raise BadRequestError(
                    "the body is not JSON: a number is too large", code="invalid_json"
                )
        elif isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)


def encode_ids(ids: list[int]) -> bytes:
    """A JSON list of numbers, made in parts: the interpreter's lock is let go between them."""
    parts = (ids[at : at + 10_000] for at in range(0, len(ids), 10_000))
    return b"[" + b",".join(",".join(map(str, part)).encode() for part in parts) + b"]"


def encode_json(value: Any) -> bytes:
    """JSON in UTF-8, without spaces."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
