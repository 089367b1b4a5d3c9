"""Converts randomly damaged checkpoint folders; prints what became of them.

    python tests/fuzz/fuzz_checkpoints.py [--cases 500] [--seed 0] [--source models/tiny]

Exit code 1, and a line for each, where a conversion ended in another error than its own, left a
file behind, or wrote one that does not open.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from support.damage import try_damaged  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--source", type=Path, default=ROOT / "models" / "tiny")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = try_damaged(args.source, Path(folder), args.cases, args.seed)
    print(
        f"{found.cases} damaged checkpoints: {found.refused} refused, {found.converted} converted, "
        f"{len(found.faults)} faults"
    )
    for kind, (refused, converted) in sorted(found.kinds.items()):
        print(f"  {kind:<24} {refused:>4} refused {converted:>4} converted")
    for fault in found.faults:
        print(fault)
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
