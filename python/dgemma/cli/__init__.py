"""The program `dgemma`."""

from .main import main

__all__ = ["main"]
