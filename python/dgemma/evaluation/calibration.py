"""Gathers the activations of real use: prompts are encoded, and canvases denoised behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..model import DiffusionGemma
from ..values import Activations


@dataclass(frozen=True)
class Calibration:
    """What was gathered, and from how much."""

    activations: dict[str, Activations]  # by the tensor's name
    n_chunks: int
    prompt_tokens: int
    canvases: int
    steps: int


def text_chunks(llm: DiffusionGemma, text: str, size: int) -> list[list[int]]:
    """The text as prompts of `size` tokens, each with the begin token where the model has one.

    What is left at the end is a prompt of its own unless it is shorter than half of the others.
    """
    begin = [llm.token_bos()] if llm.tokenizer.add_bos else []
    if size <= len(begin):
        raise ValueError(f"prompts of {size} tokens: expected at least {len(begin) + 1}")
    tokens, step = llm.tokenizer.encode(text, special=False), size - len(begin)
    pieces = [tokens[i : i + step] for i in range(0, len(tokens), step)]
    if len(pieces) > 1 and 2 * len(pieces[-1]) < step:
        pieces.pop()
    return [begin + piece for piece in pieces]


def chat_prompts(llm: DiffusionGemma, text: str) -> list[list[int]]:
    """A prompt for each line of the text that is not empty: it is what a user says first."""
    lines = [line for line in text.splitlines() if line.strip()]
    rendered = (llm.chat_template.render([{"role": "user", "content": line}]) for line in lines)
    return [llm.encode_prompt(prompt) for prompt in rendered]


def gather(
    llm: DiffusionGemma,
    prompts: Sequence[Sequence[int]],
    *,
    canvases: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], object] = lambda done, steps: None,
) -> Calibration:
    """Encodes each prompt and denoises up to `canvases` canvases behind it, as an answer would be.

    So every denoising step counts, from pure noise to the settled canvas, with its own
    self-conditioning, and so does encoding the canvas where another one follows. An answer that
    ends is not continued. `progress(done, steps)` is called after every prompt with the number of
    prompts done and of denoising steps since the beginning. Depends on nothing but its arguments.
    """
    ends = frozenset(llm.info.end_tokens)
    n_tokens = n_canvases = n_steps = 0
    with llm.session() as session:
        session.start_collecting()
        for index, prompt in enumerate(prompts):
            session.truncate(0)
            session.prefill(prompt)
            n_tokens += len(prompt)
            for canvas in range(canvases):
                if session.n_past + llm.info.canvas_length > session.n_ctx:
                    break
                session.begin_canvas(seed=seed + index, canvas=canvas)
                step = session.step()
                while not step.done:
                    step = session.step()
                n_canvases += 1
                n_steps += step.step
                if canvas + 1 == canvases or not ends.isdisjoint(step.tokens.tolist()):
                    break
                if session.n_past + 2 * llm.info.canvas_length > session.n_ctx:
                    break
                session.prefill(step.tokens)
            progress(index + 1, n_steps)
        return Calibration(session.collected(), len(prompts), n_tokens, n_canvases, n_steps)
