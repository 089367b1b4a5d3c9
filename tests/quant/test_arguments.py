"""What the encoders take and refuse, and what they leave alone."""

from __future__ import annotations

import numpy as np
import pytest
from dgemma._dgemma import ffi, lib

from dgemma import _native
from support.quants import (
    ALL,
    BLOCKS,
    ENCODED,
    READ_ONLY,
    SUPER_BLOCKS,
    encoded,
    gguf_decoded,
    gguf_type,
    make_weights,
    sizes,
)

GUARD = 64  # bytes on both sides of a buffer that a call writes


@pytest.mark.parametrize("name", ENCODED)
def test_threads_and_neighbours_change_nothing(name):
    values = make_weights("heavy", (19, 1280))  # pieces of 4096 elements begin inside rows
    importance = np.random.default_rng(3).uniform(0.1, 2, 1280).astype(np.float32)
    for weights in (None, importance):
        whole, _ = encoded(values, name, threads=1, importance=weights)
        for threads in (2, 5):
            again, _ = encoded(values, name, threads=threads, importance=weights)
            assert np.array_equal(whole, again)
        rows = [encoded(row[None], name, importance=weights)[0] for row in values]
        assert np.array_equal(whole, np.concatenate(rows))


@pytest.mark.parametrize("source", ALL)
def test_sources_of_every_type(source):
    """What is encoded is what the source decodes to."""
    block_size, block_bytes = sizes(source)
    shape = (5, 2 * max(block_size, 256))
    n_blocks = shape[0] * shape[1] // block_size
    if source in READ_ONLY:
        data = np.random.default_rng(4).integers(0, 256, (n_blocks, block_bytes), dtype=np.uint8)
        data[:, :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    else:
        data, _ = encoded(make_weights("normal", shape), source)
    values = gguf_decoded(source, data, shape)
    for target in ("f32", "bf16", "q8_0", "q4_k"):
        if target != source:
            direct, _ = _native.quantize(data, source, target, *shape)
            assert np.array_equal(direct, encoded(values, target)[0])


@pytest.mark.parametrize("name", ENCODED)
def test_same_type_is_a_copy(name):
    values = make_weights("heavy", (5, 512))
    data, _ = encoded(values, name)
    again, multiplier = _native.quantize(data, name, name, 5, 512, with_multiplier=True)
    assert np.array_equal(again, data)
    assert multiplier == 1.0


@pytest.mark.parametrize("name", ENCODED)
def test_empty_matrices(name):
    block_size, _ = sizes(name)
    for shape in ((0, block_size), (3, 0)):
        assert encoded(np.zeros(shape, np.float32), name)[0].size == 0
        assert _native.dequantize(np.zeros(0, np.uint8), name, *shape).shape == shape


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_written_outside(name):
    """Widths that fill no vector, and more than one piece of work."""
    block_size, block_bytes = sizes(name)
    for n_rows, n_blocks in ((1, 1), (3, 5), (1, 4100 // block_size + 1)):
        values = make_weights("normal", (n_rows, n_blocks * block_size))
        n_bytes = n_rows * n_blocks * block_bytes
        if name not in READ_ONLY:
            out = np.full(n_bytes + 2 * GUARD, 0xA5, np.uint8)
            pointer = ffi.from_buffer(out) + GUARD
            status = lib.dg_quantize(
                0, ffi.from_buffer(values), int(gguf_type(name)), pointer,
                *values.shape, ffi.NULL, ffi.NULL, 2, ffi.NULL,
            )  # fmt: skip
            assert status == lib.DG_OK
            assert (np.concatenate([out[:GUARD], out[-GUARD:]]) == 0xA5).all()
            data = out[GUARD:-GUARD].copy()
        else:
            data = np.random.default_rng(6).integers(0, 256, n_bytes, dtype=np.uint8)
        decoded = np.full(values.size + 2 * GUARD, np.float32(-7.0))
        target = ffi.from_buffer("float[]", decoded) + GUARD
        status = lib.dg_dequantize(
            int(gguf_type(name)), ffi.from_buffer(data), target, *values.shape, 2, ffi.NULL
        )
        assert status == lib.DG_OK
        assert (np.concatenate([decoded[:GUARD], decoded[-GUARD:]]) == -7).all()


@pytest.mark.parametrize("name", BLOCKS + SUPER_BLOCKS)
def test_width_that_is_not_a_multiple_of_the_block(name):
    block_size, _ = sizes(name)
    for width in (1, block_size - 1, block_size + 1, 3 * block_size // 2):
        values, out = np.zeros((2, width), np.float32), np.zeros(8 * width, np.uint8)
        error = ffi.new("dg_error *")
        status = lib.dg_quantize(
            0, ffi.from_buffer(values), int(gguf_type(name)), ffi.from_buffer(out),
            2, width, ffi.NULL, ffi.NULL, 1, error,
        )  # fmt: skip
        message = ffi.string(error.message).decode()
        assert status == lib.DG_ERROR_ARGUMENT == error.status
        assert f"{width} elements cannot be {name}, whose blocks hold {block_size}" in message


@pytest.mark.parametrize(("n_rows", "n_cols"), [(-1, 32), (1, -32), (2**62, 64), (2**32, 2**32)])
def test_sizes_that_cannot_be(n_rows, n_cols):
    error = ffi.new("dg_error *")
    status = lib.dg_quantize(0, ffi.NULL, 2, ffi.NULL, n_rows, n_cols, ffi.NULL, ffi.NULL, 1, error)
    assert status == lib.DG_ERROR_ARGUMENT
    assert f"{n_rows} rows and {n_cols} columns" in ffi.string(error.message).decode()
    assert lib.dg_dequantize(2, ffi.NULL, ffi.NULL, n_rows, n_cols, 1, ffi.NULL) == status


@pytest.mark.parametrize("name", READ_ONLY)
def test_types_that_are_only_read(name):
    with pytest.raises(ValueError, match=f"{name} can be read but not written"):
        encoded(np.zeros((1, 256), np.float32), name)


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(name, bad):
    """The first one is named, whichever thread finds another before."""
    values = make_weights("normal", (40, 512))
    values[29, 301] = values[31, 5] = values[39, 511] = bad
    for with_multiplier in (False, True):
        with pytest.raises(ValueError, match=r"row 29, column 301 is -?(nan|inf).*finite"):
            encoded(values, name, with_multiplier=with_multiplier, threads=2)
    halves = (values.view(np.uint32) >> 16).astype(np.uint16)
    with pytest.raises(ValueError, match="row 29, column 301"):
        encoded(halves, name, source="bf16")


@pytest.mark.parametrize("name", ["f16", *BLOCKS, *SUPER_BLOCKS])
def test_weights_beyond_the_format(name):
    values = make_weights("normal", (2, 512))
    values[1, 7] = -1e6
    with pytest.raises(ValueError, match=f"row 1, column 7 is -1e.06; {name} takes at most"):
        encoded(values, name)


def test_importance_must_be_finite_and_not_negative():
    values = make_weights("normal", (2, 64))
    for bad in (-1.0, np.nan, np.inf):
        importance = np.ones(64, np.float32)
        importance[33] = bad
        with pytest.raises(ValueError, match="importance of column 33"):
            encoded(values, "q4_0", importance=importance)


def test_number_of_threads_is_checked():
    with pytest.raises(ValueError, match="n_threads is -1"):
        encoded(make_weights("normal", (2, 64)), "q4_0", threads=-1)
