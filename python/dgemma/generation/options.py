"""What a request may ask for, checked: what a canvas model cannot do is refused, never ignored."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..generation.structured import Form
from ..values import Ids, Recorded, Sampling

MAX_STOPS = 32

# Options of other runtimes: the values that change nothing, and why others are refused.
_ONE_TOKEN = "it picks one token at a time, and a canvas is denoised as a whole"
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "top_p": ((1, 1.0), _ONE_TOKEN),
    "top_k": ((0, -1), _ONE_TOKEN),
    "min_p": ((0, 0.0), _ONE_TOKEN),
    "typical_p": ((1, 1.0), _ONE_TOKEN),
    "tfs_z": ((1, 1.0), _ONE_TOKEN),
    "mirostat_mode": ((0,), _ONE_TOKEN),
    "mirostat_tau": ((5, 5.0), _ONE_TOKEN),
    "mirostat_eta": ((0.1,), _ONE_TOKEN),
    "presence_penalty": ((0, 0.0), _ONE_TOKEN),
    "frequency_penalty": ((0, 0.0), _ONE_TOKEN),
    "repeat_penalty": ((1, 1.0), _ONE_TOKEN),
    "logits_processor": ((), _ONE_TOKEN),
    "stopping_criteria": ((), "use `stop`, or leave the loop over `stream`"),
    "logit_bias": (({},), _ONE_TOKEN),
    "logprobs": ((False,), "a settled canvas has no probability per token in order"),
    "top_logprobs": ((0,), "a settled canvas has no probability per token in order"),
    "grammar": ((), "ask for JSON with `response_format`, which is checked and repaired"),
    "n": ((1,), "ask once for each answer, with another seed"),
    "best_of": ((1,), "ask once for each answer, with another seed"),
    "functions": (([],), "use `tools`"),
    "function_call": (("none",), "use `tool_choice`"),
}


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
    noise: Recorded | None = None
    pinned: Mapping[int, int] = field(default_factory=dict)
    start: Ids = ()
    form: Form | None = None


def make_options(
    model: Sampling,
    *,
    max_tokens: int | None = None,
    seed: int | None = None,
    stop: str | Iterable[str] | None = None,
    noise: Recorded | None = None,
    pinned: Mapping[int, int] | None = None,
    start: Ids | None = None,
    form: Form | None = None,
    temperature: float | None = None,
    **others: Any,
) -> Options:
    """Options from the arguments of a request; `model` holds the sampling that is the default.

    `temperature` scales t_min and t_max together; 1 is the model's own. The fields of `Sampling`
    may be given by their names. Errors: TypeError, ValueError.
    """
    given = {name: others.pop(name) for name in list(others) if name in Sampling.__annotations__}
    refuse(others)
    return Options(
        sampling=_sampling(model, given, temperature),
        seed=_seed(seed),
        max_tokens=_max_tokens(max_tokens),
        stop=_stop(stop),
        noise=noise,
        pinned=dict(pinned or {}),
        start=() if start is None else start,
        form=form,
    )


def refuse(options: Mapping[str, Any]) -> None:
    """Raises for options that have no meaning here; None and neutral values pass."""
    for name, value in options.items():
        if name not in _REFUSED:
            raise TypeError(f"unknown option {name!r}")
        neutral, reason = _REFUSED[name]
        if value is not None and not any(value == n and type(value) is type(n) for n in neutral):
            raise ValueError(f"{name} is not supported: {reason}")


def _sampling(model: Sampling, given: dict[str, Any], temperature: float | None) -> Sampling:
    kinds = {"max_denoising_steps": int, "stability_threshold": int}
    for name, value in list(given.items()):
        if value is None:
            del given[name]
            continue
        whole = name in kinds
        _number(name, value, whole=whole)
        lowest_allowed = name == "stability_threshold"
        if value < 0 or (value == 0 and not lowest_allowed):
            raise ValueError(f"{name} is {value}: expected a number above 0")
    sampling = dataclasses.replace(model, **given)
    if temperature is not None:
        _number("temperature", temperature)
        if not 0 < temperature <= 10:
            raise ValueError(
                f"temperature is {temperature}: expected more than 0 and at most 10; it scales "
                "t_min and t_max, and 1 is the model's own"
            )
        sampling = dataclasses.replace(
            sampling, t_min=sampling.t_min * temperature, t_max=sampling.t_max * temperature
        )
    if sampling.t_min > sampling.t_max:
        raise ValueError(f"t_min {sampling.t_min} is above t_max {sampling.t_max}")
    if sampling.max_denoising_steps > 10_000:
        raise ValueError("max_denoising_steps must be at most 10000")
    if sampling.stability_threshold > 64:
        raise ValueError("stability_threshold must be at most 64")
    return sampling


def _number(name: str, value: Any, *, whole: bool = False) -> None:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        wanted = "a whole number" if whole else "a number"
        raise TypeError(f"{name} must be {wanted}, not {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}: expected a finite number")


def _seed(seed: int | None) -> int:
    if seed is None or seed == -1:  # -1, as other runtimes spell "any"
        return secrets.randbits(32)
    _number("seed", seed, whole=True)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed {seed} does not fit 64 bits")
    return seed


def _max_tokens(max_tokens: int | None) -> int | None:
    if max_tokens is None or max_tokens == -1:  # -1, as other runtimes spell "no limit"
        return None
    _number("max_tokens", max_tokens, whole=True)
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}: expected at least 1, or None for no limit")
    return max_tokens


def _stop(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if not all(isinstance(text, str) for text in stops):
        raise TypeError("stop must be a text or a list of texts")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"stop has {len(stops)} texts: at most {MAX_STOPS} are allowed")
    return tuple(text for text in stops if text)
