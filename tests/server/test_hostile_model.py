"""A server whose model file has a template that means harm."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

import support.gguf_builder as b
from support.rewriting import rewrite
from support.serving import running

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
# Well behaved, until it meets a word.
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% if m.content == 'time' %}" + LOOP + "{% endif %}"
    "{% if m.content == 'memory' %}{{ 'a' * 10**9 }}{% endif %}{% endfor %}"
)


@pytest.fixture
def hostile(tiny_gguf: Path, tmp_path: Path) -> Path:
    key = b.key("tokenizer.chat_template", b.STRING, TEMPLATE)
    return rewrite(tiny_gguf, tmp_path / "hostile.gguf", {"tokenizer.chat_template": key})


def test_others_are_answered_and_sigterm_is_heard(hostile: Path) -> None:
    """While as many conversations are rendered as there are threads for, and more wait."""
    with running(hostile) as (address, process):
        ended: list[int] = []

        def ask(content: str) -> None:
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4}
            try:
                found = httpx.post(
                    f"{address}/v1/chat/completions", json=body, timeout=120, trust_env=False
                )
            except httpx.HTTPError:  # the server has ended
                return
            ended.append(found.status_code)

        with httpx.Client(base_url=address, timeout=60, trust_env=False) as http:
            ask("Hello")
            assert ended == [200]
            threads = [threading.Thread(target=ask, args=("time",)) for _ in range(6)]
            for thread in threads:
                thread.start()
            seconds: list[float] = []
            http.get("/health")
            for _ in range(40):
                began = time.perf_counter()
                assert http.get("/health").status_code == 200
                seconds.append(time.perf_counter() - began)
                time.sleep(0.01)
            # The better half: other programs run on this machine too.
            assert sorted(seconds)[20] < 0.1, seconds
            ask("memory")
            assert ended[-1] == 400
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        for thread in threads:
            thread.join()
    assert set(ended) <= {200, 400, 503}, process.said  # type: ignore[attr-defined]
