"""From exceptions to the errors of the APIs: a status, a type, a code, and the field to blame."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass, field

from starlette.exceptions import HTTPException

from ..errors import (
    CancelledError,
    ChatTemplateError,
    ContextLengthError,
    Error,
    OptionError,
    ResponseFormatError,
)
from .engine import JsonObject, QueueFullError

log = logging.getLogger("dgemma.server")


class BadRequestError(ValueError):
    """The request itself is wrong; `status` is the HTTP status that says so.

    `more` are further fields of the error, for clients that act on them.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        more: JsonObject | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.headers = status, param, headers or {}
        self.more = more or {}
        self.code = code or _CODES.get(status, "invalid_request")


_CODES = {
    401: "invalid_api_key",
    403: "host_not_allowed",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
}


@dataclass(frozen=True)
class Failure:
    """An error as clients are told it."""

    status: int
    kind: str
    message: str
    code: str
    param: str | None = None
    more: JsonObject = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> JsonObject:
        """In the form of the OpenAI API."""
        told = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": {**told, **self.more}}


def failure(problem: BaseException) -> Failure:
    """What an exception means to the client. What nobody expected is logged under an id.

    A request is to blame where something has looked at it and said so: with an OptionError, and not
    with any ValueError or TypeError, which would as well be a bug of ours.
    """
    message = str(problem)
    param, code = getattr(problem, "param", None), getattr(problem, "code", None)
    if isinstance(problem, ContextLengthError):
        figures = ("n_prompt_tokens", "n_ctx")
        more = {n: getattr(problem, n) for n in figures if getattr(problem, n) is not None}
        return Failure(
            400, "exceed_context_size_error", message, "context_length_exceeded", param, more
        )
    if isinstance(problem, QueueFullError):
        after = {"Retry-After": str(problem.retry_after)}
        return Failure(503, "unavailable_error", message, "queue_full", headers=after)
    if isinstance(problem, BadRequestError):
        return Failure(
            problem.status,
            "authentication_error" if problem.status == 401 else "invalid_request_error",
            message,
            problem.code,
            param,
            problem.more,
            headers=problem.headers,
        )
    if isinstance(problem, ResponseFormatError):
        return Failure(422, "response_format_error", message, "response_format_failed")
    if isinstance(problem, CancelledError):
        return Failure(503, "cancelled_error", message, "cancelled", headers={"Retry-After": "2"})
    if isinstance(problem, OptionError | ChatTemplateError):
        return Failure(400, "invalid_request_error", message, code or "invalid_value", param)
    if isinstance(problem, HTTPException):
        known = _CODES.get(problem.status_code, "invalid_request")
        headers = dict(problem.headers or {})
        return Failure(
            problem.status_code, "invalid_request_error", problem.detail, known, headers=headers
        )
    if isinstance(problem, RecursionError):
        return Failure(400, "invalid_request_error", "it is nested too deeply", "invalid_value")
    id = secrets.token_hex(4)
    log.error("error %s: %s", id, message or type(problem).__name__, exc_info=problem)
    # What a bug says about the inside is not for clients; what the engine says is.
    told = message if isinstance(problem, Error) else "the server failed"
    return Failure(
        500,
        "server_error",
        f"{told} (error {id}: the server's log says more)",
        "server_error",
        more={"id": id},
    )
