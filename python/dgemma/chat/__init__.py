"""From messages to a prompt: normalisation, and the model's chat template in a sandbox."""

from .messages import Message, instructed, normalized
from .template import ChatTemplate, check_template

__all__ = ["ChatTemplate", "Message", "check_template", "instructed", "normalized"]
