"""Ctrl-C at any moment of any command, from the first instruction of Python on.

    python tests/fuzz/interrupts.py [--each 28] [--seed 1]

A real SIGINT to a real process. Right is the code 130 and not a word of Python's on standard error;
or 0 where the command was done before, and for `serve`, which ends as it should. What it was
writing is whole or not there.
"""

# ruff: noqa: E501  # a table reads better in its lines

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from dgemma.opening import check_file

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "models" / "tiny"
PROGRAM = [sys.executable, "-c", "import sys, dgemma.cli; sys.exit(dgemma.cli.main())"]
SLOW = ["--confidence-threshold", "1e-30", "--max-denoising-steps", "20000"]
COMMANDS = {
    "generate": ["generate", "-m", "{model}", "-p", "x", "-t", "1", *SLOW],
    "eval": [
        "eval",
        "-m",
        "{model}",
        "--questions",
        str(TINY / "questions.jsonl"),
        "-t",
        "1",
        "--no-progress",
    ],
    "serve": ["serve", "-m", "{model}", "--port", "0", "-t", "1"],
    "batch": [
        "batch",
        "-m",
        "{model}",
        "{folder}/batch.jsonl",
        "-o",
        "{folder}/answers.jsonl",
        "-t",
        "1",
    ],
    "convert": [
        "convert",
        str(TINY),
        "--outfile",
        "{folder}/out.gguf",
        "--outtype",
        "iq3_s",
        "-t",
        "1",
    ],
    "quantize": [
        "quantize",
        "{model}",
        "{folder}/out.gguf",
        "iq2_xs",
        "-t",
        "1",
        "--allow-requantize",
    ],
    "imatrix": [
        "imatrix",
        "-m",
        "{model}",
        "-f",
        "{folder}/text.txt",
        "-o",
        "{folder}/out.dat",
        "-t",
        "1",
    ],
    "bench": ["bench", "-m", "{model}", "-t", "1", "--steps", "500"],
}


def interrupted(name: str, model: Path, folder: Path, delay: float) -> tuple[str, str]:
    """How a command ended that is interrupted `delay` seconds after its start; and what is wrong."""
    given = [
        a.replace("{model}", str(model)).replace("{folder}", str(folder)) for a in COMMANDS[name]
    ]
    process = subprocess.Popen(
        [*PROGRAM, *given], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    try:
        _, said = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        return "stayed", "it went on for two minutes"
    code = process.returncode
    begun = "/dgemma/" in said.replace("/dgemma/__init__.py", "")
    if not begun and (code == -signal.SIGINT or "Fatal Python error: init_" in said):
        return "before dgemma", ""  # Python itself was not ready yet
    if code not in (130, 0):
        return str(code), said[-1500:]
    if "Traceback" in said or "KeyboardInterrupt" in said:
        return str(code), said[-1500:]
    for path in folder.glob("out.*"):
        if path.suffix == ".gguf":
            check_file(path)
    return str(code), ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--each", type=int, default=28)
    parser.add_argument("--longest", type=float, default=4, help="seconds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("commands", nargs="*", default=list(COMMANDS))
    args = parser.parse_args()
    draw = random.Random(args.seed)
    n_faults = 0
    with tempfile.TemporaryDirectory() as made:
        model = Path(made) / "tiny.gguf"
        subprocess.run(
            [*PROGRAM, "convert", str(TINY), "--outfile", str(model), "--outtype", "q8_0"],
            check=True,
            capture_output=True,
        )
        for name in args.commands:
            ended: Counter[str] = Counter()
            for number in range(args.each):
                folder = Path(made) / "work"
                folder.mkdir()
                (folder / "text.txt").write_text("The old boat by the sea. " * 20_000)
                line = '{"custom_id":"%d","method":"POST","url":"/v1/completions","body":{"prompt":"x","max_tokens":64}}\n'
                (folder / "batch.jsonl").write_text("".join(line % i for i in range(2000)))
                # Half of them early, while packages are imported.
                delay = draw.random() * (0.6 if number % 2 else args.longest)
                code, problem = interrupted(name, model, folder, delay)
                ended[code] += 1
                if problem:
                    n_faults += 1
                    print(f"{name} after {delay:.3f} s: {code}: {problem}", flush=True)
                shutil.rmtree(folder)
            print(f"{name}: {args.each} interrupted: {dict(ended)}", flush=True)
    print(f"{n_faults} faults")
    return 1 if n_faults else 0


if __name__ == "__main__":
    sys.exit(main())
