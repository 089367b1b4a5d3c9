"""What each type of file costs: divergence from float32, answers, size; which weights matter.

    python bench/outtypes.py                      # everything, some minutes; then the docs
    python bench/outtypes.py --rows q4_0 q4_k_m   # measures some rows again
    python bench/outtypes.py --parts tiny         # of all rows, one of: tiny random answers
    python bench/outtypes.py --docs-only          # writes the docs from the results as they are

Two models are measured. models/tiny is trained, but too narrow for most K-quants; the canvases are
stories that it continues, and it answers its held-out questions. The other one is wider and random,
with shapes that fit and do not fit blocks of 256 as those of the released model do; its canvases
are random too. Sizes are those of the released model. Results: bench/results/outtypes.json.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import dgemma
from dgemma.charts import Series, chart
from dgemma.evaluation import Case, Predictions, ask, read_questions, summarize
from dgemma.evaluation.calibration import gather
from dgemma.importance import save_importance
from dgemma_convert import convert
from dgemma_convert.policy import DEFAULT_MIX, MIXES
from dgemma_convert.requantize import foretell_file
from dgemma_convert.synth import preset_tensors

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "bench/results/outtypes.json"
DOCS = REPOSITORY / "docs"
TINY = REPOSITORY / "models/tiny"
PRESET = "26b-a4b"
PARTS = ("tiny", "random", "answers")

# Weights by what they do, as expressions for --tensor-type.
GROUPS = {
    "embedding and head": "token_embd",
    "self-conditioning": "self_cond",
    "attention q": r"attn_q\.",
    "attention k": r"attn_k\.",
    "attention v": r"attn_v\.",
    "attention output": "attn_output",
    "dense gate, up": r"ffn_(gate|up)\.weight",
    "dense down": r"ffn_down\.weight",
    "experts gate, up": "ffn_(gate_up|gate|up)_exps",
    "experts down": r"ffn_down_exps\.weight",
}


@dataclass(frozen=True)
class Row:
    """One file to measure: an outtype with exceptions, and whether an importance matrix is used."""

    outtype: str
    rules: tuple[str, ...] = ()
    imatrix: bool = False


WITH_IMATRIX = (DEFAULT_MIX, "q4_0", "q2_k")
ROWS = {
    **{name: Row(name) for name in MIXES if name not in ("auto", "f32")},
    **{f"{name} + imatrix": Row(name, imatrix=True) for name in WITH_IMATRIX},
    "iq4_xs, attention q8_0": Row("iq4_xs", ("attn_=q8_0",)),
    "iq4_xs, embedding q8_0": Row("iq4_xs", ("token_embd=q8_0",)),
    "iq4_xs, experts down q5_0": Row("iq4_xs", (r"ffn_down_exps\.weight=q5_0",)),
    **{f"only {name} in q4_0": Row("f32", (f"{rule}=q4_0",)) for name, rule in GROUPS.items()},
}


def parts_of(name: str) -> set[str]:
    """What a row is measured by."""
    parts = set(PARTS)
    if ROWS[name].imatrix:
        parts.remove("random")  # its activations are alike in all columns
    if name.startswith("only"):
        parts.remove("answers")  # too little changes for an answer to
    return parts


def full_bytes(row: Row) -> int:
    """Bytes of the released model's tensors in such a file."""
    return sum(step.tensor.n_bytes for step in preset_tensors(PRESET, row.outtype, row.rules))


def full_weights(rule: str) -> int:
    """How many weights of the released model an expression finds."""
    steps = preset_tensors(PRESET, "f32", (f"{rule}=q4_0",))
    return sum(step.tensor.n_bytes for step in steps if step.tensor.type.name == "Q4_0") * 32 // 18


# ---- The two models ------------------------------------------------------------------------------


def open_model(path: Path) -> dgemma.DiffusionGemma:
    return dgemma.DiffusionGemma(path, n_ctx=512, backend="cpu")


def story_cases(llm: dgemma.DiffusionGemma, tiny_data: Any, n: int = 240) -> list[Case]:
    """Stories cut after 8, 16 or 24 tokens: much is open there, and the text is the model's own."""
    rng, length = random.Random("outtypes"), llm.info.canvas_length
    cases: list[Case] = []
    while len(cases) < n:
        ids = llm.tokenizer.encode("<bos>" + tiny_data.story(rng))
        first = 8 * (1 + len(cases) % 3)
        if len(ids) >= first + length:
            canvas = np.array(ids[first : first + length], np.int32)
            cases.append(Case(ids[:first], canvas))
    return cases


def training_prompts(llm: dgemma.DiffusionGemma, tiny_data: Any, n: int = 60) -> list[list[int]]:
    """Dialogues and beginnings of stories as the training saw them, for the importance matrix."""
    rng = random.Random("importance")
    texts = [tiny_data.render(tiny_data.dialogue(rng)) for _ in range(n)]
    texts += ["<bos>" + tiny_data.story(rng)[:80] for _ in range(n)]
    return [ids for ids in map(llm.tokenizer.encode, texts) if len(ids) < 400]


def random_checkpoint(folder: Path) -> Path:
    """Rows of 512 and 1024 are whole blocks of 256; those of 352 and 224, as 2112 and 704, not.

    The final norm is weak: a random network mostly repeats its input, and is otherwise too sure of
    it for a divergence to be seen.
    """
    from support.checkpoints import Spec, make_checkpoint

    spec = Spec("wide", hidden=512, layers="sfsf", heads=8, head_dim=64, kv_heads=4,
                full_head_dim=128, full_kv_heads=1, mlp=352, experts=24, top_k=4, expert_mlp=224,
                window=64, canvas=32, vocab=2048, logit_gain=0.3, seed=11)  # fmt: skip
    return make_checkpoint(folder / "random", spec)


def random_cases(llm: dgemma.DiffusionGemma, n: int = 12) -> list[Case]:
    rng, info = np.random.default_rng(3), llm.info
    return [
        Case(
            rng.integers(0, info.n_vocab, 40).tolist(),
            rng.integers(0, info.n_vocab, info.canvas_length, dtype=np.int32),
        )
        for _ in range(n)
    ]


@dataclass(frozen=True)
class Judge:
    """A checkpoint, its importance matrix, and either predictions to match or questions."""

    source: Path
    folder: Path
    imatrix: Path | None = None
    predicted: Predictions | None = None
    questions: Path | None = None

    def measure(self, row: Row) -> dict[str, float]:
        path = self.folder / "measured.gguf"
        report = convert(
            self.source,
            path,
            row.outtype,
            tensor_types=row.rules,
            imatrix=self.imatrix if row.imatrix else None,
            force=True,
            progress=False,
        )
        with open_model(path) as llm:
            if self.predicted is not None:
                found = summarize(self.predicted.compare(llm))
            else:
                found = ask(llm, read_questions(self.questions))
                del found["kinds"]
        return {**found, "n_bytes": report.n_bytes}


@contextmanager
def judges() -> Iterator[dict[str, Judge]]:
    sys.path[:0] = [str(REPOSITORY / "models"), str(REPOSITORY / "tests")]
    import tiny_data

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        exact, imatrix = folder / "exact.gguf", folder / "imatrix.gguf"
        convert(TINY, exact, "f32", progress=False)
        with open_model(exact) as llm:
            prompts = training_prompts(llm, tiny_data)
            found = gather(llm, prompts)
            save_importance(
                imatrix,
                found.activations,
                dataset="training text",
                chunk_count=len(prompts),
                chunk_size=max(map(len, prompts)),
            )
            tiny = Predictions(llm, story_cases(llm, tiny_data))
            tiny.record(llm)
        source = random_checkpoint(folder)
        convert(source, exact, "f32", force=True, progress=False)
        with open_model(exact) as llm:
            wide = Predictions(llm, random_cases(llm))
            wide.record(llm)
        exact.unlink()
        with tiny, wide:
            yield {
                "tiny": Judge(TINY, folder, imatrix, predicted=tiny),
                "random": Judge(source, folder, predicted=wide),
                "answers": Judge(TINY, folder, imatrix, questions=TINY / "questions.jsonl"),
            }


# ---- Docs ----------------------------------------------------------------------------------------


def type_table(results: dict[str, Any]) -> list[str]:
    """All types, by size."""
    lines = [
        "| type | released model | divergence: tiny | random | tiny: same first choice | "
        "exact answers | steps per canvas |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    names = [name for name in ROWS if not name.startswith("only") and name in results]
    for name in sorted(names, key=lambda name: -full_bytes(ROWS[name])):
        tiny, wide = results[name]["tiny"], results[name].get("random")
        answers = results[name]["answers"]
        shown = f"**`{name}`**" if name == DEFAULT_MIX else f"`{name}`"
        on_random = f"{1e3 * wide['kl_mean']:.2f}" if wide else ""
        lines.append(
            f"| {shown} | {full_bytes(ROWS[name]) / 1e9:.1f} GB | {1e3 * tiny['kl_mean']:.2f} "
            f"| {on_random} "
            f"| {100 * tiny['same_first_choice']:.2f} % | {100 * answers['accuracy']:.1f} % "
            f"| {answers['steps_per_canvas']:.2f} |"
        )
    return lines


def group_table(results: dict[str, Any]) -> list[str]:
    """What each kind of weight adds when it alone is in Q4_0."""
    lines = [
        "| in Q4_0, the rest float32 | weights of the released model | divergence: tiny | random "
        "| tiny, per 10⁹ weights |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, rule in GROUPS.items():
        row, n = results[f"only {name} in q4_0"], full_weights(rule)
        tiny, wide = (1e3 * row[judge]["kl_mean"] for judge in ("tiny", "random"))
        lines.append(
            f"| {name} | {n / 1e6:,.0f} million | {tiny:.2f} | {wide:.2f} | {tiny * 1e9 / n:.3f} |"
        )
    return lines


def foretold(results: dict[str, Any]) -> list[str]:
    """Every mix as `quantize --target-size` foretells it from models/tiny, and as measured."""
    lines = [
        "| type | foretold | measured | tiny | random |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        exact = Path(folder) / "exact.gguf"
        convert(TINY, exact, "f32", progress=False)
        for name in measured_mixes(results):
            tiny, wide = (results[name][judge]["kl_mean"] for judge in ("tiny", "random"))
            found.append(
                (foretell_file(exact, name), float(np.sqrt(tiny * wide)), tiny, wide, name)
            )
    for *values, name in sorted(found):
        lines.append(f"| `{name}` | {' | '.join(f'{1e3 * value:.2f}' for value in values)} |")
    return lines


def measured_mixes(results: dict[str, Any]) -> list[str]:
    """The mixes of blocks: what 16-bit floats lose is not foretold."""
    return [name for name in MIXES if name in results and name not in ("f32", "f16", "bf16")]


def size_plot(results: dict[str, Any]) -> str:
    names = [name for name in MIXES if name in results and full_bytes(ROWS[name]) < 3e10]
    return chart(
        "Size and divergence of each type",
        "size of the released model in GB",
        "divergence from float32 in nats: models/tiny, and a wider random model",
        [
            Series(
                judge,
                [(full_bytes(ROWS[name]) / 1e9, results[name][judge]["kl_mean"]) for name in names],
                names,
            )
            for judge in ("tiny", "random")
        ],
    )


def write_docs(results: dict[str, Any]) -> None:
    """Replaces the tables of docs/mixes.md, and the plot."""
    page = DOCS / "mixes.md"
    text = page.read_text(encoding="utf-8")
    for mark, lines in (
        ("types", type_table(results)),
        ("groups", group_table(results)),
        ("foretold", foretold(results)),
    ):
        begin, end = f"<!-- {mark}: written by bench/outtypes.py -->\n", f"<!-- end {mark} -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise SystemExit(f"{page} lacks the marks around the table of {mark}")
        text = before + begin + "\n".join(lines) + "\n" + end + after
    page.write_text(text, encoding="utf-8")
    (DOCS / "mixes.svg").write_text(size_plot(results), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="default: all")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--list", action="store_true", help="print the rows' names")
    parser.add_argument("--docs-only", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if args.list:
        print("\n".join(ROWS))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not args.docs_only:
        with judges() as measured:
            for name in args.rows or ROWS:
                for part in args.parts:
                    if part not in parts_of(name):
                        continue
                    found = measured[part].measure(ROWS[name])
                    results.setdefault(name, {})[part] = found
                    print(name, part, found, flush=True)
                    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    missing = [name for name in ROWS if not parts_of(name) <= results.get(name, {}).keys()]
    if missing:
        print(f"docs/mixes.md stays as it is: not measured yet: {', '.join(missing)}")
    else:
        write_docs(results)


if __name__ == "__main__":
    main()
