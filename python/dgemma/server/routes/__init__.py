"""The endpoints, by whose API they are."""

from . import llama, openai, service

ROUTERS = (service.router, openai.router, llama.router)

__all__ = ["ROUTERS"]
