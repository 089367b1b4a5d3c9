"""Several answers to one request: `n` choices, and lists of prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import dgemma
from dgemma import DiffusionGemma
from support.asking import PROSE

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def texts(answer: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


def test_choice_i_is_the_answer_of_seed_plus_i(llm: DiffusionGemma) -> None:
    alone = [llm(PROSE, max_tokens=40, seed=seed) for seed in (5, 6, 7)]
    together = llm(PROSE, max_tokens=40, seed=5, n=3)
    assert texts(together) == [texts(answer)[0] for answer in alone]
    assert len(set(texts(together))) > 1
    assert [choice["index"] for choice in together["choices"]] == [0, 1, 2]
    usage = together["usage"]
    assert usage["prompt_tokens"] == alone[0]["usage"]["prompt_tokens"]
    assert usage["completion_tokens"] == sum(a["usage"]["completion_tokens"] for a in alone)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_one_prompt_is_encoded_once(llm: DiffusionGemma) -> None:
    llm.reset()
    n_tokens = 3 * llm.info.canvas_length  # canvases of the first answer are behind the prompt
    choices = llm.choices([PROSE], n=3, seed=1, max_tokens=n_tokens)
    for _ in choices:
        pass
    stats = [result.stats for result in choices.results]
    assert stats[0].cached_tokens == 0
    assert [s.cached_tokens for s in stats[1:]] == [s.prompt_tokens for s in stats[1:]]
    assert [s.seed for s in stats] == [1, 2, 3]


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_prompts_of_texts_and_of_ids(llm: DiffusionGemma, kind: Any) -> None:
    prompts = ["The old man", "The red fox"]
    ids = [llm.encode_prompt(prompt) for prompt in prompts]
    expected = [texts(llm(prompt, max_tokens=6, seed=3))[0] for prompt in prompts]
    if kind is not np.array:
        assert texts(llm(kind(prompts), max_tokens=6, seed=3)) == expected
        assert texts(llm(kind(map(kind, ids)), max_tokens=6, seed=3)) == expected
        assert texts(llm(kind([prompts[0], ids[1]]), max_tokens=6, seed=3)) == expected
    assert texts(llm(kind(ids[0]), max_tokens=6, seed=3)) == expected[:1]
    assert (
        texts(llm(kind([float(token) for token in ids[0]]), max_tokens=6, seed=3)) == expected[:1]
    )


def test_prompts_and_choices_together(llm: DiffusionGemma) -> None:
    prompts = ["The old man", "The red fox"]
    answer = llm(prompts, n=2, max_tokens=6, seed=3, echo=True)
    expected = [
        prompt + texts(llm(prompt, max_tokens=6, seed=seed))[0]
        for prompt in prompts
        for seed in (3, 4)
    ]
    assert texts(answer) == expected
    alone = [llm(prompt, max_tokens=6, seed=3)["usage"]["prompt_tokens"] for prompt in prompts]
    assert answer["usage"]["prompt_tokens"] == sum(alone)
    streamed = [""] * 4
    reasons: list[Any] = [None] * 4
    options: dict[str, Any] = {"n": 2, "max_tokens": 6, "seed": 3, "echo": True}
    for chunk in llm(prompts, stream=True, stream_options={"include_usage": True}, **options):
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["text"]
            reasons[choice["index"]] = choice["finish_reason"]
    assert streamed == expected
    assert reasons == [choice["finish_reason"] for choice in answer["choices"]]
    assert chunk["choices"] == []
    figures = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert {n: chunk["usage"][n] for n in figures} == {n: answer["usage"][n] for n in figures}


def test_choices_of_a_conversation(llm: DiffusionGemma) -> None:
    answer = llm.create_chat_completion(QUESTION, n=2, seed=1)
    assert [c["index"] for c in answer["choices"]] == [0, 1]
    assert all("Paris" in c["message"]["content"] for c in answer["choices"])
    contents = ["", ""]
    for chunk in llm.create_chat_completion(QUESTION, n=2, seed=1, stream=True):
        (choice,) = chunk["choices"]
        contents[choice["index"]] += choice["delta"].get("content", "")
    assert contents == [c["message"]["content"] for c in answer["choices"]]


def test_every_choice_follows_the_form(llm: DiffusionGemma) -> None:
    form = {"type": "json_schema", "json_schema": {"schema": {"enum": ["Paris", "Rome"]}}}
    answer = llm.create_chat_completion(QUESTION, n=3, seed=1, response_format=form)
    for choice in answer["choices"]:
        assert choice["message"]["content"].strip() in ('"Paris"', '"Rome"')


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ([], ValueError),
        ([[]], TypeError),
        ([True, False], TypeError),
        ([1.5], TypeError),
        ([None], TypeError),
        (["a", 5], TypeError),
        ([["a"]], TypeError),
        (b"bytes", TypeError),
        ({"a": 1}, TypeError),
        (None, TypeError),
        (["a"] * 1025, ValueError),
    ],
)
def test_prompts_that_are_none(llm: DiffusionGemma, prompt: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="prompt") as found:
        llm(prompt, max_tokens=1)
    assert isinstance(found.value, dgemma.OptionError)
    assert found.value.param == "prompt"


@pytest.mark.parametrize(
    ("n", "message"), [(0, "at least 1"), (129, "at most 128"), ("2", "number")]
)
def test_numbers_of_choices(llm: DiffusionGemma, n: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"n .*{message}"):
        llm("a", max_tokens=1, n=n)


def test_cancelling_ends_all_choices(llm: DiffusionGemma) -> None:
    options: dict[str, Any] = {"confidence_threshold": 1e-30, "max_denoising_steps": 10_000}
    stream = llm.create_completion("a", n=3, max_tokens=4, stream=True, **options)
    choices = iter(llm.choices(["a"], n=3, **options))
    next(choices)
    llm.cancel()
    with pytest.raises(dgemma.CancelledError):
        for _ in choices:
            pass
    assert llm("a", max_tokens=1, seed=0)["choices"]
    del stream
