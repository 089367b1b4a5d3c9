"""Builds the CUDA backend, tests it on this machine's GPU and measures it at full size.

    python bench/gpu.py [--folder build/gpu] [--type q4_0]

Writes bench/results/<device>-<date>.json: the outcome of every stage, and the output of
`dgemma bench` at full size beside a measured copy bandwidth. Needs nvcc, CMake, and a Python with
the package's dependencies (NumPy, cffi, …); the tests also need pytest and the test extra, and are
recorded as skipped without them. The full-size file (about 14 GB, random weights) is made in
`--folder` and stays there.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
COPY_BYTES = 4 << 30
COPY_ROUNDS = 20


def run(command: list[str], env: dict[str, str], timeout: float = 3600) -> dict[str, Any]:
    """Runs a stage; its outcome, time and the end of what it printed."""
    start = time.monotonic()
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
        code, output, errors = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired:
        code, output, errors = 124, "", f"stopped after {timeout:.0f} s"
    print(f"{'ok    ' if code == 0 else 'FAILED'} {' '.join(command)[:100]}", file=sys.stderr)
    seconds = round(time.monotonic() - start, 1)
    return {"command": command, "ok": code == 0, "seconds": seconds, "output": output,
            "errors": errors[-4000:]}  # fmt: skip


def device_name() -> str:
    """The first GPU, or an exit with the reason why there is none."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"gpu.py: no NVIDIA GPU on this machine ({error})") from error
    return listed.stdout.splitlines()[0].strip()


def build(folder: Path, env: dict[str, str]) -> tuple[list[dict[str, Any]], Path]:
    """Compiles the extension and the backend; the stages, and a folder to import dgemma from."""
    made, package = folder / "cmake", folder / "package"
    stages = [
        run(["cmake", "-S", str(REPOSITORY), "-B", str(made), "-DDGEMMA_PYTHON=ON",
             "-DDGEMMA_CUDA=ON", f"-DPython_EXECUTABLE={sys.executable}"], env),
        run(["cmake", "--build", str(made), "--parallel"], env),
    ]  # fmt: skip
    if not all(stage["ok"] for stage in stages):
        raise SystemExit("gpu.py: the build failed\n" + stages[-1]["output"][-3000:])
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(REPOSITORY / "python" / "dgemma", package / "dgemma",
                    ignore=shutil.ignore_patterns("*.so"))  # fmt: skip
    shutil.copytree(REPOSITORY / "convert" / "dgemma_convert", package / "dgemma_convert")
    for name in ("_dgemma*.so", "libdgemma_cuda.so"):
        for path in made.rglob(name):
            shutil.copy(path, package / "dgemma")
    return stages, package


def copy_bandwidth(env: dict[str, str]) -> float | None:
    """GB/s read plus written by device-to-device copies far larger than the caches."""
    nvcc = shutil.which("nvcc")
    root = Path(nvcc).resolve().parents[1] if nvcc else Path("/usr/local/cuda")
    found = next(iter(sorted(root.rglob("libcudart.so*"))), None)
    if found is None:
        return None
    cuda = ctypes.CDLL(str(found))
    pointers = [ctypes.c_void_p(), ctypes.c_void_p()]
    for pointer in pointers:
        if cuda.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(COPY_BYTES)) != 0:
            return None
    best = 0.0
    for _ in range(3):
        cuda.cudaDeviceSynchronize()
        start = time.perf_counter()
        for _ in range(COPY_ROUNDS):
            cuda.cudaMemcpyAsync(pointers[0], pointers[1], ctypes.c_size_t(COPY_BYTES), 3, None)
        cuda.cudaDeviceSynchronize()
        best = max(best, 2 * COPY_BYTES * COPY_ROUNDS / (time.perf_counter() - start) / 1e9)
    for pointer in pointers:
        cuda.cudaFree(pointer)
    return round(best, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "build" / "gpu")
    parser.add_argument("--type", default="q4_0", help="of the full-size weights")
    args = parser.parse_args()
    device = device_name()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    stages, package = build(folder, dict(os.environ))
    library = package / "dgemma" / "libdgemma_cuda.so"
    env = {**os.environ, "PYTHONPATH": str(package), "DGEMMA_TEST_CUDA": str(library)}
    dgemma = [sys.executable, "-c", "import sys; from dgemma.cli import main; sys.exit(main())"]

    found: dict[str, Any] = {"device": device, "date": datetime.date.today().isoformat()}
    found["copy_gb_per_s"] = copy_bandwidth(env)
    if importlib.util.find_spec("pytest") and importlib.util.find_spec("transformers"):
        tests = [sys.executable, "-m", "pytest", "-q", str(REPOSITORY / "tests" / "test_cuda.py")]
        stages.append(run(tests, env))
        sanitizer = shutil.which("compute-sanitizer")
        for tool in ("memcheck", "racecheck") if sanitizer else ():
            checked = [str(sanitizer), "--tool", tool, "--error-exitcode", "9", *tests]
            stages.append(run([*checked, "-k", "small"], env))
    else:
        found["tests"] = "skipped: pytest and transformers are not installed"

    model = folder / f"26b-a4b-{args.type}.gguf"
    if not model.exists():
        stages.append(run([*dgemma, "synth", "--preset", "26b-a4b", "--type", args.type,
                           "--outfile", str(model)], env))  # fmt: skip
    measured = run([*dgemma, "bench", "-m", str(model), "--backend", "cuda", "--json"], env)
    stages.append(measured)
    if measured["ok"]:
        found["bench"] = json.loads(measured["output"])
        step = found["bench"]["step_ms"]["median"]
        bandwidth = found["copy_gb_per_s"]
        print(f"{device}: {step:.2f} ms a step", end="")
        if bandwidth:
            floor = model.stat().st_size / bandwidth / 1e6
            found["memory_floor_ms"] = round(floor, 2)
            print(f", {step / floor:.2f} times the time to read the weights once", end="")
        print()
    found["stages"] = [{**stage, "output": stage["output"][-4000:]} for stage in stages]
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    target = REPOSITORY / "bench" / "results" / f"{name}-{found['date']}.json"
    target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {target}")
    if not all(stage["ok"] for stage in stages):
        raise SystemExit("gpu.py: some stages failed: see the file")


if __name__ == "__main__":
    main()
