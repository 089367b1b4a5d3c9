"""An editor that fills a gap in a file: the text around a marker stays, the marker is replaced.

python examples/fill_gap.py model.gguf letter.txt --tokens 12 --tries 3

With several tries it shows each and asks which to take; with one it writes at once.
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


def choose(tries: list[str]) -> str | None:
    """The try that the user takes, or None."""
    for number, text in enumerate(tries, 1):
        print(f"--- {number}\n{text}")
    taken = input("Number to keep, or nothing to leave the file alone: ").strip()
    return tries[int(taken) - 1] if taken.isdigit() and 1 <= int(taken) <= len(tries) else None


def main() -> None:
    """Fills the gap and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokens", type=int, default=16, help="size of the gap")
    parser.add_argument("--tries", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the first try")
    args = parser.parse_args()
    text = args.file.read_text(encoding="utf-8")
    with dgemma.DiffusionGemma(args.model) as llm:
        tries = [fill(llm, text, args.tokens, args.seed + n) for n in range(args.tries)]
    taken = tries[0] if len(tries) == 1 else choose(tries)
    if taken is not None:
        args.file.write_text(taken, encoding="utf-8")


if __name__ == "__main__":
    main()
