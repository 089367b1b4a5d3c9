"""models/tiny, opened: once for a file of tests, or for a test of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dgemma import DiffusionGemma


@pytest.fixture(scope="module")
def llm(tiny_gguf: Path) -> Iterator[DiffusionGemma]:
    with DiffusionGemma(tiny_gguf, n_ctx=1024, n_threads=1) as model:
        yield model


@pytest.fixture
def fresh(tiny_gguf: Path) -> Iterator[DiffusionGemma]:
    """One whose default session has encoded nothing, and encodes in small batches."""
    with DiffusionGemma(tiny_gguf, n_ctx=512, n_batch=32) as model:
        yield model
