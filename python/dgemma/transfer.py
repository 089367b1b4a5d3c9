"""Downloads that continue where they were interrupted, into the cache of the Hugging Face hub.

The hub's own library begins a file anew after Ctrl-C, and looks only at its length. Here a file
lies beside its place in the cache until it is whole and its checksum is the hub's; the library then
finds it there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlparse

from .errors import Error
from .progress import progress_bar
from .sizes import size_text

_SHA256 = 64  # digits: the etag of what the hub stores apart from the repository, as all weights
_PIECE = 1 << 24


def bring(hub: Any, repo_id: str, name: str, revision: str | None, cache: Path) -> None:
    """Fetches a file into the blobs of the hub's cache, unless it is there.

    `hub` is the module huggingface_hub, whose exceptions come through; Error for a file whose
    checksum is not what the hub says: it is taken away. Two processes do not disturb each other.
    """
    url = hub.hf_hub_url(repo_id, name, revision=revision)
    found = hub.get_hf_file_metadata(url)
    if not found.etag or not found.size:
        return  # the hub's library knows what to do
    blobs = cache / f"models--{repo_id.replace('/', '--')}" / "blobs"
    blob, partial = blobs / found.etag, blobs / f"{found.etag}.continues"
    if blob.exists():
        return
    blobs.mkdir(parents=True, exist_ok=True)
    with partial.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # whoever came first brings it for both
        if blob.exists():
            return
        _continue(hub, url, found, file)
        if len(found.etag) == _SHA256 and _digest(file, name) != found.etag:
            partial.unlink()
            raise Error(
                f"{name} of {repo_id} came damaged: its SHA-256 is not what the hub says. It was "
                "removed; download it again"
            )
        os.replace(partial, blob)


def _continue(hub: Any, url: str, found: Any, file: IO[bytes]) -> None:
    present = file.seek(0, os.SEEK_END)
    if present > found.size:
        file.truncate(0)
        present = file.seek(0)
    if present == found.size:
        return
    headers = hub.utils.build_hf_headers()
    address = found.location or url
    if urlparse(address).netloc != urlparse(url).netloc:  # the token is for the hub alone
        headers = {key: text for key, text in headers.items() if key.lower() != "authorization"}
    hub.file_download.http_get(
        address, file, resume_size=present, headers=headers, expected_size=found.size
    )
    file.flush()


def _digest(file: IO[bytes], name: str) -> str:
    digest, size = hashlib.sha256(), file.seek(0, os.SEEK_END)
    file.seek(0)
    with progress_bar(f"checking {name} ({size_text(size)})", size, in_bytes=True) as bar:
        while piece := file.read(_PIECE):
            digest.update(piece)
            bar.update(len(piece))
    return digest.hexdigest()
