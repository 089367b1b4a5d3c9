"""Block formats: decoding against the `gguf` package, bit for bit; encoding by its error."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma import _native
from support.quants import (
    ALL,
    BLOCKS,
    KINDS,
    READ_ONLY,
    SEARCHED,
    SUPER_BLOCKS,
    encoded,
    gguf_decoded,
    gguf_type,
    make_weights,
    rms,
    round_trip,
    same_bits,
    sizes,
)

# ---- Description ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_type_is_described_as_by_gguf(name):
    info = _native.type_info(int(gguf_type(name)))
    assert (info.name, info.block_size, info.block_bytes) == (name, *sizes(name))
    assert (info.decodes, info.encodes) == (True, name not in READ_ONLY)


@pytest.mark.parametrize("number", [-1, 4, 5, 9, 15, 29, 31, 41, 2**31 - 1, -(2**31)])
def test_unknown_type_is_refused(number):
    with pytest.raises(ValueError, match=f"no tensor type {number}"):
        _native.type_info(number)


# ---- Decoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_rows", "n_blocks"), [(1, 1), (2, 1), (3, 2), (7, 5), (2, 150)])
@pytest.mark.parametrize("name", ALL)
def test_decodes_like_gguf(name, n_rows, n_blocks):
    """Random bytes: every code occurs, and scales that are infinite, NaN or subnormal."""
    block_size, block_bytes = sizes(name)
    shape = (n_rows, n_blocks * block_size)
    rng = np.random.default_rng(n_rows * 1000 + n_blocks)
    data = rng.integers(0, 256, n_rows * n_blocks * block_bytes, dtype=np.uint8)
    assert same_bits(_native.dequantize(data, name, *shape), gguf_decoded(name, data, shape))


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_decodes_every_half(name):
    data = np.arange(65536, dtype=np.uint16)
    expected = gguf_decoded(name, data, (1, 65536))
    assert same_bits(_native.dequantize(data, name, 1, 65536), expected)


def test_decodes_every_nvfp4_scale_and_code():
    blocks = np.zeros((64, 36), np.uint8)
    blocks[:, :4] = np.arange(256).reshape(64, 4)
    blocks[:, 4:] = np.tile((np.arange(8) | np.arange(8, 16) << 4).astype(np.uint8), 4)
    expected = gguf_decoded("nvfp4", blocks, (64, 64))
    assert same_bits(_native.dequantize(blocks, "nvfp4", 64, 64), expected)


@pytest.mark.parametrize("name", ALL)
def test_unaligned_source(name):
    """A file may put a tensor at any address."""
    block_size, block_bytes = sizes(name)
    data = np.random.default_rng(1).integers(0, 256, 3 * block_bytes + 1, dtype=np.uint8)[1:]
    shape = (1, 3 * block_size)
    assert same_bits(_native.dequantize(data, name, *shape), gguf_decoded(name, data, shape))


# ---- Encoding: how close -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_error_is_at_most_that_of_gguf(name, kind):
    values = make_weights(kind)
    judge = gguf_decoded(name, gguf.quants.quantize(values, gguf_type(name)), values.shape)
    ours, theirs = rms(round_trip(values, name) - values), rms(judge - values)
    assert ours <= theirs
    if name != "q8_0" and kind != "outliers":
        assert ours <= 0.98 * theirs, "the search for the scale gains nothing"


def nvfp4_without_search(values: np.ndarray) -> np.ndarray:
    """amax / 6 as the scale of a group, without a multiplier."""
    groups = values.reshape(-1, 16)
    codes = gguf.quants.NVFP4.fp32_to_ue4m3(np.abs(groups).max(axis=1, keepdims=True) / 6)
    scales = gguf.quants.NVFP4.ue4m3_to_fp32(codes).astype(np.float32)
    levels = np.array(gguf.quants.NVFP4.kvalues[:8], np.float32)
    steps = np.abs(groups) / np.where(scales > 0, scales, np.inf)
    nearest = levels[np.abs(steps[..., None] - levels).argmin(axis=-1)]
    return (np.sign(groups) * nearest * scales).reshape(values.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_nvfp4_error_is_below_that_without_search(kind):
    values = make_weights(kind)
    assert rms(round_trip(values, "nvfp4") - values) <= rms(nvfp4_without_search(values) - values)


@pytest.mark.parametrize("kind", ["normal", "heavy", "outliers"])
def test_nvfp4_search_gains_without_multiplier(kind):
    values = make_weights(kind)
    ours = round_trip(values, "nvfp4", with_multiplier=False)
    assert rms(ours - values) <= rms(nvfp4_without_search(values) - values)


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e-4, 1.0, 3e4, 1e30])
def test_nvfp4_multiplier_makes_the_error_independent_of_the_scale(scale):
    values = make_weights("normal")
    scaled = (values * np.float32(scale)).astype(np.float32)
    expected = rms(round_trip(values, "nvfp4") - values) / rms(values)
    actual = rms(round_trip(scaled, "nvfp4") - scaled) / rms(scaled)
    assert actual == pytest.approx(expected, rel=0.02)


def test_nvfp4_multiplier_uses_the_whole_range_of_scales():
    values = make_weights("normal")
    data, multiplier = encoded(values, "nvfp4", with_multiplier=True)
    # Of the octave that is searched; the largest group scale is then within an octave of 448.
    octave = multiplier / (float(np.abs(values).max()) / (6 * 448))
    assert 1 - 1e-6 <= octave < 2
    scales = data.reshape(-1, 36)[:, :4]
    assert 0x70 < scales.max() <= 0x7E


def grouped(values: np.ndarray, size: int, levels: int, offset: bool) -> np.ndarray:
    """Groups of `size` rounded to evenly spaced levels over their range, scales kept in float32."""
    x = values.reshape(-1, size)
    if offset:
        low = np.minimum(x.min(axis=1, keepdims=True), 0)
        step = (x.max(axis=1, keepdims=True) - low) / (levels - 1)
        return (np.rint((x - low) / step) * step + low).reshape(values.shape)
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)
    half = levels // 2
    step = extreme / -half
    return (np.clip(np.rint(x / step), -half, half - 1) * step).reshape(values.shape)


@pytest.mark.parametrize("kind", ["normal", "heavy", "outliers", "tiny"])
@pytest.mark.parametrize(
    ("name", "size", "levels", "offset"),
    [
        ("q2_k", 16, 4, True),
        ("q3_k", 16, 8, False),
        ("q4_k", 32, 16, True),
        ("q5_k", 32, 32, True),
        ("q6_k", 16, 64, False),
        ("iq4_nl", 32, 16, False),
        ("iq4_xs", 32, 16, False),
    ],
)
def test_searched_scales_beat_exact_but_plain_ones(name, size, levels, offset, kind):
    """Although theirs are rounded to a few bits, which costs where neighbours differ 30-fold."""
    values = make_weights(kind)
    plain = rms(grouped(values, size, levels, offset) - values)
    limit = 1.05 if kind == "outliers" else 0.98
    assert rms(round_trip(values, name) - values) <= limit * plain


@pytest.mark.parametrize("name", SEARCHED)
def test_importance_lowers_the_weighted_error(name):
    values = make_weights("normal")
    importance = np.random.default_rng(2).gamma(0.3, size=values.shape[1]).astype(np.float32)
    importance[::5] = 0
    weighted = rms(round_trip(values, name, importance=importance) - values, importance)
    assert weighted < 0.97 * rms(round_trip(values, name) - values, importance)


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("level", [0.0, 1.0, 1e-30, 1e30])
def test_equal_importance_is_no_importance(name, level):
    values = make_weights("heavy", (3, 512))
    weighted, _ = encoded(values, name, importance=np.full(512, level, np.float32))
    assert np.array_equal(weighted, encoded(values, name)[0])


@pytest.mark.parametrize("name", BLOCKS + SUPER_BLOCKS)
def test_zeros_and_constants(name):
    block_size, _ = sizes(name)
    zeros = np.zeros((2, 3 * block_size), np.float32)
    assert not round_trip(zeros, name).any()
    for constant in (0.25, -0.25):
        # Formats that spend a level on a second sign, or have no level at the top, miss by that.
        error = round_trip(zeros + np.float32(constant), name) - np.float32(constant)
        assert np.abs(error).max() <= 0.005 * abs(constant)


@pytest.mark.parametrize("name", BLOCKS + SUPER_BLOCKS)
def test_one_element_among_zeros(name):
    block_size, _ = sizes(name)
    for position in (0, 15, 16, block_size - 1):
        for value in (0.5, -0.5, 2.0**-13):
            values = np.zeros((1, 2 * block_size), np.float32)
            values[0, position] = value
            result = round_trip(values, name)
            assert abs(result[0, position] - value) <= 0.04 * abs(value)
            assert np.abs(np.delete(result, position)).max() <= 0.04 * abs(value)


@pytest.mark.parametrize("name", ["f16", "bf16"])
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_halves_round_like_gguf(name, data):
    limit = 65504.0 if name == "f16" else float(np.float32(3.3895314e38))
    numbers = st.floats(-limit, limit, width=32)
    values = np.array([data.draw(st.lists(numbers, min_size=1, max_size=40))], np.float32)
    expected = gguf.quants.quantize(values, gguf_type(name)).view(np.uint8).reshape(-1)
    assert np.array_equal(encoded(values, name)[0], expected)


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_every_half_survives(name):
    halves = np.arange(65536, dtype=np.uint16)
    finite = np.isfinite(_native.dequantize(halves, name, 1, 65536)[0])
    kept = np.ascontiguousarray(halves[finite])
    values = _native.dequantize(kept, name, 1, kept.size)
    assert np.array_equal(encoded(values, name)[0].view(np.uint16), kept)


@pytest.mark.parametrize("name", BLOCKS + SUPER_BLOCKS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_block_is_worse_than_zeros(name, data):
    """Any finite numbers, of any mixture of sizes: the result is finite, and explains something."""
    block_size, _ = sizes(name)
    exponents = st.integers(-149, 10)
    few = data.draw(st.lists(st.tuples(exponents, st.floats(-1, 1, width=32)), max_size=24))
    values = np.zeros((1, block_size), np.float64)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    values += rng.normal(size=block_size) * 2.0 ** data.draw(exponents)
    for exponent, number in few:
        values[0, rng.integers(block_size)] = number * 2.0**exponent
    values = values.clip(-1000, 1000).astype(np.float32)
    result = round_trip(values, name)
    assert np.isfinite(result).all()
    assert rms(result - values) <= 1.001 * rms(values) + 2.0**-24


@settings(max_examples=60, deadline=None)
@given(scale=st.integers(-20, 15), seed=st.integers(0, 2**32 - 1))
def test_q8_0_is_within_half_a_step(scale, seed):
    values = np.random.default_rng(seed).normal(size=(3, 64)) * 2.0**scale
    values = values.clip(-65504, 65504).astype(np.float32)
    step = np.abs(values).reshape(-1, 32).max(axis=1, keepdims=True) / 127
    error = np.abs(round_trip(values, "q8_0") - values).reshape(-1, 32)
    # Rounding the scale to float16 moves the outermost of 127 steps by 127 · 2^-11 of a step.
    assert (error <= (0.5 + 127 / 2048) * step + 127 * 2.0**-25).all()
