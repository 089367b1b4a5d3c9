"""Requests made up from /openapi.json, hundreds of them: none is answered with a bug."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings

from support.serving import running

schemathesis: Any = pytest.importorskip("schemathesis")


OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("POST", "/completion"),
    ("POST", "/infill"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/apply-template"),
    ("GET", "/v1/models/{name}"),
]


@pytest.fixture(scope="module")
def api(tiny_gguf: Path) -> Iterator[tuple[str, Any]]:
    with running(tiny_gguf, "--max-denoising-steps", 8) as (address, _):
        described = httpx.get(f"{address}/openapi.json", timeout=60, trust_env=False)
        yield address, schemathesis.openapi.from_dict(described.json())


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_request_meets_a_bug(api: tuple[str, Any], method: str, path: str) -> None:
    address, schema = api
    operations = {o.ok().label: o.ok() for o in schema.get_all_operations()}

    # The same requests every time: 20 of each kind, and no longer than they take.
    @settings(
        max_examples=20,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operations[f"{method} {path}"].as_strategy())
    def tried(case: Any) -> None:
        body = case.body if method == "POST" else None
        if isinstance(body, dict):
            # What takes long is not looked for here.
            body = {**body, "max_denoising_steps": 4, "n": 1}
        filled = path.replace("{name}", quote(str((case.path_parameters or {}).get("name", "x"))))
        data = json.dumps(body).encode() if method == "POST" else None
        headers = {"Content-Type": "application/json"}
        answer = http.request(method, filled, content=data, headers=headers)
        status = answer.status_code
        assert status < 500 or status == 503, answer.text
        if status >= 400:
            assert answer.json()["error"]["message"], answer.text

    with httpx.Client(base_url=address, timeout=120, trust_env=False) as http:
        tried()
