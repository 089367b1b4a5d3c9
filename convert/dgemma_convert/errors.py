"""The converter's one exception."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from dgemma.errors import Error
from dgemma.files import reason_of


class ConvertError(Error):
    """The conversion cannot be done; the message is one line for the user.

    It says what was wrong, what was expected and, where that helps, what to do.
    """


def from_os_error(error: OSError, doing: str) -> ConvertError:
    """A one-line account of `error`, which happened while `doing` something."""
    if isinstance(error, Error):
        return ConvertError(str(error))
    name = error.filename
    path = f"{os.fsdecode(name)}: " if isinstance(name, (str, bytes)) else ""
    return ConvertError(f"{path}{doing} failed: {reason_of(error)}")


@contextlib.contextmanager
def failing_in_words(doing: str) -> Iterator[None]:
    """Whatever goes wrong inside, with the disk or with a file, becomes a ConvertError."""
    try:
        yield
    except ConvertError:
        raise
    except OSError as error:
        raise from_os_error(error, doing) from error
    except Error as error:
        raise ConvertError(str(error)) from error
