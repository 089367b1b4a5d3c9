"""Uses every public function as an editor would complete it; mypy --strict says whether it may."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import dgemma
from dgemma import Commit, Draft


def everything(path: Path) -> None:
    """Is never run."""
    llm: dgemma.DiffusionGemma = dgemma.DiffusionGemma(
        path, n_ctx=2048, n_batch=256, n_threads=2, n_gpu_layers=-1, n_cpu_moe=0, backend="cpu",
        type_k="q8_0", type_v=None, use_mmap=True, seed=1, strict=True, verbose=False,
        flash_attn=True, chat_format=None, rope_freq_base=0.0, tensor_split=[0.5, 0.5],
    )  # fmt: skip
    out: dgemma.Generated = llm.generate(
        "The old man", max_tokens=8, seed=1, stop=["x"], temperature=0, max_denoising_steps=10,
        t_min=0.4, t_max=0.8, entropy_bound=0.1, stability_threshold=1, confidence_threshold=0.005,
        pinned={0: 5}, start=[1, 2], noise=None, session=llm.session(n_ctx=512, n_rewind=0),
        top_p=0.9, top_k=40, min_p=0.1, repeat_penalty=1.1, logit_bias={5: 1.0}, strict=False,
    )  # fmt: skip
    text: str = out.text
    tokens: list[int] = out.tokens
    steps: list[int] = out.stats.steps
    for event in llm.stream([2, 5, 6], max_tokens=8, stop="x"):
        if isinstance(event, Draft):
            entropy: float = event.mean_entropy
        else:
            commit: Commit = event
    whole = llm.create_completion("a", max_tokens=4, n=2, echo=True, suffix=None, model="m")
    number: int = whole["usage"]["total_tokens"]
    lists = llm(["a", "b"], max_tokens=4, stream_options={"include_usage": True})
    chunks: Iterator[dict[str, object]] = llm.create_completion("a", stream=True, seed=3)
    messages = [{"role": "user", "content": "x"}]
    answer = llm.create_chat_completion(
        messages, tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="auto",
        response_format={"type": "json_object"}, enable_thinking=True, max_completion_tokens=5,
        presence_penalty=0.1, frequency_penalty=0.1, logprobs=None,
    )  # fmt: skip
    content: object = answer["choices"][0]["message"]["content"]
    deltas: Iterator[dict[str, object]] = llm.create_chat_completion(messages, stream=True)
    gap: str = llm.infill("a", "b", n_tokens=4, seed=1)
    ids: list[int] = llm.tokenize(b"x", add_bos=False, special=True)
    data: bytes = llm.detokenize(ids)
    state: bytes = llm.save_state()
    llm.load_state(state)
    memory: int = llm.memory(n_ctx=4096, type_k="f16").cache
    with dgemma.File(path) as file:
        names: list[str] = [tensor.name for tensor in file.tensors]
    llm.close()
    print(text, tokens, steps, entropy, commit, number, lists, chunks, content, deltas, gap)
    print(data, memory, names)
