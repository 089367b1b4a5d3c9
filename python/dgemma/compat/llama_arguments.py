"""Constructor arguments of `llama-cpp-python` that this engine does not have itself.

A program written for it should load here unchanged. What only says how work is cut up does nothing
here; what asks for something else is named once in a warning; what would make answers other than
they seem is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Annotated, Any, TypedDict, get_args, get_type_hints

from .._native import list_gpus
from ..errors import BackendError, OptionTypeError, OptionValueError
from .requests import Foreign

_ANY = Foreign(reason="")  # how work is cut up and where it runs: answers are the same
_POSITIONS = "positions are encoded as the file says"
_NO_EMBEDDINGS = "the model writes text and gives no embeddings"
_MERGE = "merge it while converting: dgemma convert --lora"


class LlamaArguments(TypedDict, total=False):
    """Arguments of `llama_cpp.Llama` beside those of `DiffusionGemma`."""

    n_ubatch: Annotated[int, _ANY]
    n_threads_batch: Annotated[int | None, _ANY]
    offload_kqv: Annotated[bool, _ANY]
    op_offload: Annotated[bool | None, _ANY]
    flash_attn: Annotated[bool, _ANY]
    swa_full: Annotated[bool | None, _ANY]
    kv_unified: Annotated[bool | None, _ANY]
    no_perf: Annotated[bool, _ANY]
    numa: Annotated[bool | int, _ANY]
    last_n_tokens_size: Annotated[int, _ANY]
    spm_infill: Annotated[bool, _ANY]
    n_parts: Annotated[int, _ANY]
    f16_kv: Annotated[bool, _ANY]
    split_mode: Annotated[
        int, Foreign((0, 1), "whole layers are divided over GPUs, as with LLAMA_SPLIT_MODE_LAYER")
    ]
    main_gpu: Annotated[int, _ANY]  # device_of
    rpc_servers: Annotated[str | None, Foreign(("",), "the engine works on one machine")]
    use_mlock: Annotated[
        bool,
        Foreign((False,), "pages are not locked; the file stays in the page cache while it fits"),
    ]
    vocab_only: Annotated[
        bool,
        Foreign(
            (False,), "the whole model is opened; `dgemma.File` reads a file without loading it"
        ),
    ]
    logits_all: Annotated[bool, Foreign((False,), "use `session().canvas_logits`")]
    embedding: Annotated[bool, Foreign((False,), _NO_EMBEDDINGS)]
    pooling_type: Annotated[int, Foreign((-1, 0), _NO_EMBEDDINGS)]
    attention_type: Annotated[int, Foreign((-1,), "the file says who sees whom")]
    rope_scaling_type: Annotated[int | None, Foreign((-1, 0), _POSITIONS)]
    rope_freq_base: Annotated[float, Foreign((0,), _POSITIONS)]
    rope_freq_scale: Annotated[float, Foreign((0, 1), _POSITIONS)]
    yarn_ext_factor: Annotated[float, Foreign((-1,), _POSITIONS)]
    yarn_attn_factor: Annotated[float, Foreign((1,), _POSITIONS)]
    yarn_beta_fast: Annotated[float, Foreign((32,), _POSITIONS)]
    yarn_beta_slow: Annotated[float, Foreign((1,), _POSITIONS)]
    yarn_orig_ctx: Annotated[int, Foreign((0,), _POSITIONS)]
    lora_scale: Annotated[float, _ANY]
    lora_base: Annotated[str | None, Foreign(("",), _MERGE, refused=True)]
    lora_path: Annotated[str | None, Foreign(("",), _MERGE, refused=True)]
    kv_overrides: Annotated[
        Mapping[str, Any] | None,
        Foreign(({},), "change the metadata of the file itself", refused=True),
    ]
    chat_format: Annotated[
        str | None,
        Foreign(("gemma", "chat_template.default"), "the file's own template is used"),
    ]
    chat_handler: Annotated[Any, _ANY]  # called by create_chat_completion
    draft_model: Annotated[Any, Foreign((), "a canvas is drafted as a whole already")]
    tokenizer: Annotated[Any, Foreign((), "the file's own tokenizer is used")]


def check_constructor(arguments: Mapping[str, Any], *, strict: bool = False) -> list[str]:
    """Sentences about arguments that have no effect, which are errors where it is `strict`.

    OptionValueError for what would make answers other than they seem, OptionTypeError for unknown
    names.
    """
    known, found = _known(), []
    for name, value in arguments.items():
        if name not in known:
            raise OptionTypeError(
                f"DiffusionGemma() got an unknown argument {name!r}",
                param=name,
                code="unknown_parameter",
            )
        foreign = known[name]
        if not foreign.reason or foreign.is_neutral(value):
            continue
        if strict or foreign.refused:
            raise OptionValueError(
                f"{name}={value!r} is not supported: {foreign.reason}",
                param=name,
                code="unsupported_parameter",
            )
        found.append(f"{name}={value!r} has no effect: {foreign.reason}")
    return found


def device_of(arguments: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """The GPU that `main_gpu` and `split_mode` ask for, as `device` names it; and complaints.

    A number other than 0, and with split_mode 0 (LLAMA_SPLIT_MODE_NONE) any, is one GPU alone.
    """
    number = arguments.get("main_gpu", 0)
    if number == 0 and arguments.get("split_mode", 1) != 0:
        return None, []
    try:
        list_gpus()
    except BackendError as problem:
        return None, [f"main_gpu={number!r} has no effect: {problem}"] if number else []
    return str(number), []


@functools.cache
def _known() -> dict[str, Foreign]:
    hints = get_type_hints(LlamaArguments, include_extras=True)
    return {name: get_args(hint)[1] for name, hint in hints.items()}
