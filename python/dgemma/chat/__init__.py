"""From messages to a prompt: normalisation, and the model's chat template in a sandbox."""

from .template import ChatTemplate, Message, check_template, instructed, normalized

__all__ = ["ChatTemplate", "Message", "check_template", "instructed", "normalized"]
