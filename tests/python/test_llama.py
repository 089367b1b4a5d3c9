"""A program written for llama-cpp-python runs here; what it cannot have is refused."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dgemma
from dgemma.compat import llama_cpp
from dgemma.compat.llama import CHAT_ORDER, COMPLETION_ORDER
from dgemma.compat.llama_cpp import LlamaRAMCache
from dgemma.compat.requests import ChatOptions, CompletionOptions
from dgemma.generation.declared import names

PROGRAM = Path(__file__).parent / "programs" / "llama_cpp_program.py"


@pytest.fixture(scope="module")
def llm(tiny_gguf: Path) -> Iterator[dgemma.DiffusionGemma]:
    with dgemma.DiffusionGemma(tiny_gguf, n_ctx=256) as model:
        yield model


def test_a_program_for_llama_cpp_python(
    tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.gguf").symlink_to(tiny_gguf)
    monkeypatch.chdir(tmp_path)
    program = PROGRAM.read_text(encoding="utf-8")
    ported = program.replace("from llama_cpp import Llama", "from dgemma import DiffusionGemma")
    ported = ported.replace("llm = Llama(", "llm = DiffusionGemma(")
    changed = [a for a, b in zip(program.splitlines(), ported.splitlines(), strict=True) if a != b]
    assert len(changed) == 2
    exec(compile(ported, str(PROGRAM), "exec"), {})


WITHOUT_EFFECT: list[tuple[dict[str, Any], str]] = [
    ({"embedding": True}, "embeddings"),
    ({"logits_all": True}, "canvas_logits"),
    ({"chat_format": "chatml"}, "template"),
    ({"draft_model": object()}, "drafted"),
    ({"tensor_split": [0.5, 0.5]}, "one GPU"),
    ({"main_gpu": 1}, "CUDA_VISIBLE_DEVICES"),
    ({"use_mlock": True}, "locked"),
    ({"rope_freq_base": 1e6}, "positions"),
    ({"vocab_only": True}, r"dgemma\.File"),
]
MISLEADING: list[tuple[dict[str, Any], str]] = [
    ({"lora_path": "adapter.gguf"}, "convert --lora"),
    ({"kv_overrides": {"a": 1}}, "metadata"),
]


@pytest.mark.parametrize(("arguments", "reason"), WITHOUT_EFFECT)
def test_arguments_without_effect_are_named_once(
    tiny_gguf: Path, arguments: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dgemma.compat.requests._warned", set())
    name = next(iter(arguments))
    with pytest.warns(dgemma.IgnoredOptionWarning, match=f"{name}=.* has no effect: .*{reason}"):
        dgemma.DiffusionGemma(tiny_gguf, n_ctx=256, **arguments).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dgemma.DiffusionGemma(tiny_gguf, n_ctx=256, **arguments).close()
    with pytest.raises(ValueError, match=rf"{name}=.* is not supported: .*{reason}"):
        dgemma.DiffusionGemma(tiny_gguf, strict=True, **arguments)


@pytest.mark.parametrize(("arguments", "reason"), MISLEADING)
def test_arguments_that_would_mislead_are_refused(
    tiny_gguf: Path, arguments: dict[str, Any], reason: str
) -> None:
    with pytest.raises(
        ValueError, match=rf"{next(iter(arguments))}=.* is not supported: .*{reason}"
    ):
        dgemma.DiffusionGemma(tiny_gguf, **arguments)


def test_unknown_arguments(tiny_gguf: Path) -> None:
    with pytest.raises(TypeError, match="n_contexts"):
        dgemma.DiffusionGemma(tiny_gguf, n_contexts=5)


def test_every_argument_at_llama_cpp_pythons_default_is_taken(tiny_gguf: Path) -> None:
    defaults = {
        "n_gpu_layers": 0, "split_mode": 1, "main_gpu": 0, "tensor_split": None,
        "vocab_only": False, "use_mmap": True, "use_mlock": False, "kv_overrides": None,
        "seed": 0xFFFFFFFF, "n_ctx": 512, "n_batch": 512, "n_ubatch": 512, "n_threads": None,
        "n_threads_batch": None, "rope_scaling_type": -1, "pooling_type": -1,
        "rope_freq_base": 0.0, "rope_freq_scale": 0.0, "yarn_ext_factor": -1.0,
        "yarn_attn_factor": 1.0, "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0,
        "yarn_orig_ctx": 0, "logits_all": False, "embedding": False, "offload_kqv": True,
        "flash_attn": False, "op_offload": None, "swa_full": None, "no_perf": False,
        "last_n_tokens_size": 64, "lora_base": None, "lora_scale": 1.0, "lora_path": None,
        "numa": False, "chat_format": None, "chat_handler": None, "draft_model": None,
        "tokenizer": None, "type_k": None, "type_v": None, "spm_infill": False, "verbose": False,
    }  # fmt: skip
    with dgemma.DiffusionGemma(tiny_gguf, **defaults) as model:
        # llama.cpp's "any seed" is another one each time.
        assert model.generate("a", max_tokens=1).stats.seed != (
            model.generate("a", max_tokens=1).stats.seed
        )


@pytest.mark.parametrize(
    "options",
    [
        {"logits_processor": [len]},
        {"logit_bias": {5: 1.0}},
        {"top_k": 40},
        {"mirostat_mode": 2},
        {"repeat_penalty": 1.1, "min_p": 0.05},
    ],
)
def test_options_that_mean_nothing_are_named(
    llm: dgemma.DiffusionGemma, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = llm("The old man", max_tokens=4, seed=1)
    assert "warnings" not in plain
    monkeypatch.setattr("dgemma.compat.requests._warned", set())
    with pytest.warns(dgemma.IgnoredOptionWarning) as seen:
        answer = llm("The old man", max_tokens=4, seed=1, **options)
    assert answer["choices"] == plain["choices"]
    assert [text.split()[0] for text in answer["warnings"]] == list(options)
    assert [str(w.message) for w in seen] == answer["warnings"]
    assert all(w.filename == __file__ for w in seen)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, *_ = llm("The old man", max_tokens=4, seed=1, stream=True, **options)
        assert first["warnings"] == answer["warnings"]
        assert llm.generate("The old man", max_tokens=4, seed=1, **options).stats.steps
    with pytest.raises(ValueError, match="is not supported"):
        llm("The old man", strict=True, **options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"stopping_criteria": [len]}, "`stop`"),
        ({"grammar": "root ::= x"}, "response_format"),
        ({"logprobs": 3}, "probability"),
    ],
)
def test_options_that_would_mislead_are_refused(
    llm: dgemma.DiffusionGemma, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(options))} .*{reason}"):
        llm("The old man", **options)


# ---- To the letter -------------------------------------------------------------------------------

# The parameters behind the first, in llama-cpp-python 0.3's order.
ORDERS = {
    "create_completion": (
        "suffix max_tokens temperature top_p min_p typical_p logprobs echo stop frequency_penalty "
        "presence_penalty repeat_penalty top_k stream seed tfs_z mirostat_mode mirostat_tau "
        "mirostat_eta model stopping_criteria logits_processor grammar logit_bias"
    ),
    "create_chat_completion": (
        "functions function_call tools tool_choice temperature top_p top_k min_p typical_p stream "
        "stop seed response_format max_tokens presence_penalty frequency_penalty repeat_penalty "
        "tfs_z mirostat_mode mirostat_tau mirostat_eta model logits_processor grammar logit_bias "
        "logprobs top_logprobs"
    ),
}


def test_positional_arguments_stand_in_its_order(llm: dgemma.DiffusionGemma) -> None:
    assert " ".join(COMPLETION_ORDER) == ORDERS["create_completion"]
    assert " ".join(CHAT_ORDER) == ORDERS["create_chat_completion"]
    assert set(COMPLETION_ORDER) - {"stream"} <= names(CompletionOptions)
    assert set(CHAT_ORDER) - {"stream"} <= names(ChatOptions)
    whole = llm("The old man", max_tokens=6, echo=True, seed=0, temperature=0.5)
    given = (None, 6, 0.5, None, None, None, None, True, [], 0, 0, 1, 0, False, 0)
    assert llm("The old man", *given)["choices"] == whole["choices"]
    chunks = list(llm("The old man", *given[:13], True, 0))
    assert "".join(c["choices"][0]["text"] for c in chunks) == whole["choices"][0]["text"]
    with pytest.raises(TypeError, match="'max_tokens' twice"):
        llm("a", None, 5, max_tokens=5)
    with pytest.raises(TypeError, match="positional arguments"):
        llm("a", *[None] * 30)


def test_tokens_and_state(llm: dgemma.DiffusionGemma, monkeypatch: pytest.MonkeyPatch) -> None:
    llm.reset()
    assert llm.n_tokens == 0
    llm.eval(llm.tokenize(b"The old man"))
    assert llm.n_tokens == len(llm.tokenize(b"The old man"))
    state = llm.save_state()
    llm.reset()
    llm.load_state(state)
    assert llm.n_tokens == len(llm.tokenize(b"The old man"))
    assert llm.detokenize([llm.token_nl()]) == b"\n"
    monkeypatch.setattr("dgemma.compat.requests._warned", set())
    with pytest.warns(dgemma.IgnoredOptionWarning, match="set_cache has no effect"):
        llm.set_cache(LlamaRAMCache(capacity_bytes=1))
    llm.set_cache(None)


def test_functions_are_tools(llm: dgemma.DiffusionGemma) -> None:
    functions = [{"name": "get_weather", "parameters": {"type": "object", "properties": {}}}]
    asked = [{"role": "user", "content": "Is it sunny in Oslo?"}]
    answer = llm.create_chat_completion(
        asked, functions=functions, function_call={"name": "get_weather"}, seed=1
    )["choices"][0]
    assert answer["finish_reason"] == "function_call"
    assert answer["message"]["function_call"]["name"] == "get_weather"
    assert answer["message"]["tool_calls"][0]["function"] == answer["message"]["function_call"]


def test_a_chat_handler_is_called(tiny_gguf: Path) -> None:
    seen: dict[str, Any] = {}

    def handler(*, llama: Any, messages: Any, **options: Any) -> Any:
        seen.update(options)
        return llama.create_completion(messages[0]["content"], max_tokens=options["max_tokens"])

    with dgemma.DiffusionGemma(tiny_gguf, n_ctx=256, chat_handler=handler) as model:
        messages = [{"role": "user", "content": "The old man"}]
        answer = model.create_chat_completion(messages, max_tokens=3, temperature=0.2)
    assert answer["object"] == "text_completion"
    assert seen == {"stream": False, "max_tokens": 3, "temperature": 0.2}


def test_objects_of_the_openai_package(llm: dgemma.DiffusionGemma) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    answer = llm.create_chat_completion_openai_v1(messages, seed=1)
    assert "Paris" in answer.choices[0].message.content
    chunks = llm.create_chat_completion_openai_v1(messages, seed=1, stream=True)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert said == answer.choices[0].message.content


def test_a_gpu_that_is_not_used_is_said(tiny_gguf: Path) -> None:
    for arguments, message in (
        ({"n_gpu_layers": 5, "backend": "cpu"}, "n_gpu_layers=5 has no effect: the CPU was asked"),
        ({"n_gpu_layers": -1, "backend": "cpu"}, "n_gpu_layers=-1 has no effect"),
        ({"n_cpu_moe": 1, "backend": "cpu"}, "n_cpu_moe=1 has no effect"),
    ):
        with pytest.warns(RuntimeWarning, match=message):
            dgemma.DiffusionGemma(tiny_gguf, n_ctx=256, **arguments).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dgemma.DiffusionGemma(tiny_gguf, n_ctx=256, n_gpu_layers=0).close()


def test_langchains_classes(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("langchain_community", reason="needs the extra `clients`")
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    llama_cpp.install()
    from langchain_community.chat_models import ChatLlamaCpp
    from langchain_community.llms import LlamaCpp

    options: dict[str, Any] = {
        "model_path": str(tiny_gguf),
        "n_ctx": 512,
        "seed": 1,
        "verbose": False,
    }
    text = LlamaCpp(**options, max_tokens=8)
    assert text.invoke("The old man", temperature=1.0) == "".join(
        text.stream("The old man", temperature=1.0)
    )
    chat = ChatLlamaCpp(**options)
    question = "What is the capital of France?"
    assert "Paris" in chat.invoke(question).content
    assert "Paris" in "".join(str(chunk.content) for chunk in chat.stream(question))
    with pytest.raises(ValueError, match="response_format"):
        LlamaCpp(**options, grammar="root ::= x")
    monkeypatch.delitem(sys.modules, "llama_cpp")


def test_embeddings_are_refused(llm: dgemma.DiffusionGemma) -> None:
    for ask in (llm.embed, llm.create_embedding):
        with pytest.raises(NotImplementedError, match="embeddings"):
            ask("text")


def test_a_state_of_another_kind_is_refused(llm: dgemma.DiffusionGemma) -> None:
    with pytest.raises(dgemma.Error):
        llm.load_state(b"not a state")
