"""JSON files of a checkpoint, and what is found in place of a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .errors import ConvertError, from_os_error

MAX_JSON_BYTES = 256 << 20  # config, tokenizer and index; the largest known is 32 MB
BOM = b"\xef\xbb\xbf"


def check_regular(path: Path) -> None:
    """ConvertError where `path` is a link that leads nowhere, or no regular file."""
    try:
        if path.is_symlink() and not path.exists():
            raise ConvertError(
                f"{path}: is a link to {os.readlink(path)}, which is not there; download the file "
                "again"
            )
        if path.exists() and not path.is_file():
            raise ConvertError(f"{path}: not a regular file")
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise from_os_error(error, "looking for it") from error


def is_there(path: Path) -> bool:
    """Whether there is a file; ConvertError for a link that leads nowhere, and for other things."""
    check_regular(path)
    return path.is_file()


def check_content(path: Path, head: bytes) -> None:
    """ConvertError where a file begins like something that is often found in place of it."""
    start = head.removeprefix(BOM).lstrip()[:64].lower()
    if not start:
        raise ConvertError(f"{path}: is empty; download it again")
    for beginning, what in (
        (
            b"version https://git-lfs",
            "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`, or download "
            "it again",
        ),
        (b"<!doctype html", "is a web page, not the file itself; download it again"),
        (b"<html", "is a web page, not the file itself; download it again"),
        (b"gguf", "is a GGUF file; `dgemma quantize` reads those"),
        (b"pk\x03\x04", "is a PyTorch or ZIP archive; expected a file of the safetensors format"),
    ):
        if start.startswith(beginning):
            raise ConvertError(f"{path}: {what}")


def read_text(path: Path) -> str:
    """The text of a file without its BOM; ConvertError where it is not UTF-8, or something else."""
    check_regular(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise from_os_error(error, "reading") from error
    except UnicodeDecodeError as error:
        raise ConvertError(f"{path}: not UTF-8") from error
    check_content(path, text[:100].encode())
    return text


def read_json(path: Path) -> Any:
    """The parsed content of a JSON file; ConvertError where it is not one. A BOM is skipped."""
    check_regular(path)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ConvertError(f"{path}: more than {MAX_JSON_BYTES >> 20} MiB of JSON")
        data = path.read_bytes().removeprefix(BOM)
    except OSError as error:
        raise from_os_error(error, "reading") from error
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        if not data.strip():
            raise ConvertError(
                f"{path}: not valid JSON: the file is empty; download it again"
            ) from None
        check_content(path, data[:100])
        reason = str(error) or "nested too deep"
        raise ConvertError(f"{path}: not valid JSON: {reason}") from error
