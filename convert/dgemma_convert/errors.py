"""The converter's one exception."""

from __future__ import annotations

import errno
import os


class ConvertError(Exception):
    """The conversion cannot be done; the message is one line for the user.

    It says what was wrong, what was expected and, where that helps, what to do.
    """


def from_os_error(error: OSError, doing: str) -> ConvertError:
    """A one-line account of `error`, which happened while `doing` something."""
    name = error.filename
    path = f"{os.fsdecode(name)}: " if isinstance(name, (str, bytes)) else ""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = "no space left on the device; free some, or choose another --outfile"
    return ConvertError(f"{path}{doing} failed: {reason}")
