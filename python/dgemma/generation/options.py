"""How one answer is made: the options of a request, checked against what they were declared as."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import OptionTypeError, OptionValueError
from ..generation.structured import Form
from ..values import Ids, ReplayedDraws, Sampling
from .declared import MAX_STOPS, RequestOptions, declared

FLOOR = 0.01
"""What t_min and t_max are multiplied by at temperature 0."""


@dataclass(frozen=True)
class Options:
    """How one answer is made.

    `max_tokens` None: until the model ends, or the context is full. `pinned`: token ids by their
    position in the answer, which stay fixed through denoising. `start`: token ids that the
    denoising starts from, in place of random ones. Both go beyond what the model was trained for.
    `form`: what the answer must look like.
    """

    sampling: Sampling
    seed: int
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    noise: ReplayedDraws | None = None
    pinned: Mapping[int, int] = field(default_factory=dict)
    start: Ids = ()
    form: Form | None = None


def make_options(
    model: Sampling,
    *,
    stop: str | Iterable[str] | None = None,
    noise: ReplayedDraws | None = None,
    pinned: Mapping[int, int] | None = None,
    start: Ids | None = None,
    form: Form | None = None,
    **others: Any,
) -> Options:
    """Options from the arguments of a request (`declared.RequestOptions`).

    `model` holds the sampling that is the default. None is as good as absent. Errors:
    OptionTypeError and OptionValueError, which name the argument.
    """
    numbers = _numbers(others)
    temperature = numbers.pop("temperature", None)
    seed = numbers.pop("seed", None)
    max_tokens = numbers.pop("max_tokens", None)
    if seed is None:
        # At temperature 0 the same request gives the same answer, whoever sends it.
        seed = 0 if temperature == 0 else secrets.randbits(32)
    return Options(
        sampling=_sampling(model, numbers, temperature),
        seed=seed,
        max_tokens=max_tokens,
        stop=_stop(stop),
        noise=noise,
        pinned=dict(pinned or {}),
        start=() if start is None else start,
        form=form,
    )


def _numbers(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are there, checked."""
    known, found = declared(RequestOptions), {}
    for name, value in given.items():
        if name not in known:
            raise OptionTypeError(f"unknown option {name!r}", param=name, code="unknown_parameter")
        meant = known[name].check(value)
        if meant is not None:
            found[name] = meant
    return found


def _sampling(model: Sampling, given: dict[str, Any], temperature: float | None) -> Sampling:
    sampling = dataclasses.replace(model, **given)
    if temperature is not None:
        scale = max(temperature, FLOOR)
        sampling = dataclasses.replace(
            sampling, t_min=sampling.t_min * scale, t_max=sampling.t_max * scale
        )
    if sampling.t_min > sampling.t_max:
        raise OptionValueError(
            f"t_min {sampling.t_min} is above t_max {sampling.t_max}", param="t_min"
        )
    return sampling


def _stop(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    if stop is not None and not isinstance(stop, Iterable):
        raise OptionTypeError("stop must be a text or a list of texts", param="stop")
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if not all(isinstance(text, str) for text in stops):
        raise OptionTypeError("stop must be a text or a list of texts", param="stop")
    if len(stops) > MAX_STOPS:
        raise OptionValueError(
            f"stop has {len(stops)} texts: at most {MAX_STOPS} are allowed", param="stop"
        )
    return tuple(text for text in stops if text)
