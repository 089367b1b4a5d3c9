"""The parts of an installation are of one release, or say that they are not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import dgemma
from dgemma._native import check_release
from dgemma._native.calls import RELEASE

ROOT = Path(__file__).resolve().parents[2]


def test_all_places_name_the_same_release() -> None:
    places = {
        "pyproject.toml": r'^version = "([^"]+)"',
        "CMakeLists.txt": r"^project\(dgemma VERSION (\S+)",
    }
    for name, pattern in places.items():
        found = re.search(pattern, (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        assert found is not None, name
        assert found[1] == RELEASE, name
    assert dgemma.__version__ == RELEASE


def test_parts_of_two_releases() -> None:
    check_release("1.2.3", "1.2.3")
    with pytest.raises(ImportError, match=r"of release 1\.2\.3, its compiled part of 1\.2\.2: "):
        check_release("1.2.2", "1.2.3")
