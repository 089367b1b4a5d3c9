"""Every option of an answer, declared once: its type, its bounds, what it means.

The TypedDicts are what editors and type checkers see (`**options: Unpack[GenerationOptions]`). What
is annotated to them is read by the checks, the command line and the server: `declared` lists it.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, TypedDict, Union, get_args, get_origin, get_type_hints

from .._native import MAX_DENOISING_STEPS, MAX_STABILITY_THRESHOLD, Session
from ..errors import OptionTypeError, OptionValueError
from ..values import Ids, ReplayedDraws

MAX_TEMPERATURE = 10.0
MAX_STOPS = 32
MAX_CHOICES = 128


@dataclass(frozen=True)
class Option:
    """What is annotated to an option's type: a sentence for help pages, and bounds for numbers.

    `low` is allowed, `above` is not; `absent` are values by which other programs say "not given".
    """

    help: str
    low: float | None = None
    above: float | None = None
    high: float | None = None
    absent: tuple[int, ...] = ()
    metavar: str = "N"


class SamplingOptions(TypedDict, total=False):
    """The fields of `Sampling`, one by one; what is left out is the model's own."""

    max_denoising_steps: Annotated[
        int | None, Option("denoising steps of a canvas, at most", low=1, high=MAX_DENOISING_STEPS)
    ]
    t_min: Annotated[float | None, Option("temperature of the last step", above=0, metavar="X")]
    t_max: Annotated[float | None, Option("temperature of the first step", above=0, metavar="X")]
    entropy_bound: Annotated[
        float | None,
        Option(
            "entropy in nats that tokens accepted in one step may add up to", above=0, metavar="X"
        ),
    ]
    stability_threshold: Annotated[
        int | None,
        Option(
            "steps for which a settled draft stayed the same", low=0, high=MAX_STABILITY_THRESHOLD
        ),
    ]
    confidence_threshold: Annotated[
        float | None,
        Option("mean entropy in nats below which a draft has settled", above=0, metavar="X"),
    ]


class RequestOptions(SamplingOptions, total=False):
    """What a request of any kind may say about its answer."""

    max_tokens: Annotated[
        int | None,
        Option(
            "tokens of the answer, at most (default: until the model ends)", low=1, absent=(-1,)
        ),
    ]
    seed: Annotated[
        int | None,
        Option("default: another one each time", low=-(2**63), high=2**64 - 1, absent=(-1,)),
    ]
    stop: Annotated[
        str | Sequence[str] | None, Option("text at which the answer ends", metavar="TEXT")
    ]
    temperature: Annotated[
        float | None,
        Option(
            "scales t_min and t_max; 1 is the model's own, 0 the lowest there is",
            low=0,
            high=MAX_TEMPERATURE,
            metavar="X",
        ),
    ]


class GenerationOptions(RequestOptions, total=False):
    """The options of `generate`, `stream` and `answer`.

    `noise` replays draws made elsewhere. `pinned` holds token ids by their position in the answer,
    which stay as they are; `start` are token ids that denoising starts from. `session`: another
    one than the model's own. `strict`: options without effect are errors.
    """

    noise: ReplayedDraws | None
    pinned: Mapping[int, int] | None
    start: Ids | None
    session: Session | None
    strict: bool | None


@dataclass(frozen=True)
class Declared:
    """An option as it was declared: its name, int or float or whatever it is, and the rest."""

    name: str
    kind: Any
    option: Option

    def check(self, value: Any) -> Any:
        """The value as it is meant; None where it stands for nothing. OptionError otherwise."""
        if value is None:
            return None
        if self.kind not in (int, float):
            return value
        number = _number(self.name, value, self.kind)
        if number in self.option.absent:
            return None
        if not self._allows(number):
            raise OptionValueError(
                f"{self.name} is {shown(value)}: expected {self.range_text()}", param=self.name
            )
        return number

    def _allows(self, number: float) -> bool:
        o = self.option
        return (
            (o.low is None or number >= o.low)
            and (o.above is None or number > o.above)
            and (o.high is None or number <= o.high)
        )

    def range_text(self) -> str:
        """The bounds in words."""
        o = self.option
        parts = [
            f"at least {o.low:.17g}" if o.low is not None else "",
            f"more than {o.above:.17g}" if o.above is not None else "",
            f"at most {o.high:.17g}" if o.high is not None else "",
        ]
        kind = "a whole number" if self.kind is int else "a number"
        return f"{kind}, {' and '.join(filter(None, parts))}"


def shown(value: Any) -> str:
    """A value as errors show it: not at any length, and no number of thousands of digits."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write such numbers
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}…"


@functools.cache
def declared(kind: type[Any]) -> dict[str, Declared]:
    """The options of a TypedDict that have an `Option`, by their names."""
    return {
        name: Declared(name, _meant(get_args(hint)[0]), get_args(hint)[1])
        for name, hint in get_type_hints(kind, include_extras=True).items()
        if get_origin(hint) is Annotated and isinstance(get_args(hint)[1], Option)
    }


def names(kind: type[Any]) -> frozenset[str]:
    """The names of all options of a TypedDict."""
    return frozenset(get_type_hints(kind))


def _meant(hint: Any) -> Any:
    """The type that a hint such as `int | None` means; the hint itself where it is several."""
    if get_origin(hint) in (Union, UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else hint
    return hint


def _number(name: str, value: Any, kind: type[Any]) -> int | float:
    """A number that is meant as int or float: 3.0 is a whole number, True is none."""
    wanted = "a whole number" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise OptionTypeError(f"{name} must be {wanted}, not {shown(value)}", param=name)
    if isinstance(value, numbers.Integral):
        whole = int(value)
        if kind is int or abs(whole) < 2**63:
            return whole if kind is int else float(whole)
        raise OptionValueError(f"{name} is {shown(value)}: too large", param=name)
    number = float(value)
    if not math.isfinite(number):
        raise OptionValueError(f"{name} is {number}: expected a finite number", param=name)
    if kind is int and not number.is_integer():
        raise OptionTypeError(f"{name} must be {wanted}, not {shown(value)}", param=name)
    return int(number) if kind is int else number
