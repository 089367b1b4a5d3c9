"""`dgemma batch`: one line out for each line in, whatever happens in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dgemma.batch import BatchError, Journal, Line, read_lines, run_batch
from dgemma.batch.records import answered

PROGRAM = [sys.executable, "-c", "import sys; from dgemma.cli import main; sys.exit(main())"]


def chat(name: str, question: str = "What is the capital of France?", **body: Any) -> str:
    messages = [{"role": "user", "content": question}]
    asked = {"messages": messages, "seed": 1, **body}
    return json.dumps(
        {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": asked}
    )


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def batch(model: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*PROGRAM, "batch", *map(str, arguments), "-m", str(model), "-c", "512", "-t", "1"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def echo(lines: Iterator[Line]) -> Iterator[tuple[int, dict[str, Any]]]:
    for line in lines:
        yield line.number, answered(line, 200, json.dumps(line.body).encode())


def test_every_kind_of_line(tiny_gguf: Path, tmp_path: Path) -> None:
    source = written(
        tmp_path / "in.jsonl",
        "\ufeff" + chat("good"),
        "",
        "not json",
        '{"custom_id": 7}',
        '{"custom_id": "no body"}',
        '{"custom_id": "get", "method": "GET", "url": "/v1/completions", "body": {}}',
        chat("bad", max_tokens=-5),
        chat("streamed", stream=True),
        '{"custom_id": "plain", "url": "/v1/completions", "body": {"prompt": "Hi"}}',
    )
    out = tmp_path / "out.jsonl"
    done = batch(tiny_gguf, source, "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["requests"], report["failed"], report["resumed"]) == (8, 5, 0)
    got = records(out)
    assert [r["custom_id"] for r in got] == [
        "good", None, None, "no body", "get", "bad", "streamed", "plain"
    ]  # fmt: skip
    statuses = [r["response"] and r["response"]["status_code"] for r in got]
    assert statuses == [200, None, None, None, None, 400, 200, 200]
    for name in (0, 6):
        content = got[name]["response"]["body"]["choices"][0]["message"]["content"]
        assert content == "The capital of France is Paris."
    assert got[1]["error"]["message"].startswith("line 3 is not JSON")
    assert "custom_id" in got[2]["error"]["message"]
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_an_interrupted_batch_goes_on(tiny_gguf: Path, tmp_path: Path) -> None:
    slow = {"confidence_threshold": 1e-30, "max_denoising_steps": 200}
    lines = [chat("quick"), *(chat(f"s{i}", **slow) for i in range(4))]
    source = written(tmp_path / "in.jsonl", *lines)
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    command = [*PROGRAM, "batch", str(source), "-o", str(out), "-m", str(tiny_gguf), "-c", "512"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not partial.exists() or partial.read_bytes().count(b"\n") < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert not out.exists()
    kept = partial.read_bytes().splitlines()[1]
    with open(partial, "ab") as file:
        file.write(b'{"line": 2, "record": {"id"')  # as a crash leaves it
    done = batch(tiny_gguf, source, "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed"] >= 1
    got = records(out)
    assert [r["custom_id"] for r in got] == ["quick", "s0", "s1", "s2", "s3"]
    assert got[0] == json.loads(kept)["record"]


def test_failed_lines_are_asked_again_on_request(tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", chat("a"), chat("b"))
    out = tmp_path / "out.jsonl"

    def fails_then_stops(lines: Iterator[Line]) -> Iterator[tuple[int, dict[str, Any]]]:
        line = next(lines)
        yield line.number, answered(line, 503, b'{"error": {}}')
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_batch(source, out, fails_then_stops, retry_failed=True)
    report = run_batch(source, out, echo, retry_failed=True)
    assert (report.resumed, report.failed) == (0, 0)
    assert [r["response"]["status_code"] for r in records(out)] == [200, 200]


def test_answers_in_any_order_and_twice(tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", *(chat(str(i)) for i in range(5)))

    def backwards(lines: Iterator[Line]) -> Iterator[tuple[int, dict[str, Any]]]:
        made = list(echo(lines))
        yield from reversed(made)
        yield made[0]

    for ordered in (True, False):
        out = tmp_path / f"{ordered}.jsonl"
        run_batch(source, out, backwards, ordered=ordered)
        names = [r["custom_id"] for r in records(out)]
        assert names == (list("01234") if ordered else list("43210"))


def test_a_journal_of_another_input_is_not_taken(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    first = written(tmp_path / "first.jsonl", chat("a"))
    with Journal(out, first) as journal:
        journal.append(1, answered(next(read_lines(first)), 200, b"{}"))
        with pytest.raises(BatchError, match="another run"), Journal(out, first):
            pass
    second = written(tmp_path / "second.jsonl", chat("b"))
    with pytest.raises(BatchError, match="another input"):
        run_batch(second, out, echo)
    assert run_batch(first, out, echo).resumed == 1


@pytest.mark.parametrize(
    "content",
    [
        b"my notes, without an end",
        b"my notes\n",
        b"[1]\n",
        b'{"sha256": 1}\n',
        "{head}\nnot json\n",
        '{head}\n{"line": 1}\n',
        '{head}\n{"line": "1", "record": {"error": {}}}\n',
        '{head}\n{"line": 1, "record": {"error": null, "response": null}}\n',
    ],
)
def test_a_journal_that_is_none_is_refused_and_kept(content: bytes | str, tmp_path: Path) -> None:
    source, out = written(tmp_path / "in.jsonl", chat("a")), tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    if isinstance(content, str):
        with Journal(out, source):
            content = content.replace("{head}", partial.read_text().strip()).encode()
    partial.write_bytes(content)
    with pytest.raises(BatchError, match="no line of a batch's answers"):
        run_batch(source, out, echo)
    assert partial.read_bytes() == content
    assert not out.exists()


def test_a_journal_that_was_cut_within_its_first_line_begins_anew(tmp_path: Path) -> None:
    source, out = written(tmp_path / "in.jsonl", chat("a")), tmp_path / "out.jsonl"
    for cut in (b"", b'{"so', b'{"source": "x", "sha2'):
        (tmp_path / "out.jsonl.partial").write_bytes(cut)
        assert run_batch(source, out, echo).requests == 1
        assert len(records(out)) == 1


def test_a_link_in_the_journals_place_is_not_followed(tmp_path: Path) -> None:
    source, out = written(tmp_path / "in.jsonl", chat("a")), tmp_path / "out.jsonl"
    other = written(tmp_path / "other", "mine")
    (tmp_path / "out.jsonl.partial").symlink_to(other)
    with pytest.raises(BatchError, match="is a link"):
        run_batch(source, out, echo)
    assert other.read_text() == "mine\n"


def test_doubled_ids_are_refused_before_anything_is_asked(tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", chat("a"), "", chat("a"))
    with pytest.raises(BatchError, match="lines 1 and 3"):
        run_batch(source, tmp_path / "out.jsonl", echo)
    assert os.listdir(tmp_path) == ["in.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jsonl", "-o", "out.jsonl"], "expected a file of requests"),
        (["in.jsonl", "-o", "nowhere/out.jsonl"], "no such folder"),
        (["in.jsonl", "-o", "there.jsonl"], "--force replaces it"),
    ],
)
def test_wrong_arguments(
    tiny_gguf: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    written(tmp_path / "in.jsonl", chat("a"))
    (tmp_path / "there.jsonl").touch()
    places = [str(tmp_path / a) if "jsonl" in a else a for a in arguments]
    done = batch(tiny_gguf, *places)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_no_workers_is_wrong_usage(tiny_gguf: Path) -> None:
    done = batch(tiny_gguf, "in.jsonl", "-o", "out.jsonl", "--workers", 0)
    assert done.returncode == 2
    assert "at least 1" in done.stderr
