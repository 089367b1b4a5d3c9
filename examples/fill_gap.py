"""An editor that fills a gap in a file: the text around a marker stays, the marker is replaced.

python examples/fill_gap.py model.gguf letter.txt --tokens 12
"""

import argparse
from pathlib import Path

import dgemma

MARKER = "[...]"


def fill(llm: dgemma.DiffusionGemma, text: str, n_tokens: int, seed: int | None = None) -> str:
    """The text with its first marker replaced by up to `n_tokens` tokens that fit there."""
    before, marker, after = text.partition(MARKER)
    if not marker:
        raise SystemExit(f"there is no {MARKER} to fill")
    return before + llm.infill(before, after, n_tokens=n_tokens, seed=seed) + after


def main() -> None:
    """Fills the gap and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokens", type=int, default=16, help="size of the gap")
    parser.add_argument("--seed", type=int)
    args = parser.parse_args()
    with dgemma.DiffusionGemma(args.model) as llm:
        args.file.write_text(fill(llm, args.file.read_text(), args.tokens, args.seed))


if __name__ == "__main__":
    main()
