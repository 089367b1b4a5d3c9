"""Several answers in one turn: the choices of a request, and those of several prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence

from .._native import Session
from ..tokenizer import Tokenizer
from ..values import Ids, ModelInfo
from .events import Commit, Draft, Generated
from .generate import Answer
from .options import Options
from .turns import in_turn


class Choices:
    """`n` answers to each of several prompts, made one after the other while it is iterated over.

    Choice i of a prompt is what a request with the seed `seed + i` gets. A prompt is encoded once:
    its later choices take back what an earlier one has put behind it, as far as the session can
    (its `n_rewind` tokens).
    """

    def __init__(
        self,
        session: Session,
        info: ModelInfo,
        tokenizer: Tokenizer,
        prompts: Sequence[Ids],
        options: Options,
        n: int = 1,
    ) -> None:
        self._session = session
        self.answers = [
            Answer(session, info, tokenizer, prompt, _choice(options, i))
            for prompt in prompts
            for i in range(n)
        ]

    def use(self, session: Session) -> None:
        """Makes the answers in another session, of the same model; before they are begun."""
        self._session = session
        for answer in self.answers:
            answer.use(session)

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids of each answer's prompt."""
        return [answer.prompt for answer in self.answers]

    @property
    def results(self) -> list[Generated]:
        """The answers as far as they have come."""
        return [answer.result for answer in self.answers]

    def __iter__(self) -> Generator[tuple[int, Draft | Commit], None, None]:
        """The index of an answer, and what it gives next."""
        return in_turn(self._session, self._events())

    def _events(self) -> Generator[tuple[int, Draft | Commit], None, None]:
        for index, answer in enumerate(self.answers):
            for event in answer.events():
                yield index, event


def _choice(options: Options, index: int) -> Options:
    form = None if options.form is None else options.form.copy()
    return dataclasses.replace(options, seed=options.seed + index, form=form)
