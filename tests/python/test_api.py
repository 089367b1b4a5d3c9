"""The Python API with the trained checkpoint: answers, streams, sessions, faults."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import dgemma
from dgemma import Commit, DiffusionGemma, Draft
from support.asking import PROSE, QUESTION, prompt_of

# ---- Answers -------------------------------------------------------------------------------------


def test_it_answers(llm: DiffusionGemma) -> None:
    result = llm.generate(prompt_of(llm, QUESTION), seed=1)
    assert "Paris" in result.text
    assert result.finish_reason == "stop"
    assert llm.tokenizer.decode(result.tokens) == result.text
    stats = result.stats
    assert stats.completion_tokens == len(result.tokens)
    assert stats.canvases == len(stats.steps) >= 1
    assert stats.timings["total_s"] > 0


def test_the_same_seed_gives_the_same_text(tiny_gguf: Path) -> None:
    texts = set()
    for n_threads in (1, 2, 1):
        with DiffusionGemma(tiny_gguf, n_ctx=256, n_threads=n_threads, seed=5) as model:
            texts.add(model.generate(PROSE, max_tokens=40).text)
    assert len(texts) == 1


def test_streams_say_what_generate_says(llm: DiffusionGemma) -> None:
    n_tokens = 2 * llm.info.canvas_length + 5
    whole = llm.generate(PROSE, max_tokens=n_tokens, seed=3)
    events = list(llm.stream(PROSE, max_tokens=n_tokens, seed=3))
    commits = [event for event in events if isinstance(event, Commit)]
    drafts = [event for event in events if isinstance(event, Draft)]
    assert "".join(commit.text for commit in commits) == whole.text
    assert [token for commit in commits for token in commit.tokens] == whole.tokens
    assert [commit.steps for commit in commits] == whole.stats.steps
    assert [commit.finish_reason for commit in commits[:-1]] == [None] * (len(commits) - 1)
    assert commits[-1].finish_reason == whole.finish_reason
    assert len(drafts) == sum(whole.stats.steps)
    for draft in drafts:
        assert len(draft.tokens) == len(draft.entropies) == llm.info.canvas_length
        assert draft.entropies.min() >= 0


def test_max_tokens_cuts_inside_a_canvas(llm: DiffusionGemma) -> None:
    whole = llm.generate(prompt_of(llm, QUESTION), seed=1)
    cut = llm.generate(prompt_of(llm, QUESTION), seed=1, max_tokens=2)
    assert cut.tokens == whole.tokens[:2]
    assert cut.finish_reason == "length"


def test_stop_strings(llm: DiffusionGemma) -> None:
    whole = llm.generate(prompt_of(llm, QUESTION), seed=1)
    middle = whole.text[3:6]
    cut = llm.generate(prompt_of(llm, QUESTION), seed=1, stop=["no such text", middle])
    assert cut.text == whole.text[: whole.text.find(middle)]
    assert cut.finish_reason == "stop"


def test_an_answer_ends_where_the_context_is_full(llm: DiffusionGemma) -> None:
    canvas = llm.info.canvas_length
    session = llm.session(n_ctx=4 * canvas)
    prompt = llm.tokenizer.encode(PROSE, add_bos=True)
    pinned = dict.fromkeys(range(4 * canvas), prompt[-1])  # no end token fits in
    result = llm.generate(prompt, session=session, seed=0, pinned=pinned)
    assert result.finish_reason == "length"
    assert result.stats.canvases == (4 * canvas - len(prompt)) // canvas


@pytest.mark.parametrize("beyond", [0, 1])
def test_a_prompt_that_just_fits_and_one_more(llm: DiffusionGemma, beyond: int) -> None:
    session = llm.session(n_ctx=128)
    prompt = [5] * (128 - llm.info.canvas_length + beyond)
    if beyond:
        with pytest.raises(dgemma.ContextLengthError, match="128"):
            llm.generate(prompt, session=session)
        assert session.n_past == 0
    else:
        result = llm.generate(prompt, session=session, seed=0)
        assert result.stats.canvases == 1


def test_a_prompt_of_one_token(llm: DiffusionGemma) -> None:
    assert llm.generate([llm.token_bos()], max_tokens=1, seed=0).stats.prompt_tokens == 1


def test_token_ids_outside_the_vocabulary(llm: DiffusionGemma) -> None:
    for id in (-1, llm.info.n_vocab, 2**40):
        with pytest.raises(ValueError, match=r"token|vocabulary"):
            llm.generate([id])
    with pytest.raises(TypeError, match="integers"):
        llm.default_session.prefill([0.5])  # type: ignore[list-item]


def test_tokenize_and_detokenize(llm: DiffusionGemma) -> None:
    ids = llm.tokenize(b"the old man")
    assert ids[0] == llm.token_bos()
    assert llm.detokenize(ids) == b"the old man"
    assert llm.tokenize(b"<|turn>", special=True)[1:] == [llm.tokenizer.id("<|turn>")]
    assert len(llm.tokenize(b"<|turn>", add_bos=False)) > 1


# ---- Pinned tokens -------------------------------------------------------------------------------


def test_pinned_tokens_stay(llm: DiffusionGemma) -> None:
    token = llm.tokenizer.encode("x")[0]
    pinned = {1: token, 5: token, llm.info.canvas_length + 2: token}
    seen = set()
    for event in llm.stream(PROSE, pinned=pinned, seed=1, max_tokens=2 * llm.info.canvas_length):
        if isinstance(event, Draft):
            first = event.canvas * llm.info.canvas_length
            for position in pinned:
                if 0 <= position - first < llm.info.canvas_length:
                    assert event.tokens[position - first] == token
                    seen.add(position)
    assert {1, 5} <= seen


def test_pinned_positions_are_checked(llm: DiffusionGemma) -> None:
    for pinned in ({-1: 5}, {0: llm.info.n_vocab}, {0: -1}):
        with pytest.raises(ValueError, match="pinned"):
            llm.generate(PROSE, pinned=pinned)


def test_infill_fills_the_gap(llm: DiffusionGemma) -> None:
    text = llm.infill("The old man ", " by the sea.", n_tokens=6, seed=1)
    assert len(llm.tokenizer.encode(text)) <= 6
    with pytest.raises(ValueError, match="n_tokens"):
        llm.infill("a", "b", n_tokens=llm.info.canvas_length)


def test_a_canvas_to_start_from(llm: DiffusionGemma) -> None:
    prompt = prompt_of(llm, QUESTION)
    answer = llm.generate(prompt, seed=1)
    again = llm.generate(prompt, seed=1, start=answer.tokens)
    assert again.text == answer.text
    assert again.stats.steps[0] <= answer.stats.steps[0]


# ---- The step itself -----------------------------------------------------------------------------


def test_a_step_by_hand_is_what_generate_does(fresh: DiffusionGemma) -> None:
    ids = fresh.encode_prompt(prompt_of(fresh, QUESTION))
    result = fresh.generate(ids, seed=9)
    with fresh.session() as session:
        assert session.prefill(ids) == len(ids) == session.n_past
        session.begin_canvas(seed=9)
        steps = [session.step()]
        while not steps[-1].done:
            steps.append(session.step())
        assert len(steps) == result.stats.steps[0]
        assert steps[-1].tokens[: len(result.tokens)].tolist() == result.tokens
        with pytest.raises(ValueError, match="canvas"):
            session.step()


def test_canvas_logits(fresh: DiffusionGemma) -> None:
    with fresh.session() as session:
        session.prefill([2, 5, 6])
        canvas = np.arange(fresh.info.canvas_length)
        logits = session.canvas_logits(canvas)
        assert logits.shape == (fresh.info.canvas_length, fresh.info.n_vocab)
        again = session.canvas_logits(canvas, self_conditioning_logits=logits / 0.8)
        assert not np.array_equal(logits, again)
        assert session.n_past == 3
        with pytest.raises(ValueError, match="shape"):
            session.canvas_logits(canvas, self_conditioning_logits=logits[1:])
        with pytest.raises(ValueError, match="canvas"):
            session.canvas_logits(canvas[1:])


def test_operations_are_counted(fresh: DiffusionGemma) -> None:
    fresh.generate(PROSE, max_tokens=1, seed=0)
    operations = fresh.default_session.operations()
    assert {"experts", "attention"} <= {o.name for o in operations}
    assert all(o.seconds >= 0 and o.calls > 0 for o in operations if o.flop)
    fresh.default_session.reset_operations()
    assert all(o.calls == 0 for o in fresh.default_session.operations())


# ---- Loading -------------------------------------------------------------------------------------


def test_loading_what_is_no_model(tmp_path: Path, tiny_gguf: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        DiffusionGemma(tmp_path / "nowhere.gguf")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_gguf.read_bytes()[:5000])
    with pytest.raises(dgemma.ModelFileError, match=r"cut\.gguf"):
        DiffusionGemma(cut)
    with pytest.raises(ValueError, match="backend"):
        DiffusionGemma(tiny_gguf, backend="tpu")
    with pytest.raises(ValueError, match="n_gpu_layers"):
        DiffusionGemma(tiny_gguf, n_gpu_layers="some")
    with pytest.raises(ValueError, match="type"):
        DiffusionGemma(tiny_gguf, type_k="q9_9")


def test_the_context_is_at_most_the_models(tiny_gguf: Path) -> None:
    with DiffusionGemma(tiny_gguf, n_ctx=10**6) as model:
        assert model.n_ctx() == model.info.context_length


def test_cache_types_change_memory(llm: DiffusionGemma) -> None:
    sizes = {kind: llm.memory(type_k=kind, type_v=kind).cache for kind in ("f32", "f16", "q8_0")}
    assert sizes["f32"] > sizes["f16"] > sizes["q8_0"] > 0


def test_the_file_in_memory_says_the_same(tiny_gguf: Path, llm: DiffusionGemma) -> None:
    expected = llm.generate(PROSE, max_tokens=8, seed=0).tokens
    with DiffusionGemma(tiny_gguf, n_ctx=512, use_mmap=False) as model:
        assert model.generate(PROSE, max_tokens=8, seed=0).tokens == expected


def test_info_is_plain_data(llm: DiffusionGemma) -> None:
    info = dataclasses.asdict(llm.info)
    assert info["canvas_length"] == llm.metadata["diffusion.canvas_length"]
    assert llm.token_eos() in info["end_tokens"]
    assert "general.architecture" in llm.metadata
