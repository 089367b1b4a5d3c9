"""A loaded model, and what a session over it would take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np

from .._dgemma import ffi, lib
from ..errors import Error
from ..values import GpuPlan, GpuShare, Memory, ModelInfo, Progress, Sampling
from .calls import MAX_GPUS, Call, PathLike, c_path, check, int32
from .file import File
from .types import type_info

_BACKENDS = {
    "auto": lib.DG_BACKEND_AUTO,
    "cpu": lib.DG_BACKEND_CPU,
    "cuda": lib.DG_BACKEND_CUDA,
}


class SessionParams(TypedDict, total=False):
    """The parameters of a session; see dg_session_params in dgemma.h."""

    n_ctx: int
    n_batch: int
    n_threads: int
    type_k: int | str
    type_v: int | str
    soft_embedding_bound: float | None
    n_rewind: int | None


def session_params(
    *,
    n_ctx: int = 0,
    n_batch: int = 512,
    n_threads: int = 0,
    type_k: int | str = "f16",
    type_v: int | str = "f16",
    soft_embedding_bound: float | None = None,
    n_rewind: int | None = None,
) -> Any:
    """A filled `dg_session_params *`."""
    params = ffi.new("dg_session_params *", lib.dg_session_params_default())
    params.n_ctx = int32("n_ctx", n_ctx)
    params.n_batch = int32("n_batch", n_batch)
    params.n_threads = int32("n_threads", n_threads)
    params.type_k = type_info(type_k).id
    params.type_v = type_info(type_v).id
    if soft_embedding_bound is not None:
        params.soft_embedding_bound = soft_embedding_bound
    if n_rewind is not None:
        params.n_rewind = int32("n_rewind", n_rewind)
    return params


def _sampling(c: Any) -> Sampling:
    # C holds float32: str() finds the shortest decimal that means the same, 0.4 and not 0.40000001.
    values: dict[str, Any] = {}
    for name in Sampling.__annotations__:
        value = getattr(c, name)
        values[name] = float(str(np.float32(value))) if isinstance(value, float) else value
    return Sampling(**values)


class Model:
    """Weights, read-only and shared by any number of sessions on any number of threads.

    `backend`: "auto", "cpu" or "cuda". `n_gpu_layers`: the last so many layers are kept on the
    GPU; -1: as many as fit beside a session with the parameters `session` (those of `Session`).
    `device` and `tensor_split` choose GPUs and divide layers over them: see dg_model_params.
    `use_mmap`: False reads the file into memory.
    """

    def __init__(
        self,
        path: PathLike,
        *,
        backend: str = "auto",
        n_gpu_layers: int = -1,
        n_cpu_moe: int = 0,
        device: str | None = None,
        tensor_split: str | None = None,
        use_mmap: bool = True,
        progress: Progress | None = None,
        session: SessionParams | None = None,
    ) -> None:
        if backend not in _BACKENDS:
            raise ValueError(f"unknown backend {backend!r}: expected auto, cpu or cuda")
        call = Call(progress)
        params = ffi.new("dg_model_params *", lib.dg_model_params_default())
        params.backend = _BACKENDS[backend]
        params.n_gpu_layers = int32("n_gpu_layers", n_gpu_layers)
        params.n_cpu_moe = int32("n_cpu_moe", n_cpu_moe)
        names = [ffi.new("char[]", (text or "").encode()) for text in (device, tensor_split)]
        params.device, params.tensor_split = names
        params.use_mmap = use_mmap
        params.progress = lib.dgemma_progress
        params.user = call.handle
        sessions = session_params(**session) if session is not None else ffi.NULL
        params.session = sessions
        out, error = ffi.new("dg_model **"), ffi.new("dg_error *")
        call.check(lib.dg_model_open(c_path(path), params, out, error), error)
        self._model: Any = ffi.gc(out[0], lib.dg_model_close)
        self.info = _model_info(self._model)

    def pointer(self) -> Any:
        """The open `dg_model *`; Error after `close`."""
        model = self._model
        if model is None:
            raise Error("this model is closed: load it again")
        return model

    @property
    def file(self) -> File:
        """The file it was loaded from."""
        return File.of(self.pointer())

    def memory(self, **params: Any) -> Memory:
        """What a session with these parameters (those of `Session`) would take."""
        memory, error = ffi.new("dg_memory *"), ffi.new("dg_error *")
        model = self.pointer()
        check(lib.dg_session_memory(model, session_params(**params), memory, error), error)
        return Memory(memory.weights, memory.cache, memory.scratch)

    def gpu_plan(
        self,
        available: int | Sequence[int] = 0,
        n_gpu_layers: int = -1,
        n_cpu_moe: int = 0,
        proportions: Sequence[float] = (),
        **params: Any,
    ) -> GpuPlan:
        """What the model and a session with `params` (those of `Session`) would take on a GPU.

        With `n_gpu_layers` -1 as many layers and experts as fit into `available` bytes are placed
        on it; of several numbers, each is what is free on one GPU. Layers are divided over these by
        `proportions`, or by what is free. Needs no GPU. OutOfMemoryError where not even the
        embedding would fit.
        """
        cards = [available] if isinstance(available, int) else list(available)
        if not 1 <= len(cards) <= MAX_GPUS or len(proportions) not in (0, len(cards)):
            raise ValueError(
                f"{len(cards)} GPUs with {len(proportions)} proportions: expected 1 to {MAX_GPUS}, "
                "and a proportion for each or none"
            )
        plan, error = ffi.new("dg_gpu_plan *"), ffi.new("dg_error *")
        plan.size = ffi.sizeof("dg_gpu_plan")
        plan.n_gpus = len(cards)
        for i, card in enumerate(cards):
            plan.gpus[i].available = card
            plan.gpus[i].proportion = proportions[i] if proportions else 0.0
        plan.n_gpu_layers = int32("n_gpu_layers", n_gpu_layers)
        plan.n_cpu_moe = int32("n_cpu_moe", n_cpu_moe)
        model, session = self.pointer(), session_params(**params)
        check(lib.dg_model_plan_gpu(model, session, plan, error), error)
        shares = [_numbers(plan.gpus[i], GpuShare) for i in range(len(cards))]
        return GpuPlan(**_numbers(plan, GpuPlan), gpus=tuple(GpuShare(**s) for s in shares))

    def close(self) -> None:
        """Lets go of the weights; they stay until the last session and view are gone."""
        self._model = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_model(path: PathLike) -> None:
    """ModelFileError or another Error, with the reason, where `Model` would not open the file."""
    error = ffi.new("dg_error *")
    check(lib.dg_model_check(c_path(path), error), error)


def _numbers(c: Any, kind: type[Any]) -> dict[str, int]:
    """The whole numbers of a C struct that a value of this kind has as well."""
    return {
        name: int(getattr(c, name)) for name, what in kind.__annotations__.items() if what == "int"
    }


def _model_info(model: Any) -> ModelInfo:
    c = ffi.new("dg_model_info *")
    c.size = ffi.sizeof("dg_model_info")
    lib.dg_model_describe(model, c)
    return ModelInfo(
        **_numbers(c, ModelInfo),
        sampling=_sampling(c.sampling),
        end_tokens=tuple(c.end_tokens[i] for i in range(c.n_end_tokens)),
        backend=next(name for name, kind in _BACKENDS.items() if kind == c.backend),
        backend_name=ffi.string(c.backend_name).decode(),
        backend_note=ffi.string(c.backend_note).decode(),
        file_note=ffi.string(c.file_note).decode(),
        gpus=tuple(c.gpus[i] for i in range(c.n_gpus)),
        gpu_layers=tuple(c.gpu_layers[i] for i in range(c.n_gpus)),
    )
