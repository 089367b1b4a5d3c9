"""Files of the Hugging Face hub: which one is meant, and what happens without a network."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from dgemma import hub
from support.hub import REPOSITORY, Hub, serving

FILES = [
    "README.md",
    "model-Q4_0.gguf",
    "model-Q4_K_M.gguf",
    "model-Q4_K_S.gguf",
    "bf16/model-BF16-00001-of-00002.gguf",
    "bf16/model-BF16-00002-of-00002.gguf",
    "mmproj-model-f16.gguf",
]


def chosen(files: Sequence[str] = FILES, **what: str) -> list[str]:
    return hub.choose("a/b", files, **what)


def test_which_file_is_meant() -> None:
    assert chosen(type="Q4_0") == ["model-Q4_0.gguf"]
    assert chosen(type="q4_k_s") == ["model-Q4_K_S.gguf"]
    assert chosen(type="BF16") == FILES[4:6]
    assert chosen(pattern="*q4_0.gguf") == ["model-Q4_0.gguf"]
    assert chosen(pattern="mmproj*") == ["mmproj-model-f16.gguf"]
    assert chosen(pattern="bf16/*") == FILES[4:6]
    assert chosen() == ["model-Q4_K_M.gguf"]  # as llama.cpp chooses where nobody does
    assert chosen(FILES[:2]) == ["model-Q4_0.gguf"]


@pytest.mark.parametrize(
    ("files", "what", "message"),
    [
        (FILES, {"pattern": "*Q4*"}, "several files.*Q4_0.gguf, model-Q4_K_M.gguf, model-Q4_K_S"),
        (FILES, {"type": "Q4_K"}, "several files of type Q4_K: name one of model-Q4_K_M.gguf, "),
        (["a-Q4_0.gguf", "a-Q8_0.gguf"], {}, "several files in GGUF: .*a-Q4_0.gguf, a-Q8_0.gguf"),
        (FILES, {"type": "Q2_K"}, "no file of type Q2_K; its GGUF files: .*model-Q4_0.gguf"),
        (["README.md"], {}, "no file in GGUF; its GGUF files: none"),
    ],
)
def test_what_is_not_clear_is_listed(files: list[str], what: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chosen(files, **what)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "files"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 1000)
    with serving(folder) as server:
        yield server


def download(
    small: Hub, tmp_path: Path, code: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The hub's address is read when its package is imported: a program of its own."""
    program = (
        "import json, sys\nfrom dgemma import hub\nfrom dgemma.errors import Error\n"
        f"try: print(json.dumps(hub.download({code})))\n"
        "except (Error, ValueError) as problem: print(problem, file=sys.stderr); sys.exit(1)"
    )
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=small.environment(tmp_path / "cache", **environment),
    )


def path_of(done: subprocess.CompletedProcess[str]) -> Path:
    assert done.returncode == 0, done.stderr
    return Path(json.loads(done.stdout))


def test_a_file_is_fetched_once_and_found_without_a_network(small: Hub, tmp_path: Path) -> None:
    code = f"{REPOSITORY!r}, type='Q4_0', additional_files=['README.md']"
    path = path_of(download(small, tmp_path, code))
    assert path.read_bytes() == b"model-Q4_0.gguf" * 1000
    assert sorted(small.fetched) == ["README.md", "model-Q4_0.gguf"]
    assert (path.parent / "README.md").exists()
    small.fetched.clear()
    for environment in (
        {},
        {"HF_HUB_OFFLINE": "1"},
        {"HF_ENDPOINT": "http://127.0.0.1:9"},  # nobody listens there
    ):
        assert path_of(download(small, tmp_path, code, **environment)) == path
    assert small.fetched == []


def test_shards_come_together(small: Hub, tmp_path: Path) -> None:
    path = path_of(download(small, tmp_path, f"{REPOSITORY!r}, '*bf16*'"))
    assert path.name.endswith("00001-of-00002.gguf")
    assert sorted(f.name for f in path.parent.iterdir()) == [n.split("/")[1] for n in FILES[4:6]]


@pytest.mark.parametrize(
    ("code", "environment", "message"),
    [
        ("'no/such-model'", {}, "cannot download from no/such-model: there is no such repository"),
        (repr(REPOSITORY), {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set, and it is not in the"),
        (repr(REPOSITORY), {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub cannot be reached"),
        ("'a/b/c'", {}, "cannot download from a/b/c: "),
        (f"{REPOSITORY!r}, 'x.gguf'", {}, "someone/some-model has no file 'x.gguf'"),
        (f"{REPOSITORY!r}, type='Q4_0', additional_files=['x']", {}, "has no file 'x'"),
    ],
)
def test_errors_are_one_line(
    small: Hub, tmp_path: Path, code: str, environment: dict[str, str], message: str
) -> None:
    done = download(small, tmp_path, code, **environment)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
