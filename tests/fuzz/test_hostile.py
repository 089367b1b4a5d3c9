"""A few of what the scripts of this folder try by the thousand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.build import ROOT

CASES = {
    "sessions": ["hostile_files.py", "--sessions", "60", "--ggufs", "0", "--kills", "0"],
    "ggufs": ["hostile_files.py", "--sessions", "0", "--ggufs", "120", "--kills", "0"],
    "kills": ["hostile_files.py", "--sessions", "0", "--ggufs", "0", "--kills", "8"],
    "templates": ["hostile_templates.py", "--cases", "12"],
    "requests": ["hostile_requests.py", "{model}", "--cases", "150"],
    "clients": ["vanishing_clients.py", "{model}", "--clients", "60"],
}
REST = ["--disks", "6", "--answers", "12"]


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_at_fault(name: str, tiny_gguf: Path) -> None:
    script, *options = [part.replace("{model}", str(tiny_gguf)) for part in CASES[name]]
    if script == "hostile_files.py":
        options += REST if name == "kills" else ["--disks", "0", "--answers", "0"]
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "fuzz" / script, *options],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
