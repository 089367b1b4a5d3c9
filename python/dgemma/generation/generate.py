"""One answer: canvas after canvas is denoised, cut, and encoded for the next one to build on."""

from __future__ import annotations

import time
from collections.abc import Generator

import numpy as np

from .._native import Session, token_ids
from ..errors import ContextLengthError, OptionValueError, ResponseFormatError
from ..tokenizer import Tokenizer
from ..values import CanvasStep, IdArray, Ids, ModelInfo
from .cut import Cutter
from .events import Commit, Draft, Generated, Stats
from .options import Options
from .structured import MAX_REPAIRS
from .turns import in_turn

_REPAIR_SEED = 0x9E3779B97F4A7C15  # other draws for every attempt at a canvas, modulo 2**64


def check_length(n_tokens: int, canvas: int, n_ctx: int, *, at_least: bool = False) -> None:
    """Raises ContextLengthError where a prompt and a canvas do not fit the context.

    `at_least`: the prompt was not encoded, and has so many tokens or more.
    """
    if n_tokens + canvas <= n_ctx:
        return
    raise ContextLengthError(
        f"this model's maximum context length is {n_ctx} tokens: the prompt has "
        f"{'at least ' if at_least else ''}{n_tokens}, and a canvas of {canvas} must fit behind "
        "it. Shorten the prompt or load with a larger n_ctx",
        n_prompt_tokens=n_tokens,
        n_ctx=n_ctx,
    )


class Answer:
    """One answer, made while it is iterated over; `result` is complete when that is over.

    Iterating raises ContextLengthError where prompt and canvas do not fit, and CancelledError when
    the session is cancelled or closed; the session stays usable after the former.
    """

    def __init__(
        self,
        session: Session,
        info: ModelInfo,
        tokenizer: Tokenizer,
        prompt: Ids,
        options: Options,
    ) -> None:
        self._session, self._info, self._tokenizer = session, info, tokenizer
        self._prompt, self._options = token_ids(prompt), options
        self._cut = Cutter(tokenizer, info.end_tokens, options)
        self._text: list[str] = []
        self._finish = "length"
        self.stats = Stats(prompt_tokens=len(prompt), seed=options.seed)
        self._check()

    def _check(self) -> None:
        check_length(len(self._prompt), self._info.canvas_length, self._session.n_ctx)
        for position, token in self._options.pinned.items():
            if position < 0 or not 0 <= token < self._info.n_vocab:
                raise OptionValueError(
                    f"pinned {{{position}: {token}}}: no such position or token", param="pinned"
                )

    def use(self, session: Session) -> None:
        """Makes the answer in another session, of the same model; before it is begun."""
        self._session = session
        self._check()

    @property
    def prompt(self) -> list[int]:
        """Token ids of the prompt."""
        return list(map(int, self._prompt))

    @property
    def result(self) -> Generated:
        """The answer as far as it has come."""
        return Generated("".join(self._text), self._cut.tokens, self._finish, self.stats)

    def __iter__(self) -> Generator[Draft | Commit, None, None]:
        return in_turn(self._session, self.events())

    def events(self) -> Generator[Draft | Commit, None, None]:
        """Makes the answer, for a caller whose turn it is with the session."""
        began = time.perf_counter()
        self._encode_prompt()
        encoded = time.perf_counter()
        try:
            yield from self._canvases()
        finally:
            self._count_time(began, encoded)

    def _count_time(self, began: float, encoded: float) -> None:
        stats, end = self.stats, time.perf_counter()
        stats.completion_tokens = len(self._cut.tokens)
        stats.stopped_by = self._cut.stopped_by
        spent, steps = end - encoded, sum(stats.steps)
        stats.timings = {
            "prompt_s": encoded - began,
            "generation_s": spent,
            "total_s": end - began,
            "tokens_per_s": stats.completion_tokens / spent if spent > 0 else 0.0,
            "step_ms": 1e3 * spent / steps if steps else 0.0,
        }

    def _encode_prompt(self) -> None:
        """Encodes what the cache does not hold already."""
        prompt, past = self._prompt, self._session.tokens
        n = min(len(past), len(prompt))
        differs = np.nonzero(past[:n] != prompt[:n])[0]
        n_common = int(differs[0]) if len(differs) else n
        n_past = len(past) if n_common == len(past) else self._session.truncate(n_common)
        if n_past < len(prompt):
            self._session.prefill(prompt[n_past:])
        self.stats.cached_tokens = n_past

    def _canvases(self) -> Generator[Draft | Commit, None, None]:
        length = self._info.canvas_length
        n_past = len(self._prompt)
        canvas = 0
        while True:
            tokens, n_steps = yield from self._denoise(canvas)
            n_before = len(self._cut.tokens)
            text, reason = self._cut.add(tokens.tolist())
            # Going on needs room for this canvas and for the next one.
            if reason is None and n_past + 2 * length > self._session.n_ctx:
                text, reason = text + self._cut.finish(), "length"
            self._text.append(text)
            self.stats.canvases += 1
            self.stats.steps.append(n_steps)
            if reason is not None:
                self._finish = reason
            yield Commit(canvas, self._cut.tokens[n_before:], text, n_steps, reason)
            if reason is not None:
                return
            self._session.prefill(tokens)
            n_past += length
            canvas += 1

    def _denoise(self, canvas: int) -> Generator[Draft, None, tuple[IdArray, int]]:
        """Denoises a canvas until it settles and follows the form; its tokens and step count."""
        pinned = self._pinned(canvas * self._info.canvas_length)
        n_steps = 0
        for repair in range(MAX_REPAIRS + 1):
            self._begin(canvas, repair, pinned)
            while True:
                step = self._session.step()
                yield self._draft(canvas, n_steps + step.step, step)
                if step.done:
                    break
            n_steps += step.step
            if self._follows_form(step.tokens, pinned):
                return step.tokens, n_steps
            self.stats.repairs += 1
        if self._give_up():
            return step.tokens, n_steps
        raise ResponseFormatError(
            f"after {MAX_REPAIRS} repairs the answer still does not follow the form asked for: "
            "ask for a simpler form, describe it in the prompt, or try another seed"
        )

    def _follows_form(self, tokens: IdArray, pinned: IdArray) -> bool:
        """Whether a settled canvas follows the form; if not, pins more of it for another attempt.

        Where the answer is complete, an end token is put behind it.
        """
        form, ends, limit = self._options.form, self._info.end_tokens, self._options.max_tokens
        if form is None:
            return True
        n_used = len(tokens) if limit is None else min(len(tokens), limit - len(self._cut.tokens))
        used = tokens[:n_used].tolist()
        verdict = form.check(used, self._tokenizer, ends)
        at, kept = verdict.n_valid, used[: verdict.n_valid]
        if not verdict.broken:
            if verdict.complete:
                tokens[at] = ends[0]
            form.take(kept, self._tokenizer)
            return True
        logits = self._session.canvas_logits(tokens)[at]
        chosen = form.most_probable(kept, logits, self._tokenizer, ends)
        if chosen is None or pinned[at] >= 0:
            if self._give_up():
                return True
            raise ResponseFormatError(
                f"position {at} of the canvas cannot follow the form asked for"
                + (": its token is pinned" if pinned[at] >= 0 else "")
            )
        pinned[: at + 1] = [*kept, chosen]
        return False

    def _give_up(self) -> bool:
        """Whether the answer may stand without its form; if so, it is not asked for any more."""
        form = self._options.form
        if form is None or form.binding:
            return False
        form.give_up()
        return True

    def _begin(self, canvas: int, repair: int, pinned: IdArray) -> None:
        options, length = self._options, self._info.canvas_length
        noise = None
        if options.noise is not None and not repair:
            if canvas >= len(options.noise.canvases):
                raise OptionValueError(
                    f"the replayed draws end before canvas {canvas}", param="noise"
                )
            noise = options.noise.canvases[canvas]
        self._session.begin_canvas(
            options.sampling,
            seed=options.seed + repair * _REPAIR_SEED,
            canvas=canvas,
            start=self._start(canvas * length),
            pinned=pinned if (pinned >= 0).any() else None,
            noise=noise,
        )

    def _pinned(self, first: int) -> IdArray:
        pinned = np.full(self._info.canvas_length, -1, np.int32)
        for position, token in self._options.pinned.items():
            if 0 <= position - first < len(pinned):
                pinned[position - first] = token
        return pinned

    def _start(self, first: int) -> IdArray | None:
        given = np.asarray(self._options.start, np.int32)[first:][: self._info.canvas_length]
        if not len(given):
            return None
        # The tokens given are fewer than a canvas: the end token is what would follow them.
        start = np.full(self._info.canvas_length, self._info.end_tokens[0], np.int32)
        start[: len(given)] = given
        return start

    def _draft(self, canvas: int, n_steps: int, step: CanvasStep) -> Draft:
        tokens, ends = step.tokens.tolist(), self._info.end_tokens
        end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        return Draft(
            canvas=canvas,
            step=n_steps,
            tokens=tokens,
            text=self._tokenizer.decode(tokens[:end]),
            entropies=step.entropies,
            mean_entropy=step.mean_entropy,
            n_accepted=step.n_accepted,
            settled=step.settled,
            end=end,
        )


__all__ = ["Answer", "Commit", "Draft", "Generated", "Stats"]
