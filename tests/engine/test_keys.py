"""Keys of the wrong type are errors that name them; other writers' spellings are understood."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import support.gguf_builder as b
from dgemma import ModelFileError
from dgemma.gguf_file import File, check
from support.engine import conversation, open_model, random_tokens
from support.rewriting import rewrite

T = "tokenizer.ggml."
A = "diffusion-gemma."

WRONG = {
    T + "tokens": (b.array(T + "tokens", b.INT32, [1, 2]), "an array of string"),
    T + "merges": (b.array(T + "merges", b.UINT32, [1, 2]), "an array of string"),
    T + "token_type": (b.array(T + "token_type", b.FLOAT32, [1.0]), "an array of integers"),
    T + "scores": (b.array(T + "scores", b.STRING, ["a"]), "an array of numbers"),
    T + "bos_token_id": (b.key(T + "bos_token_id", b.FLOAT32, 2.0), "an integer"),
    T + "eos_token_id": (b.key(T + "eos_token_id", b.FLOAT32, 1.0), "an integer"),
    T + "eos_token_ids": (b.array(T + "eos_token_ids", b.FLOAT32, [1.0]), "integers"),
    T + "padding_token_id": (b.key(T + "padding_token_id", b.STRING, "0"), "an integer"),
    T + "add_bos_token": (b.key(T + "add_bos_token", b.UINT32, 1), "a bool"),
    T + "model": (b.key(T + "model", b.UINT32, 1), "a string"),
    "tokenizer.chat_template": (b.key("tokenizer.chat_template", b.BOOL, 1), "a string"),
    "tokenizer.chat_template.tool_use": (
        b.array("tokenizer.chat_template.tool_use", b.STRING, ["a"]),
        "a string",
    ),
    "general.name": (b.key("general.name", b.INT8, 1), "a string"),
    A + "attention.sliding_window_pattern": (
        b.array(A + "attention.sliding_window_pattern", b.STRING, ["true", "false"]),
        "bools",
    ),
    A + "attention.head_count_kv": (
        b.key(A + "attention.head_count_kv", b.STRING, "2"),
        "integers",
    ),
    A + "block_count": (b.key(A + "block_count", b.FLOAT32, 2.0), "an integer"),
    A + "rope.freq_base": (b.key(A + "rope.freq_base", b.UINT32, 10000), "a float32"),
    "diffusion.canvas_length": (b.key("diffusion.canvas_length", b.BOOL, 1), "an integer"),
    "diffusion.eb_t_min": (b.key("diffusion.eb_t_min", b.STRING, "0.4"), "a float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_key_of_the_wrong_type_is_named(name: str, tiny_gguf: Path, tmp_path: Path) -> None:
    entry, expected = WRONG[name]
    path = rewrite(tiny_gguf, tmp_path / "wrong.gguf", {name: entry})
    with pytest.raises(ModelFileError, match=f'"{name}": expected {expected}, found '):
        check(path)


def test_a_whole_file_is_accepted(tiny_gguf: Path, tmp_path: Path) -> None:
    check(tiny_gguf)
    check(rewrite(tiny_gguf, tmp_path / "same.gguf"))


@pytest.mark.parametrize("name", ["token_type", "scores"])
def test_lists_of_another_length_are_refused(name: str, tiny_gguf: Path, tmp_path: Path) -> None:
    entry = b.array(T + name, b.INT32, [1, 1, 1])
    path = rewrite(tiny_gguf, tmp_path / "short.gguf", {T + name: entry})
    with pytest.raises(ModelFileError, match=f'"{T}{name}" has 3 entries for 750 tokens'):
        check(path)


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id"])
def test_token_ids_lie_in_the_vocabulary(name: str, tiny_gguf: Path, tmp_path: Path) -> None:
    entry = b.key(T + name, b.UINT32, 750)
    path = rewrite(tiny_gguf, tmp_path / "outside.gguf", {T + name: entry})
    with pytest.raises(ModelFileError, match="750 is outside the vocabulary of 750"):
        check(path)


# ---- Other writers -------------------------------------------------------------------------------


def logits(path: Path) -> np.ndarray:
    prompt, canvases = random_tokens("small", 12, 1)
    with open_model(path) as model, model.session() as session:
        return conversation(session, prompt, canvases)


def test_the_other_branch_s_layout_is_read(gguf_file, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """#24427 has one scalar a layer, and another name for the norm of self-conditioning."""
    ours = gguf_file("small")

    def rename(name: str) -> str | None:
        if "enc_layer_output_scale" in name:
            return None
        return name.replace("self_cond_pre_norm", "self_cond_norm")

    path = rewrite(ours, tmp_path / "theirs.gguf", rename=rename)
    with open_model(path) as model:
        assert model.info.file_note.startswith("the file has no enc_layer_output_scale")
    with open_model(ours) as model:
        assert model.info.file_note == ""

    # The same as a file of ours whose encoder has the decoder's scalars.
    same = tmp_path / "same.gguf"
    with File(ours) as file:
        scalars = {t.name: t.data.tobytes() for t in file.tensors if "layer_output_scale" in t.name}
    content = bytearray(ours.read_bytes())
    with File(ours) as file:
        begin = len(content) - sum(len(t.data) + -len(t.data) % 32 for t in file.tensors)
        for t in file.tensors:
            if "enc_layer_output_scale" in t.name:
                content[begin : begin + 4] = scalars[t.name.replace("enc_", "")]
            begin += len(t.data) + -len(t.data) % 32
    same.write_bytes(content)
    np.testing.assert_array_equal(logits(path), logits(same))
    assert np.abs(logits(path) - logits(ours)).max() > 1e-4


def test_an_encoder_scalar_that_lacks_in_one_layer_is_missing(gguf_file, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    lost = "blk.1.enc_layer_output_scale.weight"
    path = rewrite(
        gguf_file("small"), tmp_path / "lost.gguf", rename=lambda n: None if n == lost else n
    )
    with pytest.raises(ModelFileError, match=f"tensor {lost} is missing"):
        check(path)


def test_a_model_with_both_names_of_a_norm_is_refused(gguf_file, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = rewrite(
        gguf_file("small"),
        tmp_path / "both.gguf",
        rename=lambda n: "self_cond_norm.weight" if n == "output_norm.weight" else n,
    )
    with pytest.raises(ModelFileError, match=r"output_norm.weight is missing"):
        check(path)


def test_scalars_and_lists_mean_the_same(gguf_file, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    ours = gguf_file("small")
    with File(ours) as file:
        keys = file.keys
        n_layers = keys[A + "block_count"]
        pattern = keys[A + "attention.sliding_window_pattern"]
        heads, width = keys[A + "attention.head_count"], keys[A + "feed_forward_length"]
    period = pattern.index(False) + 1
    assert pattern == [i % period < period - 1 for i in range(n_layers)]
    path = rewrite(
        ours,
        tmp_path / "spelled.gguf",
        {
            A + "attention.sliding_window_pattern": b.key(
                A + "attention.sliding_window_pattern", b.UINT32, period
            ),
            A + "attention.head_count": b.array(
                A + "attention.head_count", b.INT32, [heads] * n_layers
            ),
            A + "feed_forward_length": b.array(
                A + "feed_forward_length", b.UINT32, [width] * n_layers
            ),
        },
    )
    np.testing.assert_array_equal(logits(path), logits(ours))


def test_widths_that_differ_between_layers_are_named(gguf_file, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    name = A + "feed_forward_length"
    with File(gguf_file("small")) as file:
        n_layers, width = file.keys[A + "block_count"], file.keys[name]
    widths = [width] * (n_layers - 1) + [2 * width]
    path = rewrite(
        gguf_file("small"), tmp_path / "wide.gguf", {name: b.array(name, b.UINT32, widths)}
    )
    with pytest.raises(ModelFileError, match=f"is {width} in layer 0 and {2 * width} in layer"):
        check(path)
