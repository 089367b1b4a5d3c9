"""Sessions: one conversation each, safe to cancel and to close from any thread."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from .._dgemma import ffi, lib
from ..errors import Error, OptionTypeError, OptionValueError
from ..values import (
    Activations,
    CanvasNoise,
    CanvasStep,
    FloatArray,
    IdArray,
    Ids,
    Operation,
    Progress,
    Sampling,
)
from .calls import Call, PathLike, c_path, check, copied, int32
from .model import Model, session_params


def _free_session(session: Any, pid: int) -> None:
    # The pool's threads do not survive a fork: a child that joined them would wait for ever.
    if os.getpid() == pid:
        lib.dg_session_free(session)


def _activations(c: Any) -> Activations:
    sums = copied(c.sums, c.n_matrices * c.n_cols, np.float64)
    return Activations(
        sums.reshape(c.n_matrices, c.n_cols), copied(c.counts, c.n_matrices, np.int64)
    )


def token_ids(tokens: Ids) -> IdArray:
    """Token ids as C takes them; TypeError and ValueError for what are none."""
    array = np.asarray(tokens)
    if array.size == 0:
        return np.zeros(0, np.int32)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise OptionTypeError("tokens must be a flat sequence of integers")
    if array.min() < -(2**31) or array.max() >= 2**31:
        raise OptionValueError("a token id does not fit 32 bits")
    return np.ascontiguousarray(array, np.int32)


class Session:
    """One conversation: its cache, scratch and random state; see dgemma.h for the parameters.

    One call runs at a time; others wait. `cancel` and `close` work from any thread: a call that
    is running then raises CancelledError within one denoising step.
    """

    def __init__(self, model: Model, **params: Any) -> None:
        out, error = ffi.new("dg_session **"), ffi.new("dg_error *")
        given = session_params(**params)
        status = lib.dg_session_create(model.pointer(), given, out, error)
        check(status, error)
        pid = os.getpid()
        self._session: Any = ffi.gc(out[0], lambda session: _free_session(session, pid))
        self._pid = pid
        self.n_ctx = int(lib.dg_session_n_ctx(out[0]))  # tokens of context, the canvas included
        self.n_threads = int(lib.dg_session_n_threads(out[0]))  # that it works with on the CPU
        self.n_rewind = min(int(given.n_rewind), self.n_ctx)  # tokens that truncate can take back
        self._info = model.info
        self._calls = threading.Lock()  # held while C works on the session
        self._owner: int | None = None  # the thread that holds it
        self._ending = threading.Lock()  # guards the pointer between cancel and the final free
        self._closed = False
        # Answers are many calls each; see generation/turns.py for whose turn it is.
        self.turns = threading.Condition()
        self.turn: Any = None
        self._canvas: Any = None  # what a canvas under way points to

    @contextlib.contextmanager
    def _call(self) -> Iterator[Any]:
        if self._pid != os.getpid():
            raise Error("a session does not survive fork: create one in the new process")
        if self._owner == threading.get_ident():
            raise Error("the session is busy with the call that made this callback")
        with self._calls:
            self._owner = threading.get_ident()
            try:
                if self._closed:
                    raise Error("this session is closed: create another one")
                yield self._session
            finally:
                self._owner = None
                if self._closed:
                    self._free()

    def _free(self) -> None:
        with self._ending:
            if self._session is not None:
                ffi.release(self._session)
                self._session = None

    def close(self) -> None:
        """Cancels what runs and gives the memory back; twice is no error."""
        if self._pid != os.getpid():
            return
        self._closed = True
        self.cancel()
        if self._owner == threading.get_ident():
            return  # closed from a callback: the call that runs frees it when it leaves
        with self._calls:
            self._free()

    def cancel(self) -> None:
        """Ends the call that runs, or else the next one, with CancelledError."""
        with self._ending:
            if self._session is not None:
                lib.dg_session_cancel(self._session)

    def resume(self) -> None:
        """Takes back a cancellation that no call has seen yet."""
        with self._ending:
            if self._session is not None and not self._closed:
                lib.dg_session_resume(self._session)

    @property
    def n_past(self) -> int:
        """Tokens in the cache."""
        with self._call() as session:
            return int(lib.dg_session_n_past(session))

    @property
    def tokens(self) -> IdArray:
        """Ids of the tokens in the cache, (n_past,)."""
        with self._call() as session:
            n = lib.dg_session_n_past(session)
            return copied(lib.dg_session_tokens(session), n, np.int32)

    def prefill(self, tokens: Ids, progress: Progress | None = None) -> int:
        """Encodes tokens and appends them to the cache; returns n_past.

        ContextLengthError, with nothing changed, where they would leave no room for a canvas.
        """
        ids, call, error = token_ids(tokens), Call(progress), ffi.new("dg_error *")
        with self._call() as session:
            pointer = ffi.from_buffer("int32_t[]", ids)
            status = lib.dg_session_prefill(
                session, pointer, len(ids), lib.dgemma_progress, call.handle, error
            )
            call.check(status, error)
            return int(lib.dg_session_n_past(session))

    def truncate(self, n: int) -> int:
        """Forgets all tokens from position `n` on; returns n_past.

        That is 0, not `n`, where the sliding layers no longer hold what position `n` needs: more
        than `n_rewind` tokens, a parameter of the session, were encoded behind it.
        """
        error = ffi.new("dg_error *")
        with self._call() as session:
            check(lib.dg_session_truncate(session, int32("n", n), error), error)
            return int(lib.dg_session_n_past(session))

    def canvas_logits(
        self, canvas: Ids, self_conditioning_logits: npt.ArrayLike | None = None
    ) -> FloatArray:
        """Soft-capped float32 logits (canvas, vocab) at temperature 1, for one decoder pass.

        `self_conditioning_logits` (canvas, vocab): the previous step's logits divided by its
        temperature; None on a first step.
        """
        shape = (self._info.canvas_length, self._info.n_vocab)
        ids, error = self._canvas_ids(canvas, "canvas"), ffi.new("dg_error *")
        previous = ffi.NULL
        if self_conditioning_logits is not None:
            given = np.ascontiguousarray(self_conditioning_logits, np.float32)
            if given.shape != shape:
                raise OptionValueError(
                    f"self_conditioning_logits must have shape {shape}, not {given.shape}"
                )
            previous = ffi.from_buffer("float[]", given)
        logits = np.empty(shape, np.float32)
        with self._call() as session:
            tokens = ffi.from_buffer("int32_t[]", ids)
            out = ffi.from_buffer("float[]", logits)
            check(lib.dg_session_canvas_logits(session, tokens, previous, out, error), error)
        return logits

    def _canvas_ids(self, tokens: Ids, name: str) -> IdArray:
        ids = token_ids(tokens)
        if len(ids) != self._info.canvas_length:
            raise OptionValueError(
                f"{name} must have {self._info.canvas_length} tokens, one canvas, not {len(ids)}"
            )
        return ids

    def begin_canvas(
        self,
        sampling: Sampling | None = None,
        *,
        seed: int = 0,
        canvas: int = 0,
        start: Ids | None = None,
        pinned: Ids | None = None,
        noise: CanvasNoise | None = None,
    ) -> None:
        """Begins a canvas behind the cache, which is read and never written.

        `canvas`: its number in this answer, from 0. `start` (canvas,): tokens to start from, or
        None for random ones. `pinned` (canvas,): tokens that stay as they are, -1 where free.
        """
        sampling = sampling or self._info.sampling
        c = ffi.new("dg_canvas_params *")
        c.size = ffi.sizeof("dg_canvas_params")
        for name, value in vars(sampling).items():
            setattr(c.sampling, name, int32(name, value) if isinstance(value, int) else value)
        c.seed = seed & (2**64 - 1)
        c.canvas = int32("canvas", canvas)
        kept: list[Any] = [c]  # C reads these until the last step
        for name, tokens in (("start", start), ("pinned", pinned)):
            if tokens is not None:
                kept.append(ffi.from_buffer("int32_t[]", self._canvas_ids(tokens, name)))
                setattr(c, name, kept[-1])
        if noise is not None:
            c.noise = self._noise(noise, kept)
        error = ffi.new("dg_error *")
        with self._call() as session:
            check(lib.dg_canvas_begin(session, c, error), error)
            self._canvas = kept

    def _noise(self, noise: CanvasNoise, kept: list[Any]) -> Any:
        candidates = np.ascontiguousarray(noise.candidates, np.int32)
        renoise = np.ascontiguousarray(noise.renoise, np.int32)
        initial = self._canvas_ids(np.asarray(noise.initial), "initial")
        shape = (len(candidates), self._info.canvas_length)
        if candidates.shape != shape or renoise.shape != shape:
            raise OptionValueError(
                f"candidates and renoise must both have shape (n_steps, {self._info.canvas_length})"
            )
        c = ffi.new("dg_noise *")
        c.n_steps = len(candidates)
        arrays = (("initial", initial), ("candidates", candidates), ("renoise", renoise))
        for name, array in arrays:
            kept.append(ffi.from_buffer("int32_t[]", array))
            setattr(c, name, kept[-1])
        kept.append(c)
        return c

    def step(self) -> CanvasStep:
        """Runs one denoising step of the canvas under way."""
        draft, error = ffi.new("dg_draft *"), ffi.new("dg_error *")
        n = self._info.canvas_length
        with self._call() as session:
            check(lib.dg_canvas_step(session, draft, error), error)
            return CanvasStep(
                step=draft.step,
                n_accepted=draft.n_accepted,
                temperature=draft.temperature,
                mean_entropy=draft.mean_entropy,
                done=draft.done,
                settled=draft.settled,
                tokens=copied(draft.tokens, n, np.int32),
                canvas=copied(draft.canvas, n, np.int32),
                entropies=copied(draft.entropies, n, np.float32),
            )

    def save(self, path: PathLike) -> None:
        """Writes the cache to a file."""
        error = ffi.new("dg_error *")
        with self._call() as session:
            check(lib.dg_session_save(session, c_path(path), error), error)

    def load(self, path: PathLike) -> None:
        """Reads a cache that `save` wrote for the same model and cache types."""
        error = ffi.new("dg_error *")
        with self._call() as session:
            check(lib.dg_session_load(session, c_path(path), error), error)

    def operations(self) -> list[Operation]:
        """Time and work per operation since creation or the last reset."""
        with self._call() as session:
            n = lib.dg_session_operations(session, ffi.NULL, 0)
            out = ffi.new("dg_operation[]", n)
            n = min(n, lib.dg_session_operations(session, out, n))
            return [
                Operation(ffi.string(o.name).decode(), o.calls, o.seconds, o.flop, o.bytes)
                for o in out[0:n]
            ]

    def append_random(self, n: int) -> int:
        """Puts `n` tokens with random keys and values behind the cache; returns n_past.

        For measuring: a step takes as long behind them as behind a prompt of that length.
        """
        error = ffi.new("dg_error *")
        with self._call() as session:
            check(lib.dg_session_append_random(session, int32("n", n), error), error)
            return int(lib.dg_session_n_past(session))

    def reset_operations(self) -> None:
        """Starts the counts of `operations` again."""
        with self._call() as session:
            lib.dg_session_reset_operations(session)

    def start_collecting(self) -> None:
        """From now on adds up the activations that each weight meets, from zero.

        BackendError where the device cannot do that: only the CPU can.
        """
        error = ffi.new("dg_error *")
        with self._call() as session:
            check(lib.dg_session_collect_begin(session, error), error)

    def collected(self) -> dict[str, Activations]:
        """Sums since `start_collecting` for each weight, by the tensor's name, copied."""
        with self._call() as session:
            n = lib.dg_session_collected(session, ffi.NULL, 0)
            out = ffi.new("dg_activations[]", max(n, 1))
            lib.dg_session_collected(session, out, n)
            return {ffi.string(a.name).decode(): _activations(a) for a in out[0:n]}

    def stop_collecting(self) -> None:
        """Gives the sums' memory back."""
        with self._call() as session:
            lib.dg_session_collect_end(session)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
