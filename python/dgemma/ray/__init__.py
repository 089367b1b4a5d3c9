"""dgemma on a Ray cluster: a server of many replicas, and batches over many workers.

Needs the extra `ray`, from the first use of `Settings` or `application` on. `application` is what
Serve's configuration files name (`import_path: dgemma.ray:application`); `dgemma serve --ray` and
`dgemma batch --ray` are the commands. Nothing else of the package imports this one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .deployments import Settings, application

__all__ = ["Settings", "application"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import deployments as module

    return getattr(module, name)
