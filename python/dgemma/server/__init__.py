"""The HTTP server: the OpenAI API over one model, and a page to talk with it."""

from .run import serve

__all__ = ["serve"]
