"""A program written for llama-cpp-python runs here; what it cannot have is refused."""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import dgemma
from dgemma.compat import llama_cpp
from dgemma.compat.llama import CHAT_ORDER, COMPLETION_ORDER
from dgemma.compat.llama_arguments import LlamaArguments
from dgemma.compat.llama_cpp import LlamaRAMCache
from dgemma.compat.requests import ChatOptions, CompletionOptions
from dgemma.generation.declared import names

SIGNATURES: dict[str, Any] = json.loads(
    Path(__file__).with_name("llama_cpp_signatures.json").read_text("utf-8")
)["methods"]
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
    ({"split_mode": 2}, "whole layers"),
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
    defaults = dict(SIGNATURES["__init__"]["keyword"])
    assert len(defaults) == 44
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = llama_cpp.Llama(str(tiny_gguf), **{**defaults, "verbose": False})
    with model:
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

# Where ours differ, and why.
OTHER_NAMES = {
    "generate": "a text gives an answer; token ids give their like (see `compat.llama_cpp.Llama`)",
    "tokenizer": "a property here",
    "sample": "refused: no token is picked alone",
    "embed": "refused",
    "create_embedding": "refused",
    "create_chat_completion_openai_v1": "takes the arguments of create_chat_completion",
    "logits_to_logprobs": "a canvas has no log-probabilities",
}
OTHER_DEFAULTS = {
    ("__init__", "n_ctx"): 8192,  # a canvas alone is 256
    ("__init__", "n_gpu_layers"): "auto",
    ("__init__", "seed"): None,
    ("__init__", "type_k"): "f16",
    ("__init__", "type_v"): "f16",
    ("__init__", "verbose"): False,
    ("from_pretrained", "filename"): None,  # the only one, where there is one
}
ORDERS = {
    "__call__": COMPLETION_ORDER,
    "create_completion": COMPLETION_ORDER,
    "create_chat_completion": CHAT_ORDER,
    "generate": llama_cpp.GENERATE_ORDER,
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_it_takes_what_the_real_one_takes(name: str) -> None:
    """Names, order and defaults, as `support.llama_signatures` read them from its source."""
    theirs = SIGNATURES[name]["positional"]
    if name in ORDERS:
        assert [each for each, _ in theirs[1:]] == list(ORDERS[name])
        return
    if name in OTHER_NAMES:
        return
    ours: Any = getattr(llama_cpp.Llama, name)
    parameters = list(inspect.signature(ours).parameters.values())
    if name not in ("from_pretrained", "longest_token_prefix"):
        parameters = parameters[1:]  # self
    found = [
        [each.name, "required" if each.default is each.empty else each.default]
        for each in parameters
        if each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    expected = [[n, OTHER_DEFAULTS.get((name, n), default)] for n, default in theirs]
    assert found == expected
    keyword = {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}
    others = get_type_hints(LlamaArguments)
    for argument, default in SIGNATURES[name]["keyword"]:
        assert argument in keyword or argument in others, argument
        if argument in keyword:
            assert keyword[argument] == OTHER_DEFAULTS.get((name, argument), default), argument


def test_positional_arguments_stand_in_its_order(llm: dgemma.DiffusionGemma) -> None:
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


def test_token_ids_one_by_one(tiny_gguf: Path) -> None:
    with llama_cpp.Llama(str(tiny_gguf), n_ctx=256, seed=1) as model:
        question = [{"role": "user", "content": "What is the capital of France?"}]
        prompt = model.encode_prompt(model.chat_template.render(question))
        ids = list(model.generate(prompt, temp=1.0, reset=False))
        assert ids[-1] == model.token_eos()
        assert model.detokenize(ids[:-1]) == b"The capital of France is Paris."
        assert model.eval_tokens[: len(prompt)] == prompt
        assert model.longest_token_prefix(prompt, prompt[:3]) == 3
        assert model.longest_token_prefix([1, 2], [1, 3]) == 1
        assert model.generate("The old man", max_tokens=3).stats.prompt_tokens == 6
        with pytest.raises(NotImplementedError, match="generate"):
            model.sample()


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
    from llama_cpp.llama import Llama  # type: ignore[import-not-found]

    assert Llama is llama_cpp.Llama
    for name in [name for name in sys.modules if name.partition(".")[0] == "llama_cpp"]:
        monkeypatch.delitem(sys.modules, name)


def test_embeddings_are_refused(llm: dgemma.DiffusionGemma) -> None:
    for ask in (llm.embed, llm.create_embedding):
        with pytest.raises(NotImplementedError, match="embeddings"):
            ask("text")


def test_a_state_of_another_kind_is_refused(llm: dgemma.DiffusionGemma) -> None:
    with pytest.raises(dgemma.Error):
        llm.load_state(b"not a state")
