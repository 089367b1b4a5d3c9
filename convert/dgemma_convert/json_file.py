"""JSON files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import ConvertError, from_os_error

MAX_JSON_BYTES = 256 << 20  # config, tokenizer and index; the largest known is 32 MB


def read_json(path: Path) -> Any:
    """The parsed content of a JSON file; ConvertError where it is not one."""
    if path.exists() and not path.is_file():
        raise ConvertError(f"{path}: not a regular file")
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ConvertError(f"{path}: more than {MAX_JSON_BYTES >> 20} MiB of JSON")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise from_os_error(error, "reading") from error
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{path}: not valid JSON: {str(error) or 'nested too deep'}") from error
