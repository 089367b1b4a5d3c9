"""Checkpoints to convert or to damage, and a folder to write to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from support.checkpoints import SPECS, Spec

Folders = Callable[[str], Path]


@pytest.fixture
def source(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint("small"), tmp_path / "source"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module", params=["small", "wide", "narrow"])
def case(request: pytest.FixtureRequest, checkpoint: Folders) -> tuple[Path, Spec]:
    return checkpoint(request.param), SPECS[request.param]


@pytest.fixture(scope="module")
def plain(checkpoint: Folders) -> Path:
    return checkpoint("small")
