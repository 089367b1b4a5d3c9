"""Opens a file exactly as the commands that run it do: the one answer to "does it run here?"."""

from __future__ import annotations

import os

from .errors import OutOfMemoryError
from .model import DiffusionGemma


def open_as_generate_does(path: str | os.PathLike[str]) -> DiffusionGemma:
    """The model of a file on the CPU, with its tokenizer and chat template built.

    Raises what `generate` would: dgemma.Error, ValueError.
    """
    return with_its_text(DiffusionGemma(path, backend="cpu"))


def with_its_text(llm: DiffusionGemma) -> DiffusionGemma:
    """The model itself, its tokenizer and chat template built; closed where they cannot be.

    ModelFileError or ChatTemplateError where the file's metadata do not describe them.
    """
    try:
        _ = llm.tokenizer, llm.chat_template
    except BaseException:
        llm.close()
        raise
    return llm


def check_file(path: str | os.PathLike[str]) -> None:
    """Raises what `generate` would say of a file; but not that this machine is too small for it."""
    try:
        open_as_generate_does(path).close()
    except OutOfMemoryError:
        return
