"""The compiled backend as a package of its own, which the engine finds as a neighbour."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dgemma

PACKAGE = Path(__file__).resolve().parents[2] / "native" / "cuda" / "package" / "dgemma_cuda"
OPEN = """
import sys
import dgemma
assert dgemma.__file__.startswith(sys.argv[2]), dgemma.__file__
with dgemma.DiffusionGemma(sys.argv[1], backend="cuda", n_ctx=256) as llm:
    print(llm.info.backend)
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of packages with dgemma as it is installed, but no backend beside the engine."""
    shutil.copytree(Path(dgemma.__file__).parent, tmp_path / "dgemma")
    (tmp_path / "dgemma" / "libdgemma_cuda.so").unlink(missing_ok=True)
    return tmp_path


def run(site: Path, model: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "DGEMMA_CUDA_LIBRARY"}
    return subprocess.run(
        [sys.executable, "-c", OPEN, str(model), str(site)],
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": str(site)},
    )


def test_the_backend_is_found_in_its_package(
    site: Path, cuda_library: Path, tiny_gguf: Path
) -> None:
    without = run(site, tiny_gguf)
    assert without.returncode != 0
    assert "this build has no CUDA backend" in without.stderr

    shutil.copytree(PACKAGE, site / "dgemma_cuda")
    shutil.copy(cuda_library, site / "dgemma_cuda")
    found = run(site, tiny_gguf)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("cuda")

    library = subprocess.run(
        [sys.executable, "-c", "import dgemma_cuda; print(dgemma_cuda.LIBRARY.is_file())"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(site)},
    )
    assert library.stdout == "True\n"
