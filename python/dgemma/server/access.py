"""Who may ask, from what a command or a configuration says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def api_keys(given: Sequence[str] | None, path: str | None) -> list[str]:
    """The keys of the command line and of a file; ValueError where one of them is none.

    An empty key would open the server to everybody: `--api-key "$UNSET"` must not.
    """
    keys = list(given or [])
    if any(not key.strip() for key in keys):
        raise ValueError("--api-key is empty: give a key, or leave the option out for none")
    if path is not None:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise ValueError(f"--api-key-file {path} has no key: write one into it, one a line")
        keys += found
    return keys
