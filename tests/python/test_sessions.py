"""Sessions with the trained checkpoint: what they keep, whose turn it is, how they end."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dgemma
from dgemma import Commit, DiffusionGemma
from support.asking import PROSE, QUESTION, prompt_of, unending

# ---- Conversations -------------------------------------------------------------------------------


def test_a_second_turn_encodes_only_what_is_new(fresh: DiffusionGemma) -> None:
    first = prompt_of(fresh, "What is the capital of Italy?")
    answer = fresh.generate(first, seed=0)
    assert answer.stats.cached_tokens == 0
    ids = fresh.encode_prompt(first)
    n_cached = fresh.default_session.n_past
    tokens = fresh.default_session.tokens.tolist()
    assert tokens[: len(ids)] == ids
    second = [*tokens, *fresh.tokenizer.encode("<turn|>\n<|turn>user\nAnd of Spain?<turn|>\n")]
    result = fresh.generate(second, seed=0)
    assert result.stats.cached_tokens == n_cached
    with fresh.session() as other:
        assert fresh.generate(second, seed=0, session=other).tokens == result.tokens


def test_going_back_in_a_conversation(fresh: DiffusionGemma) -> None:
    long = fresh.encode_prompt("The old man and the sea and the old man")
    short = fresh.encode_prompt("The old man and the hill")
    n_common = next(i for i, (a, b) in enumerate(zip(long, short, strict=False)) if a != b)
    fresh.generate(long, max_tokens=1, seed=0)
    result = fresh.generate(short, max_tokens=20, seed=0)
    assert result.stats.cached_tokens == n_common > 1
    with fresh.session() as other:
        again = fresh.generate(short, max_tokens=20, seed=0, session=other)
    assert again.tokens == result.tokens


def test_a_session_is_saved_and_loaded(fresh: DiffusionGemma, tmp_path: Path) -> None:
    path = tmp_path / "session"
    prompt = fresh.encode_prompt(prompt_of(fresh, QUESTION))
    fresh.generate(prompt, seed=0)
    fresh.save(path)
    expected = fresh.default_session.tokens
    with fresh.session() as other:
        other.load(path)
        np.testing.assert_array_equal(other.tokens, expected)
        result = fresh.generate(prompt, seed=0, session=other)
    assert result.stats.cached_tokens == len(prompt)
    assert result.tokens == fresh.generate(prompt, seed=0).tokens
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(dgemma.Error):
        fresh.load(path)
    with pytest.raises(OSError, match="nowhere"):
        fresh.load(tmp_path / "nowhere")


def test_two_sessions_at_once_say_what_they_say_alone(llm: DiffusionGemma) -> None:
    prompts = [prompt_of(llm, QUESTION), PROSE]
    alone = [llm.generate(p, seed=4, max_tokens=64).tokens for p in prompts]
    together: dict[int, list[int]] = {}

    def work(i: int) -> None:
        with llm.session() as session:
            together[i] = llm.generate(prompts[i], seed=4, max_tokens=64, session=session).tokens

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(2)] == alone


def test_threads_take_turns_with_one_session(llm: DiffusionGemma) -> None:
    prompts = [prompt_of(llm, QUESTION), PROSE] * 2
    expected = [llm.generate(p, seed=4, max_tokens=32).text for p in prompts]
    found: dict[int, str] = {}

    def work(i: int) -> None:
        found[i] = llm.generate(prompts[i], seed=4, max_tokens=32).text

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(prompts))] == expected


def test_a_stream_left_half_read_does_not_stop_the_next_answer(llm: DiffusionGemma) -> None:
    expected = llm.generate(PROSE, max_tokens=8, seed=0).text
    stream = llm.stream(PROSE, seed=0)
    next(stream)
    assert llm.generate(PROSE, max_tokens=8, seed=0).text == expected
    with pytest.raises(dgemma.CancelledError, match="left half-read"):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert llm.generate(PROSE, max_tokens=1, seed=0).tokens


@pytest.mark.parametrize("ending", ["thread", "idle", "cycle"])
def test_a_stream_that_another_thread_left_does_not_either(
    llm: DiffusionGemma, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "dgemma.generation.turns.FORGOTTEN_SECONDS", 0.2 if ending == "idle" else 1e9
    )
    left: list[Any] = []
    begun, over = threading.Event(), threading.Event()

    def work() -> None:
        stream = llm.stream(PROSE, seed=0)
        next(stream)
        if ending == "cycle":
            holder: list[Any] = [stream]
            holder.append(holder)
            del stream, holder
        else:
            left.append(stream)
        begun.set()
        if ending != "thread":
            over.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait(60)
    if ending == "thread":
        thread.join()
    assert llm.generate(PROSE, max_tokens=1, seed=0).tokens
    over.set()
    thread.join()


def test_a_stream_that_is_read_keeps_its_session(llm: DiffusionGemma) -> None:
    expected = [llm.generate(p, seed=2, max_tokens=70).text for p in (PROSE, QUESTION)]
    stream, found = llm.stream(PROSE, seed=2, max_tokens=70), []
    first = next(stream)
    other = threading.Thread(
        target=lambda: found.append(llm.generate(QUESTION, seed=2, max_tokens=70).text)
    )
    other.start()
    texts = [e.text for e in (first, *stream) if isinstance(e, Commit)]
    other.join()
    assert ["".join(texts), *found] == expected


# ---- Ends: cancel, close, collect ----------------------------------------------------------------


def test_cancel_from_another_thread(fresh: DiffusionGemma) -> None:
    stream = fresh.stream(PROSE, seed=0, **unending())
    next(stream)
    threading.Timer(0.1, fresh.cancel).start()
    with pytest.raises(dgemma.CancelledError):
        for _ in stream:
            pass
    assert fresh.generate(PROSE, max_tokens=4, seed=0).tokens  # still usable


def test_a_late_cancel_does_not_hit_the_next_answer(fresh: DiffusionGemma) -> None:
    fresh.generate(PROSE, max_tokens=1, seed=0)
    fresh.cancel()
    assert fresh.generate(PROSE, max_tokens=1, seed=0).tokens


def test_close_during_an_answer(tiny_gguf: Path) -> None:
    model = DiffusionGemma(tiny_gguf, n_ctx=256)
    stream = model.stream(PROSE, seed=0, **unending())
    next(stream)
    threading.Timer(0.1, model.close).start()
    with pytest.raises(dgemma.Error):
        for _ in stream:
            pass
    model.close()
    with pytest.raises(dgemma.Error, match="closed"):
        model.generate(PROSE)


def test_close_twice_and_use_after(tiny_gguf: Path) -> None:
    model = DiffusionGemma(tiny_gguf, n_ctx=256)
    session = model.session()
    model.close()
    model.close()
    for use in (lambda: model.session(), lambda: session.n_past, lambda: session.step()):
        with pytest.raises(dgemma.Error, match="closed"):
            use()
    session.cancel()
    session.close()


def test_a_dropped_stream_and_model_are_collected(tiny_gguf: Path) -> None:
    for _ in range(5):
        model = DiffusionGemma(tiny_gguf, n_ctx=256)
        stream = model.stream(PROSE, seed=0)
        next(stream)
        del model, stream
        gc.collect()


def test_views_outlive_the_file(tiny_gguf: Path) -> None:
    file = dgemma.File(tiny_gguf)
    tensor = file.tensor("output_norm.weight")
    expected = tensor.data.copy()
    file.close()
    gc.collect()
    np.testing.assert_array_equal(tensor.data, expected)
    assert not tensor.data.flags.writeable
    with pytest.raises(dgemma.Error, match="closed"):
        file.tensor("output_norm.weight")
