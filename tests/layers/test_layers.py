"""The layers of the house: includes and imports run one way, and files and functions stay short.

What stands in the lists below is known and not mended yet. An entry that is no longer needed fails
too, so the lists only become shorter.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support import layers

ROOT = Path(__file__).resolve().parents[2]

KNOWN_CIRCLES: set[str] = set()

KNOWN_PACKAGE_ARROWS: set[str] = set()

KNOWN_TOO_LONG: set[str] = {
    "native/include/dgemma.h",  # the whole of the C API, for whoever reads one file
}


def _compare(found: list[str], known: set[str]) -> None:
    new = sorted(set(found) - known)
    assert not new, "\n".join(new)
    mended = sorted(known - set(found))
    assert not mended, "mended: take it off the list in this file:\n" + "\n".join(mended)


def test_includes_run_down() -> None:
    _compare(layers.c_arrows_up(ROOT), set())


def test_imports_run_down() -> None:
    _compare(layers.python_arrows_up(ROOT), set())


def test_there_are_no_circles() -> None:
    _compare(layers.c_circles(ROOT) + layers.python_circles(ROOT), KNOWN_CIRCLES)


def test_the_converter_uses_the_package_and_not_the_other_way_round() -> None:
    _compare(layers.package_arrows(ROOT), KNOWN_PACKAGE_ARROWS)


def test_files_and_functions_stay_short() -> None:
    _compare(layers.too_long(ROOT), KNOWN_TOO_LONG)


# ---- Each check finds what is planted ------------------------------------------------------------

Check = Callable[[Path], list[str]]

_LONG = "\n".join(f"    x += {i};" for i in range(80))
_LONG_PYTHON = "\n".join(f"        x = {i}" for i in range(80))

PLANTED: dict[str, tuple[Check, dict[str, str], list[str]]] = {
    "an include that runs up": (
        layers.c_arrows_up,
        {
            "native/base/threads.c": '#include <a.h>\n#  include "gguf/gguf.h"\n',
            "native/gguf/gguf.h": '#include "base/threads.h"\n',
            "native/base/threads.h": "",
        },
        ["native/base/threads.c includes native/gguf/gguf.h, which stands above it"],
    ),
    "an include of a file beside, from CUDA": (
        layers.c_arrows_up,
        {
            "native/cuda/kernels/rows.cu": '#include "device.cuh"\n#include "engine/plan.h"\n',
            "native/cuda/kernels/device.cuh": "",
            "native/engine/plan.h": "",
        },
        ["native/cuda/kernels/rows.cu includes native/engine/plan.h, which stands above it"],
    ),
    "a folder without a place": (
        layers.c_arrows_up,
        {"native/vulkan/backend.c": ""},
        ["native/vulkan has no place in the order " + " ".join(layers.C_ORDER)],
    ),
    "a circle through a source": (
        layers.c_circles,
        {
            "native/base/a.h": "",
            "native/base/a.c": '#include "base/a.h"\n#include "base/b.h"\n',
            "native/base/b.h": "",
            "native/base/b.c": '#include "base/b.h"\n#include "base/c.h"\n',
            "native/base/c.h": '#include "base/a.h"\n',
        },
        ["circle: base/a base/b base/c"],
    ),
    "an import that runs up": (
        layers.python_arrows_up,
        {
            "python/dgemma/tokenizer.py": "def f():\n    from .server.app import create_app\n",
            "python/dgemma/server/app.py": "from ..tokenizer import Tokenizer\n",
        },
        ["dgemma.tokenizer imports dgemma.server.app, which stands above it"],
    ),
    "a module of a package, by its package": (
        layers.python_arrows_up,
        {
            "python/dgemma/errors.py": "from . import hub\nimport dgemma.cli\n",
            "python/dgemma/hub.py": "",
            "python/dgemma/cli/__init__.py": "",
        },
        [
            "dgemma.errors imports dgemma.cli, which stands above it",
            "dgemma.errors imports dgemma.hub, which stands above it",
        ],
    ),
    "a module without a place": (
        layers.python_arrows_up,
        {"python/dgemma/stray.py": ""},
        ["dgemma.stray has no place in PYTHON_ORDER (tests/support/layers.py)"],
    ),
    "a circle of modules": (
        layers.python_circles,
        {
            "python/dgemma/model.py": "from .compat.more import a\n",
            "python/dgemma/compat/more.py": (
                "import typing\nif typing.TYPE_CHECKING:\n    from ..model import Model\n"
            ),
            "convert/dgemma_convert/a.py": "from . import b\n",
            "convert/dgemma_convert/b.py": "import dgemma_convert.a\n",
        },
        [
            "circle: dgemma.compat.more dgemma.model",
            "circle: dgemma_convert.a dgemma_convert.b",
        ],
    ),
    "a converter that reaches into the package": (
        layers.package_arrows,
        {
            "convert/dgemma_convert/a.py": "from dgemma import _native, Error\n",
            "convert/dgemma_convert/b.py": "from dgemma._dgemma import lib\nimport dgemma.values\n",
        },
        [
            "dgemma_convert.a imports dgemma._native, which is not public",
            "dgemma_convert.b imports dgemma._dgemma.lib, which is not public",
        ],
    ),
    "a package that knows its converter": (
        layers.package_arrows,
        {"python/dgemma/cli/main.py": "def f():\n    from dgemma_convert import cli\n"},
        ["dgemma.cli.main imports dgemma_convert, which stands above dgemma"],
    ),
    "a long file": (
        layers.too_long,
        {"convert/a.py": "x = 1\n" * 451, "native/b.h": "\n" * 450, "tests/c.js": "\n" * 451},
        ["convert/a.py", "tests/c.js"],
    ),
    "a long function": (
        layers.too_long,
        {
            "native/a.c": (
                f"static int f(int a,\n             int b) {{\n{_LONG}\n}}\n"
                f"static const int table[] = {{f(1),\n{_LONG}\n}};\n"
                f"typedef struct s {{\n{_LONG}\n}} s;\n"
                f"void g(void) {{\n{_LONG[:-100]}\n}}\n"
            ),
            "native/b.cu": f"__global__ void __launch_bounds__(256, 2) k(int x) {{\n{_LONG}\n}}\n",
            "python/a.py": f"class A:\n    async def f(self):\n{_LONG_PYTHON}\n",
        },
        ["native/a.c: f", "native/b.cu: k", "python/a.py: f"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_found(name: str, tmp_path: Path) -> None:
    check, files, expected = PLANTED[name]
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    assert check(tmp_path) == expected


def test_an_entry_that_is_no_longer_needed_fails() -> None:
    with pytest.raises(AssertionError, match="mended: take it off"):
        _compare([], {"native/a.c"})
    with pytest.raises(AssertionError, match=r"^native/b\.c"):
        _compare(["native/a.c", "native/b.c"], {"native/a.c"})
