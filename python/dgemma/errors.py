"""What can go wrong, as types. Wrong arguments are `ValueError` and `TypeError`, as everywhere."""

from __future__ import annotations


class Error(Exception):
    """Base of all errors of this package; its text says what was wrong and what to do."""


class ModelFileError(Error):
    """The file is damaged, or it is not a model that this engine runs."""


class ContextLengthError(Error):
    """The tokens do not fit the session's context.

    `n_prompt_tokens`, the prompt's tokens or what they are at least, and `n_ctx`, where known.
    """

    def __init__(
        self, message: str, *, n_prompt_tokens: int | None = None, n_ctx: int | None = None
    ) -> None:
        super().__init__(message)
        self.n_prompt_tokens, self.n_ctx = n_prompt_tokens, n_ctx


class OutOfMemoryError(Error):
    """The host or the device has too little memory."""


class BackendError(Error):
    """The device failed, or it is not there."""


class CancelledError(Error):
    """The call was cancelled, from another thread or by closing what it was using."""


class FileAccessError(Error, OSError):
    """A file could not be opened, read or written."""


class ChatTemplateError(Error, ValueError):
    """The chat template is broken, or cannot express these messages."""


class ResponseFormatError(Error):
    """The answer could not be brought into the form that was asked for."""


class OptionError(Error):
    """An argument or a field of a request is wrong.

    `param` is its name, where one is to blame; `code` says how, in the words of the OpenAI API.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value"):
        super().__init__(message)
        self.param = param
        self.code = code


class OptionValueError(OptionError, ValueError):
    """The value is out of its range, or asks for something that is not here."""


class OptionTypeError(OptionError, TypeError):
    """The value is of the wrong type, or nothing has that name."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_type"):
        super().__init__(message, param=param, code=code)


class IgnoredOptionWarning(UserWarning):
    """An option was given that changes nothing here."""
