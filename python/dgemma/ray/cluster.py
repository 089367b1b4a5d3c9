"""Starts or finds a cluster, serves on it, and ends in good order."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from types import FrameType

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere unless asked for

import ray
from ray import serve

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
    port = port or _free_port(host)
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
        if address == LOCAL:
            serve.shutdown()
            ray.shutdown()
        else:
            serve.delete(NAME)
    return 0


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as found:
        found.bind((host, 0))
        port: int = found.getsockname()[1]
    return port
