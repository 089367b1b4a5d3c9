"""Registers, spills and main loops of every CUDA kernel: what docs/cuda.md's table shows.

    python bench/cuda_resources.py [--arch 90] [--spills] [--check 80 86 89 90 100 120a 121a]
        [--files head settle]

Compiles native/cuda with `nvcc -Xptxas -v` and warnings as errors; needs no GPU. Where nvdisasm is
installed (CUDA's, or the package nvidia-cuda-nvdisasm) it also counts the instructions of each main
loop for every matrix instruction in it. --check compiles for several architectures and prints the
largest number of registers and the spills of each. The kernels in native/cuda/hopper go with
architecture 90 and are compiled for sm_90a; that ptxas makes their products wait for each other is
an error.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import cuda_sass

REPOSITORY = Path(__file__).resolve().parents[1]
# Template arguments of the formats (formats.cuh) by their mangled names' demangled forms.
CODES = ["signed nibble", "nibble", "iq4", "e2m1", "2 bit", "3 bit", "5 bit", "signed 5 bit",
         "6 bit", "8 bit"]  # fmt: skip
FORMATS = {
    (0, 32, False, False): "q4_0", (1, 32, True, False): "q4_1", (7, 32, False, False): "q5_0",
    (6, 32, True, False): "q5_1", (9, 32, False, False): "q8_0", (4, 16, True, True): "q2_k",
    (5, 16, False, True): "q3_k", (1, 32, True, True): "q4_k", (6, 32, True, True): "q5_k",
    (8, 16, False, True): "q6_k", (2, 32, False, False): "iq4_nl", (2, 32, False, True): "iq4_xs",
    (3, 16, False, False): "nvfp4",
}  # fmt: skip
FLOATS = ["f16", "bf16", "f32"]


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel."""

    source: str
    name: str
    format: str  # "" where it does not depend on one
    registers: int
    spilled: int  # bytes stored
    loops: tuple[cuda_sass.Loop, ...] = ()
    forbidden: int = 0  # instructions that must not occur (cuda_sass.FORBIDDEN)


def is_hopper(source: Path) -> bool:
    """Whether a file is for compute capability 9.0 alone."""
    return source.parent.name == "hopper"


def compile_source(source: Path, arch: str, folder: Path) -> list[Kernel]:
    """Compiles one file; its kernels."""
    arch = "90a" if is_hopper(source) else arch
    target = folder / f"{source.stem}-{arch}.cubin"
    command = [
        "nvcc", "-std=c++17", f"-arch=sm_{arch}", "-cubin", "-Xptxas=-v", '-DDGEMMA_VERSION="0"',
        "-DDGEMMA_CUDA_HAS_SM90A",
        "-Xcompiler=-Wall,-Wextra", "-Werror=all-warnings", f"-I{REPOSITORY / 'native'}",
        f"-I{REPOSITORY / 'native' / 'include'}", str(source), "-o", str(target),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{source.name}, sm_{arch}:\n{done.stdout}{done.stderr}")
    if serialized := re.findall(r".*wgmma.mma_async instructions are serialized.*", done.stderr):
        raise SystemExit(f"{source.name}, sm_{arch}:\n" + demangled("\n".join(serialized)))
    codes = {}
    if cuda_sass.nvdisasm():
        codes = {code.name: code for code in cuda_sass.disassemble(target)}
    found, name, spilled = [], "", 0
    for line in (done.stderr + done.stdout).splitlines():
        if entry := re.search(r"Compiling entry function '(.*)' for", line):
            name, spilled = entry[1], 0
        elif spill := re.search(r"(\d+) bytes spill stores", line):
            spilled = int(spill[1])
        elif used := re.search(r"Used (\d+) registers", line):
            code = codes.get(name, cuda_sass.Code(name))
            forbidden = sum(i.startswith(cuda_sass.FORBIDDEN) for i in code.instructions)
            found.append(Kernel(source.stem, name, "", int(used[1]), spilled, tuple(code.loops()),
                                forbidden))  # fmt: skip
    names = demangled("\n".join(kernel.name for kernel in found)).splitlines()
    return [named(kernel, name) for kernel, name in zip(found, names, strict=True)]


def named(kernel: Kernel, name: str) -> Kernel:
    """The kernel under its short name, and with its format."""
    short = re.sub(r"\(anonymous namespace\)::|\((Codes|FloatKind)\)|^void ", "", name)
    kernel_name = re.split(r"[<(]", short)[0]
    return replace(kernel, name=kernel_name + sizes_of(short), format=format_of(short))


def demangled(text: str) -> str:
    """The text with readable names."""
    return subprocess.run(
        ["c++filt"], input=text, capture_output=True, text=True, check=True
    ).stdout


def format_of(name: str) -> str:
    """The file type whose format a kernel is compiled for."""
    if whole := re.search(r"IntegerFormat<(\d+), (\d+), (true|false), (true|false)>", name):
        key = (int(whole[1]), int(whole[2]), whole[3] == "true", whole[4] == "true")
        return FORMATS.get(key, CODES[key[0]])
    if floats := re.search(r"FloatFormat<(\d)>", name):
        return FLOATS[int(floats[1])]
    return "nvfp4 on fp4 units" if "NativeFp4Format" in name else ""


def sizes_of(name: str) -> str:
    """Plain numbers among the template arguments."""
    sizes = re.match(r"[a-z_]+(<\d+, \d+>)", name)
    return sizes[1] if sizes else ""


def kernels(arch: str, files: list[str]) -> list[Kernel]:
    """The kernels of some files, or all of them, for an architecture."""
    cuda = REPOSITORY / "native" / "cuda"
    sources = sorted(path for name in files or ["*"] for path in cuda.rglob(f"{name}.cu"))
    if not arch.startswith("90"):
        sources = [source for source in sources if not is_hopper(source)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = pool.map(lambda source: compile_source(source, arch, Path(folder)), sources)
        return [kernel for part in parts for kernel in part]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="90")
    parser.add_argument("--spills", action="store_true", help="only kernels that spill")
    parser.add_argument("--check", nargs="+", metavar="ARCH", help="compare architectures")
    parser.add_argument("--files", nargs="+", default=[], help="only these, without .cu")
    args = parser.parse_args()
    if args.check:
        print("| architecture | kernels | most registers | kernels that spill | most bytes |")
        print("| --- | --- | --- | --- | --- |")
        for arch in args.check:
            found = kernels(arch, args.files)
            spilling = [kernel.spilled for kernel in found if kernel.spilled]
            most, worst = max(k.registers for k in found), max(spilling, default=0)
            line = f"| {arch} | {len(found)} | {most} | {len(spilling)} | {worst} |"
            print(line, flush=True)
        return
    print("| kernel | format | registers | spilled bytes | instructions a matrix instruction |")
    print("| --- | --- | --- | --- | --- |")
    for k in kernels(args.arch, args.files):
        if k.spilled or not args.spills:
            loops = ", ".join(f"{loop.per_matrix:.1f}" for loop in k.loops)
            print(f"| {k.name} | {k.format} | {k.registers} | {k.spilled or ''} | {loops} |")


if __name__ == "__main__":
    sys.exit(main())
