"""A server with a key for the programs of others, as their users start it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.serving import KEY, running

# The packages ask nobody but the server: no figures of use, no lists of prices.
for name in ("DO_NOT_TRACK", "LITELLM_LOCAL_MODEL_COST_MAP"):
    os.environ.setdefault(name, "True")
os.environ["LANGSMITH_TRACING"] = "false"


@pytest.fixture(scope="module")
def server(tiny_gguf: Path) -> Iterator[str]:
    """Its address; agents say much before they ask, so there is room for 4,096 tokens."""
    with running(tiny_gguf, "--api-key", KEY, "-c", 4096) as (address, _):
        yield address
