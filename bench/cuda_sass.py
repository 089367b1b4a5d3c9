"""The machine code of compiled CUDA kernels: what cuda_resources.py and tests/cuda read out of it.

Disassembles with nvdisasm: CUDA's own, or that of the package nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

# A fresh float16 that is stored byte by byte: ptxas 13.0 converts the number in place of its byte.
FORBIDDEN = "F2I.U8.F16"
MATRIX = re.compile(r"[IHO]MMA\.|QMMA\.|HGMMA\.")
LINE = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9._]*)([^;]*);")


def nvdisasm() -> str | None:
    """The program, or None where it is not installed."""
    if found := shutil.which("nvdisasm"):
        return found
    package = importlib.util.find_spec("nvidia")
    for folder in package.submodule_search_locations or () if package else ():
        for path in sorted(Path(folder).glob("cu*/bin/nvdisasm")):
            return str(path)
    return None


@dataclass(frozen=True)
class Loop:
    """An innermost loop with matrix instructions."""

    instructions: int  # on all paths through it
    matrix: int

    @property
    def per_matrix(self) -> float:
        """Instructions for each matrix instruction."""
        return self.instructions / self.matrix


@dataclass
class Code:
    """A kernel's instructions by their names, and its labels and branches by instruction."""

    name: str
    instructions: list[str] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    branches: list[tuple[int, str]] = field(default_factory=list)

    def loops(self) -> list[Loop]:
        """Its innermost loops around matrix instructions, in the order of the code."""
        matrix = [bool(MATRIX.match(name)) for name in self.instructions]
        spans = set()
        for at, label in self.branches:
            to = self.labels.get(label, at)
            if to < at and any(matrix[to : at + 1]):
                spans.add((to, at + 1))
        inner = [
            span
            for span in spans
            if not any(span[0] <= a and b <= span[1] and (a, b) != span for a, b in spans)
        ]
        return [Loop(b - a, sum(matrix[a:b])) for a, b in sorted(inner)]


def disassemble(cubin: Path) -> list[Code]:
    """The kernels of a file that `nvcc -cubin` has made."""
    program = nvdisasm()
    assert program is not None
    done = subprocess.run([program, "-c", str(cubin)], capture_output=True, text=True, check=True)
    return parse(done.stdout)


def parse(text: str) -> list[Code]:
    """The kernels in what nvdisasm prints."""
    found: list[Code] = []
    for line in text.splitlines():
        if line.startswith(".text."):
            found.append(Code(line[len(".text.") :].rstrip(":")))
        elif line.startswith(".L_") and found:
            found[-1].labels[line.rstrip(":")] = len(found[-1].instructions)
        elif found and (whole := LINE.match(line)):
            name, operands = whole[1], whole[2]
            if name.startswith("BRA") and (label := re.search(r"`\((\.L_\w+)\)", operands)):
                found[-1].branches.append((len(found[-1].instructions), label[1]))
            found[-1].instructions.append(name)
    return found
