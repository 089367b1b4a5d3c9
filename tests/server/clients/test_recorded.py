"""Requests that programs really sent, recorded from them by `support.recorder` and trimmed.

models/tiny was not taught what agents are told: it must answer, whatever it says. That their tools
run and come back is shown by `test_programs.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

RECORDED = Path(__file__).parent / "recorded"
CASES = [
    pytest.param(json.loads(line), id=f"{path.stem}-{index}")
    for path in sorted(RECORDED.glob("*.jsonl"))
    for index, line in enumerate(path.read_text("utf-8").splitlines()[1:])
]
# What is named of the requests of some programs; all else must mean something here.
SEARCH_THE_WEB = ("codex",)


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.jsonl")), ids=lambda path: path.stem)
def test_a_recording_says_what_it_is_of(path: Path) -> None:
    first = json.loads(path.read_text("utf-8").splitlines()[0])
    assert list(first) == ["recorded"]
    assert "20" in first["recorded"]


def told_by(answer: httpx.Response) -> list[dict[str, Any]]:
    data = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(each) for each in data if each != "[DONE]"]


@pytest.mark.parametrize("sent", CASES)
def test_it_is_answered(http: httpx.Client, sent: dict[str, Any], request: Any) -> None:
    body = sent["body"]
    if isinstance(body, dict):
        # Few steps, and an end: what models/tiny says of it does not matter.
        limit = "max_output_tokens" if "/responses" in sent["path"] else "max_tokens"
        body = {**body, "max_denoising_steps": 4, limit: 40}
    answer = http.request(sent["method"], sent["path"], json=body, headers=sent["headers"])
    assert answer.status_code == 200, answer.text
    if sent["method"] == "HEAD":
        return
    told = told_by(answer)
    name = request.node.callspec.id.rpartition("-")[0]
    warnings: list[str] = []
    if "/messages" in sent["path"]:
        assert told[-1]["type"] == "message_stop"
        warnings = told[0]["message"].get("warnings", [])
    elif "/responses" in sent["path"]:
        assert told[-1]["type"] in ("response.completed", "response.incomplete")
        warnings = told[-1]["response"].get("warnings", [])
    else:
        assert answer.text.endswith("data: [DONE]\n\n")
        assert told[-1]["usage"]["total_tokens"] > 0
        warnings = told[0].get("warnings", [])
    found = [warning.partition(":")[0].partition(" is ")[2] for warning in warnings]
    assert found == ["a tool of type 'web_search'"] * (name in SEARCH_THE_WEB)
