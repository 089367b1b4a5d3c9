"""Canvas after canvas: options, the answer as it settles, and forms that it must have."""

from .choices import Choices
from .events import Commit, Draft, Generated, Stats
from .generate import Answer
from .options import Options, make_options

__all__ = [
    "Answer",
    "Choices",
    "Commit",
    "Draft",
    "Generated",
    "Options",
    "Stats",
    "make_options",
]
