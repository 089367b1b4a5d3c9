"""The HTTP server: the APIs of OpenAI and others over one model, and a page to talk with it."""

from .app import create_app
from .engine import Engine, Settings
from .local import LocalEngine
from .run import serve

__all__ = ["Engine", "LocalEngine", "Settings", "create_app", "serve"]
