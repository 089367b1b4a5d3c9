"""The endpoints, by whose API they are."""

from . import anthropic, llama, openai, responses, service

ROUTERS = (
    service.router,
    openai.router,
    responses.router,
    anthropic.router,
    llama.router,
)

__all__ = ["ROUTERS"]
