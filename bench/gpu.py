"""Builds the CUDA backend, tests it on this machine's GPU and measures it at full size.

    python bench/gpu.py [--type q4_0] [--folder build/gpu] [--budget 470]

Needs nvcc, CMake, a C compiler and Python with NumPy; neither the package nor the internet. The
full-size file is random (bench/random_gguf.py) and stays in --folder.

Writes bench/results/<device>-<date>.json after every stage, and a table beside it. A stage that
fails is recorded with the end of what it printed, and the next one begins; --budget seconds are
divided among them, so that a run ends in time whatever hangs. Stages: build, limits (copy and
matrix rates of this machine), agree (each type against the CPU, on small models), time (steps and
prompts at full size), contexts (the same behind more tokens, with a q8_0 cache, without overlapping
launches, with and without the kernels of compute capability 9.0), profile and nsight (each kernel,
by events and by Nsight Compute), types (other files), memcheck and racecheck (compute-sanitizer),
pytest. At the end it prints a block that can be pasted, with the ratio to the last earlier result
of the same device.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_more
import numpy as np
import random_gguf
from gpu_report import (
    HOPPER,
    commit,
    device_name,
    earlier_result,
    has_own_kernels,
    kernels,
    table,
    to_paste,
)

REPOSITORY = Path(__file__).resolve().parents[1]
STAGES = ("build", "limits", "agree", "time", "contexts", "profile", "nsight", "types",
          "memcheck", "racecheck", "pytest")  # fmt: skip
FULL_SIZE = {"time", "contexts", "profile", "nsight"}  # stages that need the file
FLOAT_TYPES = ("f32", "f16", "bf16")
# Relative error of logits. Floats differ in the order of sums; the others round activations to
# int8, where an exchanged expert moves single positions: the median leaves those out.
FLOAT_LIMIT, BLOCK_LIMIT = 2e-3, 5e-2


class StageError(Exception):
    """A stage that did not do what it should; its text goes to the report."""


class Run:
    """What the stages share: the folder, the report, and the time that is left."""

    def __init__(self, args: argparse.Namespace, results: Path) -> None:
        self.args = args
        self.folder: Path = args.folder.resolve()
        self.began = time.monotonic()
        device = args.device or device_name()
        name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        date = datetime.date.today().isoformat()
        self.target = results / f"{name}-{date}.json"
        self.found: dict[str, Any] = {
            "device": device, "date": date, "type": args.type, "preset": args.preset,
            "commit": commit(), "stages": {},
        }  # fmt: skip
        self.earlier = earlier_result(results, self.found)
        self.synthesis: subprocess.Popen[str] | None = None

    def left(self) -> float:
        """Seconds of the budget, at least one."""
        return max(self.args.budget - (time.monotonic() - self.began), 1.0)

    def save(self) -> None:
        """Writes the report as it stands: whole, or not at all."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        beside = self.target.with_suffix(".tmp")
        beside.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        beside.replace(self.target)
        self.target.with_suffix(".md").write_text(table(self.found), encoding="utf-8")

    def stage(self, name: str, work: Callable[[Run], Any]) -> None:
        """Runs one stage and records how it ended."""
        start = time.monotonic()
        entry: dict[str, Any] = {"ok": True}
        try:
            if self.args.budget - (start - self.began) < 2:
                raise StageError("no time was left")
            result = work(self)
            if result is not None:
                self.found[name] = result
        except Exception as error:  # whatever it is, the other stages shall run
            entry = {"ok": False, "error": f"{type(error).__name__}: {error}"[-4000:]}
        entry["seconds"] = round(time.monotonic() - start, 1)
        self.found["stages"][name] = entry
        print(f"{'ok    ' if entry['ok'] else 'FAILED'} {name} {entry['seconds']} s",
              file=sys.stderr)  # fmt: skip
        if not entry["ok"]:
            print(entry["error"][-800:], file=sys.stderr)
        self.save()

    def command(
        self, command: Sequence[str | Path], timeout: float = 1e9, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Output of a command that must succeed."""
        words = [str(word) for word in command]
        limit = min(timeout, self.left())
        try:
            done = subprocess.run(words, env={**os.environ, **env}, capture_output=True, text=True,
                                  timeout=limit)  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise StageError(f"{' '.join(words)[:200]}: stopped after {limit:.0f} s") from error
        if done.returncode != 0:
            said = (done.stdout + done.stderr)[-3000:]
            raise StageError(f"{' '.join(words)[:200]}: exit code {done.returncode}\n{said}")
        return done

    # Paths of what is built and made.

    @property
    def steps(self) -> Path:
        """The program that runs models."""
        return self.folder / "steps"

    @property
    def backend_file(self) -> Path:
        """libdgemma_cuda.so."""
        given: Path | None = self.args.cuda_file
        return given.resolve() if given else self.folder / "cmake/native/cuda/libdgemma_cuda.so"

    @property
    def has_hopper(self) -> bool:
        """Whether the library and the GPU have the kernels for compute capability 9.0: a library
        that was brought along is taken to, one that is built here only where they are asked for."""
        asked = os.environ.get(HOPPER) == "1" or self.args.cuda_file is not None
        return asked and has_own_kernels()

    @property
    def model(self) -> Path:
        """The full-size file."""
        return self.folder / f"{self.args.preset}-{self.args.type}.gguf"

    def run_steps(self, *arguments: str | Path, timeout: float = 1e9, **env: str) -> dict[str, Any]:
        """What bench/cuda/steps.c prints."""
        env = {"DGEMMA_CUDA_LIBRARY": str(self.backend_file), **env}
        found: dict[str, Any] = json.loads(
            self.command([self.steps, *arguments], timeout, **env).stdout
        )
        return found

    def begin_synthesis(self) -> None:
        """Starts to make the full-size file, unless it is there."""
        if self.model.exists() or self.args.stages.isdisjoint(FULL_SIZE):
            return
        part = self.model.with_suffix(".part")
        script = REPOSITORY / "bench" / "random_gguf.py"
        self.synthesis = subprocess.Popen(
            [sys.executable, str(script), "--preset", self.args.preset, "--type", self.args.type,
             "--outfile", str(part)], text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    def wait_for_model(self) -> None:
        """Waits until the full-size file is whole."""
        if self.synthesis is not None:
            process, self.synthesis = self.synthesis, None
            try:
                errors = process.communicate(timeout=self.left())[1]
            except subprocess.TimeoutExpired as error:
                process.kill()
                raise StageError("the full-size file was not finished in time") from error
            if process.returncode != 0:
                raise StageError(f"making the full-size file failed\n{errors[-2000:]}")
            self.model.with_suffix(".part").replace(self.model)
        if not self.model.exists():
            raise StageError(f"there is no {self.model}")


# ---- Stages --------------------------------------------------------------------------------------


def build(run: Run) -> None:
    """The engine, both libraries, and the two programs."""
    made = run.folder / "cmake"
    cuda = run.args.cuda_file is None
    options = ["-DDGEMMA_PYTHON=OFF", f"-DDGEMMA_CUDA={'ON' if cuda else 'OFF'}"]
    if cuda and run.has_hopper:  # many minutes of the compiler
        options += ["-DCMAKE_CUDA_ARCHITECTURES=90a-real"]
    if shutil.which("ninja"):
        options += ["-G", "Ninja"]
    run.command(["cmake", "-S", REPOSITORY, "-B", made, *options])
    targets = ["dgemma_engine"] + (["dgemma_cuda", "dgemma_cuda_timing"] if cuda else [])
    jobs = str(os.cpu_count() or 1)
    run.command(["cmake", "--build", made, "--parallel", jobs, "--target", *targets])
    source, include = REPOSITORY / "bench" / "cuda", REPOSITORY / "native" / "include"
    compiler = os.environ.get("CC") or shutil.which("cc") or "gcc"
    engine = made / "libdgemma_engine.a"
    run.command([compiler, "-O2", "-std=gnu11", "-I", include, source / "steps.c", engine,
                 "-o", run.steps, "-lpthread", "-lm", "-ldl"])  # fmt: skip
    if shutil.which("nvcc"):
        run.command(["nvcc", "-O3", "-std=c++17", "-arch=native", source / "limits.cu",
                     "-o", run.folder / "limits"])  # fmt: skip


def limits(run: Run) -> dict[str, Any]:
    """Rates of this machine."""
    found: dict[str, Any] = json.loads(run.command([run.folder / "limits"], timeout=60).stdout)
    return found


def agree(run: Run) -> dict[str, Any]:
    """Logits of small models in each type, on the GPU and on the CPU; where the GPU has kernels of
    its own, with those off and on."""
    found: dict[str, Any] = {}
    wrong = []
    switches = {"cuda": {HOPPER: "0"}, **({"hopper": {HOPPER: "1"}} if run.has_hopper else {})}
    for kind in run.args.types:
        path = run.folder / f"small-{kind}.gguf"
        random_gguf.write("small", kind, path, embedding=kind if kind != "nvfp4" else "q8_0")
        logits = {}
        for path_name, env in {"cpu": {}, **switches}.items():
            out = run.folder / f"small-{path_name}.f32"
            backend = "cpu" if path_name == "cpu" else "cuda"
            run.run_steps("answer", path, backend, out, "3", timeout=120, **env)
            shape = (-1, random_gguf.PRESETS["small"].vocab)
            logits[path_name] = np.fromfile(out, np.float32).reshape(shape)
        for path_name in switches:
            name = kind if path_name == "cuda" else f"{kind}, {path_name}"
            found[name] = entry = compare(logits[path_name], logits["cpu"])
            exact = kind in FLOAT_TYPES and path_name == "cuda"
            entry["ok"] = entry["error"] < (FLOAT_LIMIT if exact else BLOCK_LIMIT)
            if not entry["ok"]:
                wrong.append(f"{name}: {entry['error']:.3g}")
        run.found["agree"] = found
    if wrong:
        raise StageError(f"too far from the CPU: {', '.join(wrong)}")
    return found


def compare(actual: Any, expected: Any) -> dict[str, Any]:
    """Median over positions of the error of logits, as a share of their spread; and how often the
    most probable token is the same."""
    error = np.sqrt(np.square(actual - expected).mean(-1)) / expected.std(-1)
    same = (actual.argmax(-1) == expected.argmax(-1)).mean()
    median = float(np.median(error))
    return {
        "error": median if np.isfinite(median) else float("inf"),
        "largest_error": float(error.max()),
        "same_argmax": float(same),
    }


def measure_steps(run: Run) -> dict[str, Any]:
    """Steps and a prompt at full size."""
    run.wait_for_model()
    behind, steps = str(run.args.n_past), str(run.args.steps)
    found = run.run_steps("time", run.model, "cuda", behind, steps)
    times = found["step_ms"]
    found["step_ms"] = {"median": statistics.median(times), "min": min(times), "max": max(times)}
    found["file_bytes"] = run.model.stat().st_size
    bandwidth = run.found.get("limits", {}).get("copy_gb_per_s")
    if bandwidth:
        floor = found["file_bytes"] / bandwidth * 1e-6
        found["memory_floor_ms"] = round(floor, 3)
        found["times_memory_floor"] = round(found["step_ms"]["median"] / floor, 3)
    return found


# Tokens before the canvas, cache, prompt, environment. Contexts that do not fit are left out.
VARIANTS: tuple[tuple[int, str, int, dict[str, str]], ...] = (
    (0, "f16", 512, {}),
    (512, "f16", 512, {"DGEMMA_CUDA_OVERLAP": "0"}),
    (512, "f16", 512, {"DGEMMA_CUDA_HOPPER": "0"}),
    (512, "f16", 512, {"DGEMMA_CUDA_HOPPER": "1"}),
    (8192, "f16", 8192, {}),
    (8192, "q8_0", 512, {}),
    (32768, "f16", 512, {}),
    (131072, "f16", 512, {}),
)


def contexts(run: Run) -> list[dict[str, Any]]:
    """Steps behind more tokens, and longer prompts."""
    run.wait_for_model()
    found: list[dict[str, Any]] = []
    for n_past, cache, n_prompt, env in VARIANTS:
        if HOPPER in env and not run.has_hopper:
            continue
        entry: dict[str, Any] = {"n_past": n_past, "cache": cache, "n_prompt": n_prompt, **env}
        words = ("time", run.model, "cuda", str(n_past), "8", cache, str(n_prompt))
        try:
            timed = run.run_steps(*words, timeout=60, **env)
        except StageError as error:
            if "GPU" not in str(error):  # not a lack of memory
                raise
            entry["error"] = str(error)[-300:]
        else:
            entry["step_ms"] = statistics.median(timed["step_ms"])
            entry["prefill_tokens_per_s"] = timed["prefill_tokens_per_s"]
        found.append(entry)
        run.found["contexts"] = found
    return found


def profile(run: Run) -> list[dict[str, Any]]:
    """Time of each kernel in a step, by the library that measures its launches."""
    run.wait_for_model()
    out = run.folder / "launches.txt"
    out.unlink(missing_ok=True)
    library = run.backend_file.with_name("libdgemma_cuda_timing.so")
    arguments = ("profile", run.model, "cuda", str(run.args.n_past), str(run.args.steps))
    env = {"DGEMMA_CUDA_LIBRARY": str(library), "DGEMMA_CUDA_TIMING_FILE": str(out)}
    run.run_steps(*arguments, **env)
    return kernels(out.read_text(), run.args, run.found.get("limits", {}))


def sanitize(tool: str) -> Callable[[Run], None]:
    """compute-sanitizer over a step of small models: an integer, an FP4 and a float type."""

    def work(run: Run) -> None:
        sanitizer = shutil.which("compute-sanitizer")
        if sanitizer is None:
            raise StageError("compute-sanitizer is not on the PATH")
        for kind in ("q4_k", "nvfp4", "f16"):
            path = run.folder / f"small-{kind}.gguf"
            if not path.exists():
                random_gguf.write("small", kind, path)
            out = run.folder / "sanitized.f32"
            checked = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
            run.command([*checked, run.steps, "answer", path, "cuda", out, "2"], timeout=100,
                        DGEMMA_CUDA_LIBRARY=str(run.backend_file))  # fmt: skip

    return work


def pytest_stage(run: Run) -> str | None:
    """The tests of the CUDA backend, where the package and what they need is installed."""
    needed = "import pytest, transformers, gguf, dgemma._native"
    if subprocess.run([sys.executable, "-c", needed], capture_output=True, check=False).returncode:
        return "left out: the package and its test extra are not installed"
    tests = [REPOSITORY / "tests" / "cuda" / f"test_{part}.py" for part in ("cuda", "canvas")]
    run.command(
        [sys.executable, "-m", "pytest", "-q", *tests], DGEMMA_TEST_CUDA=str(run.backend_file)
    )
    return None


WORK: dict[str, Callable[[Run], Any]] = {
    "build": build,
    "limits": limits,
    "agree": agree,
    "time": measure_steps,
    "contexts": contexts,
    "profile": profile,
    "nsight": gpu_more.nsight,
    "types": gpu_more.types,
    "memcheck": sanitize("memcheck"),
    "racecheck": sanitize("racecheck"),
    "pytest": pytest_stage,
}


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = sorted(set(names) - set(known))
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected {' '.join(known)}")
        return names

    return parse


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("gpu.py", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "build" / "gpu")
    parser.add_argument("--type", choices=random_gguf.TYPES, default="q4_0", help="at full size")
    types = list(random_gguf.TYPES)
    parser.add_argument("--types", type=_names(types), default=types,
                        help="to compare with the CPU: a,b,…")  # fmt: skip
    parser.add_argument("--preset", choices=random_gguf.PRESETS, default="26b-a4b")
    parser.add_argument("--n-past", type=int, default=512, help="tokens before the canvas")
    parser.add_argument("--steps", type=int, default=20, help="to measure")
    parser.add_argument("--stages", type=_names(STAGES), default=list(STAGES))
    parser.add_argument("--budget", type=float, default=470, help="seconds for everything")
    parser.add_argument(
        "--library",
        dest="cuda_file",
        metavar="F",
        type=Path,
        help="use this libdgemma_cuda.so; build none",
    )
    parser.add_argument("--device", help="name in the report; default: nvidia-smi's")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "bench" / "results")
    args = parser.parse_args(words)
    if args.steps < 1 or args.n_past < 0 or args.budget <= 0:
        parser.error("--steps and --budget must be positive, --n-past not negative")
    args.stages = frozenset(args.stages)
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Runs the stages; 0 where all of them succeeded."""
    args = arguments(words)
    run = Run(args, args.results)
    run.folder.mkdir(parents=True, exist_ok=True)
    run.begin_synthesis()
    try:
        for name in STAGES:
            if name in args.stages:
                run.stage(name, WORK[name])
    finally:
        if run.synthesis is not None:
            run.synthesis.kill()
    print(table(run.found))
    print(f"---- to paste ----\n{to_paste(run.found, run.earlier)}\n------------------")
    print(f"wrote {run.target}")
    return 0 if all(entry["ok"] for entry in run.found["stages"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
