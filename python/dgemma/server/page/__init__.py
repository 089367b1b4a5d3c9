"""The page of the server: files here, one self-contained document in the answer."""

from __future__ import annotations

import re
from importlib import resources

_STYLE = re.compile(r'<link rel="stylesheet" href="(\w+\.css)">')
_SCRIPT = re.compile(r'<script src="(\w+\.js)"></script>')


def document() -> str:
    """index.html with its style and scripts inside, so that nothing else must be asked for."""
    text = _STYLE.sub(lambda found: f"<style>\n{_read(found[1])}</style>", _read("index.html"))
    return _SCRIPT.sub(lambda found: f"<script>\n{_read(found[1])}</script>", text)


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")
