"""lm_eval's two models for servers: answers; what needs log-probabilities is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from support.clients import CAPITAL, PARIS, STORY
from support.serving import KEY

requests = pytest.importorskip("requests", reason="needs the extra `clients`")
instances = pytest.importorskip("lm_eval.api.instance", reason="needs the extra `clients`")
registry = pytest.importorskip("lm_eval.api.registry", reason="needs the extra `clients`")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "*")


def model(name: str, address: str, **options: Any) -> Any:
    return registry.get_model(name).create_from_arg_obj(
        {"model": "tiny", "base_url": address, "tokenizer_backend": None, "seed": 1, **options},
    )


def answers(asked: Any, texts: list[Any], **options: Any) -> list[str]:
    return asked.generate_until(
        [
            instances.Instance("generate_until", {}, (text, {"do_sample": False, **options}), index)
            for index, text in enumerate(texts)
        ],
        disable_tqdm=True,
    )


def test_chat(server: str) -> None:
    asked = model("local-chat-completions", f"{server}/v1/chat/completions")
    text = asked.apply_chat_template([{"role": "user", "content": CAPITAL}])
    assert answers(asked, [text], until=["\n\n"], max_gen_toks=32) == [PARIS]
    assert answers(asked, [text], until=[" is"], max_gen_toks=32) == ["The capital of France"]


@pytest.mark.parametrize("options", [{"batch_size": 2}, {"num_concurrent": 2}], ids=str)
def test_texts(server: str, options: dict[str, int]) -> None:
    asked = model("local-completions", f"{server}/v1/completions", **options)
    told = answers(asked, [STORY, "The old man "], until=["\n"], max_gen_toks=8)
    wanted = []
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server, headers=headers, trust_env=False, timeout=120) as http:
        for text in (STORY, "The old man "):
            body = {"prompt": text, "max_tokens": 8, "temperature": 0, "stop": ["\n"], "seed": 1}
            whole = http.post("/v1/completions", json=body).json()
            wanted.append(whole["choices"][0]["text"])
    assert told == wanted
    assert told[0] != ""


def test_log_probabilities_are_refused(
    server: str, tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = model(
        "local-completions",
        f"{server}/v1/completions",
        tokenizer_backend="huggingface",
        tokenizer=str(tiny),
        max_retries=1,
    )
    request = instances.Instance("loglikelihood", {}, (CAPITAL, " Paris"), 0)
    with pytest.raises(requests.HTTPError, match="400"):
        asked.loglikelihood([request], disable_tqdm=True)
    assert "logprobs" in caplog.text
