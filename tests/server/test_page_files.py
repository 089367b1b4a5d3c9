"""The page is one document that asks for no other file."""

from __future__ import annotations

import re
from pathlib import Path

from dgemma.server import page


def test_every_file_is_in_the_document_once() -> None:
    document = page.document()
    parts = [p for p in Path(page.__file__).parent.iterdir() if p.suffix in (".js", ".css")]
    assert len(parts) > 2
    for part in parts:
        text = part.read_text()
        assert document.count(text) == 1
        assert "</script" not in text
        assert "</style" not in text


def test_nothing_else_is_asked_for() -> None:
    document = page.document()
    assert not re.search(r"<script[^>]+src=", document)
    assert re.findall(r"<link[^>]+>", document) == ['<link rel="icon" href="data:,">']
    assert document.count("<script>") == document.count("</script>") > 1
