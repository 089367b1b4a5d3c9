"""The Serve application: replicas that each run the server's own, and a gateway that finds them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from .. import hub
from ..generation.options import make_options
from ..model import DiffusionGemma
from ..server import engine as server
from ..server.access import api_keys
from ..server.app import create_app
from ..server.inprocess import exchange
from ..server.local import LocalEngine
from .gateway import Gateway
from .relayed import Head, RelayedRequest

NAME = "dgemma"
DRAIN_SECONDS = 120.0  # a replica that is to go finishes its answers within these


class Settings(BaseModel):
    """What the application is built from; `args` of a Serve configuration file.

    `model` is a path that every node has, or `hf_repo` names a file of the hub as `user/repo:TYPE`,
    which each node downloads once. `cpus` and `gpus` are what one replica takes; None: one GPU, or
    one CPU where the cluster has no GPU. From `replicas` on, up to `max_replicas`, the cluster adds
    replicas while more than `target_ongoing_requests` wait at each. `sampling` holds what requests
    leave open; `hosts`, `origins` and `strict` are those of `dgemma.server.engine.Settings`.
    """

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    hf_repo: str | None = None
    alias: str | None = None
    api_keys: list[str] = []
    api_key_file: str | None = None
    replicas: int = 1
    max_replicas: int | None = None
    cpus: float | None = None
    gpus: float | None = None
    target_ongoing_requests: float = 2.0
    affinity: bool = True
    max_queue: int = 256
    sessions: int | None = None
    session_bytes: int | None = None
    n_ctx: int = 8192
    n_threads: int | None = None
    n_gpu_layers: int | str = "auto"
    n_cpu_moe: int = 0
    device: str | None = None
    tensor_split: str | None = None
    backend: str = "auto"
    type_k: str = "f16"
    type_v: str = "f16"
    seed: int | None = None
    sampling: dict[str, float] = {}
    hosts: frozenset[str] | None = None
    origins: tuple[str, ...] = ()
    strict: bool = False

    def path(self) -> str:
        """The model's file on this node, downloaded where that is asked for."""
        if self.model is not None:
            return self.model
        if self.hf_repo is None:
            raise ValueError("neither model nor hf_repo is set: expected the one or the other")
        repo, _, quant = self.hf_repo.partition(":")
        return hub.download(repo, f"*{quant}*.gguf" if quant else "*.gguf")

    def open(self) -> DiffusionGemma:
        """The model, opened on this node."""
        llm = DiffusionGemma(
            self.path(),
            n_ctx=self.n_ctx,
            n_threads=self.n_threads,
            n_gpu_layers=self.n_gpu_layers,
            n_cpu_moe=self.n_cpu_moe,
            device=self.device,
            tensor_split=self.tensor_split,
            backend=self.backend,
            type_k=self.type_k,
            type_v=self.type_v,
            seed=self.seed,
        )
        sampling: dict[str, Any] = self.sampling
        llm.sampling = make_options(llm.sampling, **sampling).sampling
        return llm

    def app(self, llm: DiffusionGemma) -> FastAPI:
        """The server's application over a model."""
        engine = LocalEngine(
            llm,
            name=self.name(),
            max_queue=self.max_queue,
            n_sessions=self.sessions,
            session_bytes=self.session_bytes,
        )
        settings = server.Settings(
            api_keys=frozenset(api_keys(self.api_keys, self.api_key_file)),
            hosts=self.hosts,
            origins=self.origins,
            strict=self.strict,
            kept_bytes=0,  # the next request may come to another replica
        )
        return create_app(engine, settings)

    def name(self) -> str:
        """The model's name in the API."""
        return self.alias or Path(self.model or self.hf_repo or NAME).stem

    def resources(self) -> dict[str, float]:
        """What one replica takes of the cluster; asks Ray where nothing is set."""
        gpus = self.gpus
        if gpus is None:
            import ray

            gpus = 1.0 if ray.cluster_resources().get("GPU") and self.backend != "cpu" else 0.0
        return {"num_gpus": gpus, "num_cpus": 1.0 if self.cpus is None else self.cpus}


class Replica:
    """One model, and the server's application over it."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]
        """Opens the model; the replica is ready when that is done."""
        self._llm = settings.open()
        self._app = settings.app(self._llm)
        self._lifespan = self._app.router.lifespan_context(self._app)
        await self._lifespan.__aenter__()

    async def exchange(self, asked: RelayedRequest) -> AsyncIterator[Head | bytes]:
        """Answers a request: a `Head`, then the bytes of the body."""
        async for message in exchange(self._app, asked.http):
            if message["type"] == "http.response.start":
                yield Head(message["status"], list(message["headers"]))
            elif message["type"] == "http.response.body":
                yield message.get("body", b"")

    async def check_health(self) -> None:
        """Raises where the model cannot answer any more; Serve then replaces the replica."""
        self._llm.default_session.n_ctx  # noqa: B018 (a closed session raises)

    async def __del__(self) -> None:
        """Ends what is under way, after Serve has waited for it."""
        await self._lifespan.__aexit__(None, None, None)
        self._llm.close()


class Ingress:
    """The gateway as a deployment: it holds no model and takes no CPU of the cluster."""

    def __init__(self, replicas: DeploymentHandle, seeded: bool) -> None:
        self._ask = replicas.options(stream=True, method_name="exchange").remote
        self._seeded = seeded

    def __serve_build_asgi_app__(self) -> Gateway:
        """The ASGI application that Serve runs."""
        return Gateway(self._ask, seeded=self._seeded)


def application(settings: Settings) -> Application:
    """The application for `serve.run`, `serve deploy` and KubeRay."""
    scaling: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.max_replicas is not None and settings.max_replicas != settings.replicas:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=settings.replicas,
                max_replicas=settings.max_replicas,
                target_ongoing_requests=settings.target_ongoing_requests,
                upscale_delay_s=10.0,
            )
        }
    replicas = serve.deployment(
        Replica,
        name="replica",
        ray_actor_options=settings.resources(),
        # The replica itself refuses what its queue cannot take; Serve must hand it over for that.
        max_ongoing_requests=settings.max_queue + 64,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        health_check_period_s=5.0,
        request_router_config=RequestRouterConfig(
            request_router_class="dgemma.ray.router.PrefixRouter",
            request_router_kwargs={"affinity": settings.affinity},
        ),
        **scaling,
    )
    gateway = serve.deployment(
        serve.ingress()(Ingress),
        name="gateway",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=4096,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
    )
    bound: Application = gateway.bind(replicas.bind(settings), settings.seed is None)
    return bound
