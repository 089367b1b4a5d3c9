"""The scripts of bench/ as modules."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from support.build import ROOT

BENCH = ROOT / "bench"


def load(name: str) -> Any:
    """A script, imported once."""
    if str(BENCH) not in sys.path:
        sys.path.insert(0, str(BENCH))
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
