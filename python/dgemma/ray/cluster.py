"""Starts or finds a cluster, serves on it, and ends in good order."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from types import FrameType

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere unless asked for

import ray
from ray import serve

from ..server.run import listening
from .deployments import NAME, Settings, application

LOCAL = "local"


def connect(address: str) -> None:
    """Joins the cluster at `address`; "local" starts one on this machine, "auto" finds one here.

    Errors: ConnectionError with what to do.
    """
    if ray.is_initialized():
        return
    quiet = {"log_to_driver": False, "logging_level": logging.WARNING}
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # At every start Ray warns that a token protects the cluster; docs/cluster.md says it once.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    try:
        if address == LOCAL:
            ray.init(include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as problem:
        raise ConnectionError(
            f"no Ray cluster answers at {address}: {problem}. "
            "Start one with `ray start --head`, or leave the address out"
        ) from None


def serve_on_ray(settings: Settings, *, address: str, host: str, port: int) -> int:
    """Serves until SIGINT or SIGTERM; returns the exit code.

    Replicas finish their answers before they go. On a cluster that was there before only the
    application is taken away.
    """
    if address == LOCAL or not port:  # on another cluster the port may be its own proxy's
        with listening(host, port) as found:
            port = found.getsockname()[1]
    connect(address)
    told = threading.Event()

    def stop(_: int, __: FrameType | None) -> None:
        told.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(application(settings), name=NAME, route_prefix="/")
        shown = f"[{host}]" if ":" in host else host
        print(f"dgemma: http://{shown}:{port}", file=sys.stderr, flush=True)
        told.wait()
    finally:
        serve.delete(NAME)
        if address == LOCAL:
            ray.shutdown()
    return 0
