"""Sizes in bytes, as people read them."""

from __future__ import annotations


def size_text(n_bytes: float) -> str:
    """A size for people, in decimal units."""
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.4g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.2f} GB"
