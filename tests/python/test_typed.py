"""What an editor shows: every argument and its type, by the package's own type information."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import dgemma

PROGRAM = Path(__file__).parent / "programs" / "typed.py"


def check(path: Path, cache: Path) -> tuple[int, str]:
    """mypy's exit code and findings, with the package found as one that is installed."""
    root = Path(dgemma.__file__).parents[1]
    # mypy finds what is installed by itself, and refuses to be told or to start among it.
    where = {} if root.name == "site-packages" else {"MYPYPATH": str(root)}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--no-error-summary"),
            *("--config-file", "", "--cache-dir", str(cache), "--follow-imports=silent"),
            str(path),
        ],
        capture_output=True,
        text=True,
        cwd=cache,
        env={"PATH": "", **where},
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mypy")


def test_a_program_that_uses_everything(cache: Path) -> None:
    assert (Path(dgemma.__file__).parent / "py.typed").exists()
    assert check(PROGRAM, cache) == (0, "")


WRONG = [
    ('llm.generate("x", max_token=5)', 'Unexpected keyword argument "max_token"'),
    ('llm.generate("x", seed="1")', 'has incompatible type "str"'),
    ('llm.stream("x", top_q=0.5)', 'Unexpected keyword argument "top_q"'),
    ("llm.generate(5)", 'has incompatible type "int"'),
    ('llm.create_completion("x", echoes=True)', "No overload variant"),
    ("llm.create_chat_completion([], temprature=0.5)", "No overload variant"),
    ("llm.session(n_contexts=5)", 'Unexpected keyword argument "n_contexts"'),
    ('dgemma.DiffusionGemma("x", n_contexts=5)', 'Unexpected keyword argument "n_contexts"'),
    ('llm.generate("x").texts', 'has no attribute "texts"'),
    ('next(llm.create_completion("x"))', 'No overload variant of "next"'),
]


def test_what_is_wrong_is_seen(tmp_path: Path, cache: Path) -> None:
    program = tmp_path / "wrong.py"
    lines = ["import dgemma", "", "", "def f(llm: dgemma.DiffusionGemma) -> None:"]
    program.write_text("\n".join(lines + [f"    {line}" for line, _ in WRONG]) + "\n")
    code, found = check(program, cache)
    assert code == 1
    errors = [line for line in found.splitlines() if ": error: " in line]
    for number, (line, message) in enumerate(WRONG, len(lines) + 1):
        found_here = [error for error in errors if f"wrong.py:{number}:" in error]
        assert any(message in error for error in found_here), (line, found_here)


def test_every_public_name_is_there() -> None:
    assert {name for name in dgemma.__all__ if getattr(dgemma, name) is None} == set()
    assert set(dgemma.__all__) <= set(dir(dgemma))
    assert dgemma.__version__.count(".") == 2
    assert dgemma.tools.split_answer
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        dgemma.nothing_of_the_kind  # noqa: B018
