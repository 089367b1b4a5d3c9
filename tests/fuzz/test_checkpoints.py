"""Damaged checkpoint folders: each is refused in one line, or becomes a file that runs.

`python tests/fuzz/fuzz_checkpoints.py --cases 500` tries more of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from support.damage import try_damaged

CASES = 40


def test_damaged_folders(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    found = try_damaged(checkpoint("small"), tmp_path, CASES, seed=1)
    print(f"{found.cases} damaged checkpoints: {found.refused} refused, the others converted")
    assert not found.faults, "\n".join(found.faults)
    assert found.refused > CASES / 4
