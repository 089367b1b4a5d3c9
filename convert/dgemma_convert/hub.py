"""Checkpoints from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from dgemma.hub import Repository

from .checkpoint import INDEX_NAME, SINGLE_NAME
from .errors import ConvertError
from .json_file import read_json

# What a conversion reads beside the weights. A repository may hold much else: images, the same
# weights in other formats, adapters.
SMALL_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "README.md",
    INDEX_NAME,
]


def download(repo_id: str) -> Path:
    """Folder with the checkpoint `repo_id`, in the hub's cache.

    Only the files that a conversion needs are fetched, and only if they are not there yet; what was
    interrupted continues. Without a network the cache alone is used. ConvertError where the
    checkpoint cannot be had, or where the extra `hub` is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConvertError("--remote needs the extra `hub`: pip install 'dgemma[hub]'") from error

    def fetch(names: list[str], revision: str | None = None) -> Path:
        found = huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=names)
        return Path(found)

    try:
        folder = fetch(SMALL_FILES)
        # The folder is named by the commit: the weights must not come from a later one.
        weights = _weights(folder)
        repository = Repository(repo_id, revision=folder.name)
        for name in sorted({*weights} & {*repository.files()}):  # what is missing is named later
            repository.fetch(name)
        return fetch(weights, folder.name)
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConvertError(f"{repo_id}: downloading failed: {reason}") from error


def _weights(folder: Path) -> list[str]:
    """Names of the files with weights."""
    if not (folder / INDEX_NAME).exists():
        return [SINGLE_NAME]
    index = read_json(folder / INDEX_NAME)
    places = index.get("weight_map") if isinstance(index, dict) else None
    names = {str(name) for name in places.values()} if isinstance(places, dict) else set()
    return sorted(names)
