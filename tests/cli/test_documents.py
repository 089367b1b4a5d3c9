"""What the documents name exists: files, folders, make targets, links, messages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Pages about the code may leave out the folder that they are about.
SHORT = (
    *("", "native", "native/cpu", "python/dgemma", "python/dgemma/server"),
    *("convert/dgemma_convert", "tests", "bench"),
)
FOR_CONTRIBUTORS = [
    *("CONTRIBUTING.md", "docs/architecture.md", "docs/glossary.md"),
    *("tests/README.md", "bench/README.md", "tests/fuzz/README.md"),
]
ALL = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "tests/**/*.md", "bench/*.md", "models/**/*.md")
    for path in ROOT.glob(pattern)
)
_SUFFIXES = "c|h|cu|cuh|py|sh|md|toml|yml|txt|html|css|js"


def named(text: str) -> set[str]:
    """Paths in backticks: with a folder, and a suffix or a slash at the end."""
    spans = re.findall(r"`([^`\n]+)`", text)
    words = {word.strip("(),") for span in spans for word in span.split()}
    path = re.compile(rf"[\w.*-]+(/[\w.*-]+)*/([\w*-]+\.({_SUFFIXES}))?")
    return {w for w in words if path.fullmatch(w) and not re.search("X|^build/|^dist/", w)}


def missing(page: str, text: str) -> list[str]:
    here = [ROOT / page, *(ROOT / folder / "x" for folder in SHORT)]
    return [
        path
        for path in sorted(named(text))
        if not any(list(place.parent.glob(path.rstrip("/"))) for place in here)
    ]


@pytest.mark.parametrize("page", FOR_CONTRIBUTORS)
def test_files_that_are_named_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert not missing(page, text)
    assert page == "tests/fuzz/README.md" or len(named(text)) >= 4


def test_a_file_that_does_not_exist_is_found() -> None:
    text = "`native/cpu/attention.c` `cpu/nowhere.h` `native/nowhere/` `a/b`"
    assert missing("docs/architecture.md", text) == ["cpu/nowhere.h", "native/nowhere/"]


@pytest.mark.parametrize("page", ALL)
def test_make_targets_and_links_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([\w-]+)", text):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target
    for link in re.findall(r"\]\(([^)#:\s]+)[^):]*\)", text):
        assert (ROOT / page).parent.joinpath(link).exists(), link


def test_messages_of_the_installation_page_are_said() -> None:
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    table = page.partition("## When it does not work")[2].partition("\n## ")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(messages) > 8
    sources = [*(ROOT / "python").rglob("*.py"), *(ROOT / "native").rglob("*.[ch]")]
    joined = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    said = re.sub(r'"\s*\n\s*f?"', "", joined)  # sentences run over several lines
    assert not [message for message in messages if message not in said]
