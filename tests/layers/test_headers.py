"""Every header can be read alone: an editor shows it without errors, and no order is needed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).resolve().parents[2] / "native"

# Bodies that are compiled once for each instruction set, inside of what isa/*.c and encode_*.c
# define; and the vectors of instruction sets that this compiler may not have.
BODIES = ("cpu/kernels/", "cpu/isa/simd_", "quant/encode_", "quant/search.h")
ALONE = {"cpu/kernels/kernels.h"}

HEADERS = sorted(
    name
    for name in (path.relative_to(NATIVE).as_posix() for path in NATIVE.rglob("*.h"))
    if name in ALONE or not name.startswith(BODIES)
)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_each_header_compiles_alone(tmp_path: Path) -> None:
    assert len(HEADERS) > 20
    broken = []
    for header in HEADERS:
        source = tmp_path / "alone.c"
        source.write_text(f'#include "{header}"\n', encoding="utf-8")
        flags = ["-std=gnu11", "-Wall", "-Wextra", "-Wundef", "-Werror"]
        flags += ["-Wno-unused-function", "-Wno-unused-parameter"]
        places = [f"-I{NATIVE}", f"-I{NATIVE / 'include'}"]
        done = subprocess.run(
            ["cc", "-fsyntax-only", *flags, *places, source], capture_output=True, text=True
        )
        if done.returncode:
            broken.append(done.stderr)
    assert not broken, "\n".join(broken)
