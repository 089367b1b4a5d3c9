"""From messages to a prompt: normalisation, and the model's chat template in a sandbox."""

from .template import ChatTemplate, Message, instructed, normalized

__all__ = ["ChatTemplate", "Message", "instructed", "normalized"]
