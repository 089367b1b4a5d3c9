"""Writes the C source of the Python extension from the public header.

    python build_cffi.py native/include/dgemma.h _dgemma.c

The declarations between the header's two `cdef` lines are the only copy of them: what Python sees
and what C compiles cannot drift apart.
"""

import re
import sys
from pathlib import Path

from cffi import FFI

# C calls these; dgemma._native defines them.
CALLBACKS = 'extern "Python" bool dgemma_progress(float done, void *user);'


def declarations(header: str) -> str:
    """Returns the part of dgemma.h that a C parser without a preprocessor can read."""
    found = re.search(r"/\* cdef begin \*/(.*)/\* cdef end \*/", header, re.DOTALL)
    if found is None:
        raise SystemExit("build_cffi: the header lacks its `cdef begin` and `cdef end` lines")
    return found[1]


def main(header: Path, target: Path) -> None:
    """Writes `target`, a C file, for the declarations of `header`."""
    ffi = FFI()
    ffi.cdef(declarations(header.read_text(encoding="utf-8")) + CALLBACKS)
    ffi.set_source("dgemma._dgemma", '#include "dgemma.h"')
    ffi.emit_c_code(str(target))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
