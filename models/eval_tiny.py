"""Measure how many held-out questions `models/tiny` answers exactly, with transformers itself.

    python models/eval_tiny.py models/tiny --questions 60
    python models/eval_tiny.py models/tiny --questions 60 --write models/tiny/questions.jsonl

The second writes the questions down, for `dgemma eval`.

An answer counts when its whole text, thought and end token included, is the expected one. The
weights are evaluated in float32, and with `--q4_0` after a round trip of all matrices through
the 4-bit type that `make demo` converts to.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import gguf
import tiny_data as data
import torch
from gguf import GGMLQuantizationType
from tqdm import tqdm
from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion

CANVAS = 32


def questions(n: int) -> list[tuple[str, str, str]]:
    """(kind, prompt, expected text), `n` of each kind, all held out."""
    found = []
    for kind in data.KINDS:
        for made in data.examination(kind, n):
            found.append((kind, data.render(made), made.target))
    for kind in ("capital", "add", "sort"):
        for made in data.examination(kind, n // 3, seed=2):
            made.thinking = True
            found.append(("thinking", data.render(made), made.target))
    rng = random.Random("prose")
    for _ in range(n):
        # from the fifth sentence on, a story says nothing that is not settled before
        parts = data.story(rng).split(". ")
        rest = " " + ". ".join(parts[4:])
        found.append(("prose", "<bos>" + ". ".join(parts[:4]) + ".", rest + "<eos>"))
    return found


def quantize(model: Any) -> None:
    """Round every matrix that a Q4_0 file holds in four bits, in place."""
    for name, weight in model.model.decoder.named_parameters():
        if "_proj" in name or "embed_tokens" in name:
            rows = weight.detach().numpy()
            packed = gguf.quants.quantize(rows, GGMLQuantizationType.Q4_0)
            back = gguf.quants.dequantize(packed, GGMLQuantizationType.Q4_0)
            with torch.no_grad():
                weight.copy_(torch.from_numpy(back.reshape(rows.shape)))


def main() -> None:
    """Print a table: kind, questions, exact answers, denoising steps per canvas."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--questions", type=int, default=60, help="of each kind")
    parser.add_argument("--q4_0", action="store_true", help="quantize the matrices first")
    parser.add_argument("--wrong", type=int, default=0, help="show so many wrong answers per kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", metavar="F", type=Path, help="only write the questions to F")
    arguments = parser.parse_args()
    if arguments.write is not None:
        rows = [
            json.dumps({"kind": kind, "prompt": prompt, "answer": answer})
            for kind, prompt, answer in questions(arguments.questions)
        ]
        arguments.write.write_text("\n".join(rows) + "\n", encoding="utf-8")
        return

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    if arguments.q4_0:
        quantize(model)
    ends = set(model.generation_config.eos_token_id)
    # batches of equal prompt length, so that no padding is involved
    groups: dict[tuple[str, int], list[tuple[list[int], str]]] = defaultdict(list)
    for kind, prompt, target in questions(arguments.questions):
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        groups[kind, len(ids)].append((ids, target))
    asked: dict[str, int] = defaultdict(int)
    exact: dict[str, int] = defaultdict(int)
    steps: dict[str, float] = defaultdict(float)
    canvases: dict[str, int] = defaultdict(int)
    shown: dict[str, int] = defaultdict(int)
    torch.manual_seed(arguments.seed)
    began = time.monotonic()
    for (kind, length), group in tqdm(groups.items(), mininterval=5):
        prompt_ids = torch.tensor([ids for ids, _ in group])
        out = model.generate(prompt_ids, max_new_tokens=5 * CANVAS)
        for i, (_, target) in enumerate(group):
            new = out.sequences[i, length:].tolist()
            valid = sum(t != data.PAD for t in new)
            end = next((k for k, t in enumerate(new) if t in ends), len(new) - 1) + 1
            text = tokenizer.decode(new[:end])
            asked[kind] += 1
            exact[kind] += text == target
            canvases[kind] += -(-end // CANVAS)
            steps[kind] += valid / float(out.tokens_per_forward[i]) if valid else 0.0
            if text != target and shown[kind] < arguments.wrong:
                shown[kind] += 1
                tqdm.write(f"{kind}: {text!r} for {target!r}")
    print("| kind | questions | exact | steps per canvas | canvases per answer |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in [*asked, "all"]:
        total, right, canvas, step = (
            sum(d.values()) if name == "all" else d[name] for d in (asked, exact, canvases, steps)
        )
        print(
            f"| {name} | {total} | {100 * right / total:.1f} % | {step / canvas:.1f} "
            f"| {canvas / total:.1f} |"
        )
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
