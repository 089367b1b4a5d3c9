"""Canvas after canvas: options, the answer as it settles, and forms that it must have."""

from .generate import Answer, Commit, Draft, Generated, Stats
from .options import Options, make_options

__all__ = ["Answer", "Commit", "Draft", "Generated", "Options", "Stats", "make_options"]
