"""What runs elsewhere: the workflows' form, and that they name commands and files that exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))


def check(schema: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
    return subprocess.run([*command, *paths], capture_output=True, text=True)


def test_workflows_follow_the_schema(tmp_path: Path) -> None:
    assert {path.name for path in WORKFLOWS} >= {"ci.yml", "release.yml"}
    done = check("github-workflows", *WORKFLOWS)
    assert done.returncode == 0, done.stdout + done.stderr

    broken = tmp_path / "broken.yml"
    broken.write_text(WORKFLOWS[0].read_text().replace("runs-on:", "run-on:"))
    assert check("github-workflows", broken).returncode == 1


def test_a_report_of_a_fault_asks_for_what_doctor_says() -> None:
    (form,) = (REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*.yml")
    done = check("github-issue-forms", form)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "`dgemma doctor`" in form.read_text()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_what_exists(path: Path) -> None:
    text = path.read_text()
    for target in re.findall(r"\bmake ([\w-]+)", text):
        assert re.search(rf"^{target}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE), (
            target
        )
    scripts = re.findall(r"(?<![\w/])\.ci/\w+", text)
    assert scripts
    for script in scripts:
        assert os.access(REPOSITORY / script, os.X_OK), script


def test_versions_agree() -> None:
    """The package, its CUDA backend and the C library are released together."""
    found = {
        name: re.findall(pattern, (REPOSITORY / name).read_text(), re.MULTILINE)
        for name, pattern in {
            "pyproject.toml": r'^version = "(.+)"|"dgemma-cuda==([\d.]+)',
            "native/cuda/package/pyproject.toml": r'^version = "(.+?)"',
            "CMakeLists.txt": r"^project\(dgemma VERSION ([\d.]+)",
        }.items()
    }
    versions = {"".join(each) for many in found.values() for each in many}
    assert len(versions) == 1, found
    assert len(found["pyproject.toml"]) == 2
