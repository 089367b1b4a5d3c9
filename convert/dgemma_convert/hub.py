"""Checkpoints from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from .errors import ConvertError

# What a conversion reads; a repository may hold the same weights in other forms too.
PATTERNS = ["*.json", "*.jinja", "*.safetensors", "README.md"]


def download(repo_id: str) -> Path:
    """Folder with the checkpoint `repo_id`, in the hub's cache; fetched where it is not there yet.

    ConvertError where it cannot be had, or where the extra `hub` is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConvertError("--remote needs the extra `hub`: pip install 'dgemma[hub]'") from error
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=PATTERNS))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConvertError(f"{repo_id}: downloading failed: {reason}") from error
