"""A program for llama-cpp-python, as its users write them. It has never heard of dgemma.

test_package_llama.py runs it with another import and another class name, and nothing else changed.
"""

import json

from llama_cpp import Llama

llm = Llama(
    model_path="model.gguf",
    n_ctx=1024,
    n_batch=256,
    n_threads=1,
    n_threads_batch=1,
    n_gpu_layers=-1,
    flash_attn=True,
    use_mmap=True,
    use_mlock=False,
    chat_format=None,
    seed=4294967295,
    verbose=False,
)

# ---- Text completion -----------------------------------------------------------------------------

output = llm("The old man", max_tokens=8, stop=["Q:", "\n\n"], echo=True, seed=7)
assert set(output) == {"id", "object", "created", "model", "choices", "usage"}
assert output["object"] == "text_completion"
assert output["id"].startswith("cmpl-")
assert isinstance(output["created"], int)
choice = output["choices"][0]
assert set(choice) == {"text", "index", "logprobs", "finish_reason"}
assert choice["text"].startswith("The old man")
assert (choice["index"], choice["logprobs"]) == (0, None)
assert choice["finish_reason"] in ("stop", "length")
usage = output["usage"]
assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]

same = llm.create_completion(prompt="The old man", max_tokens=8, seed=7, temperature=1.0, top_p=1.0)
assert choice["text"] == "The old man" + same["choices"][0]["text"]

pieces = [
    chunk["choices"][0]["text"]
    for chunk in llm.create_completion("The old man", max_tokens=8, seed=7, stream=True)
]
assert "".join(pieces) == same["choices"][0]["text"]

ids = llm.tokenize(b"The old man")
assert llm.create_completion(ids, max_tokens=8, seed=7)["choices"][0] == same["choices"][0]

between = llm.create_completion("The old man ", suffix=" by the sea.", max_tokens=6, seed=7)
assert between["choices"][0]["text"].endswith(" by the sea.")

# ---- Chat ----------------------------------------------------------------------------------------

messages = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is the capital of France?"},
]
answer = llm.create_chat_completion(
    messages=messages, max_tokens=64, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0,
    repeat_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, seed=1,
)  # fmt: skip
assert set(answer) == {"id", "object", "created", "model", "choices", "usage"}
assert answer["object"] == "chat.completion"
assert answer["id"].startswith("chatcmpl-")
message = answer["choices"][0]["message"]
assert message["role"] == "assistant"
assert "Paris" in message["content"]
assert answer["choices"][0]["finish_reason"] == "stop"

streamed = ""
chunks = list(llm.create_chat_completion(messages, max_tokens=64, seed=1, stream=True))
assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
assert chunks[0]["choices"][0]["delta"] == {"role": "assistant"}
assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
for chunk in chunks:
    delta = chunk["choices"][0]["delta"]
    if "content" in delta:
        streamed += delta["content"]
assert streamed == message["content"]

messages += [message, {"role": "user", "content": "What is the capital of Italy?"}]
assert "Rome" in llm.create_chat_completion(messages, seed=1)["choices"][0]["message"]["content"]

# ---- Tools, and answers as JSON ------------------------------------------------------------------

tools = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather in a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Name of the city"}},
                "required": ["city"],
            },
        },
    }
]
called = llm.create_chat_completion(
    [{"role": "user", "content": "Is it sunny in Oslo?"}],
    tools=tools,
    tool_choice={"type": "function", "function": {"name": "get_weather"}},
    seed=1,
)
call = called["choices"][0]["message"]["tool_calls"][0]
assert call["type"] == "function"
assert call["function"]["name"] == "get_weather"
assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}

schema = {"enum": ["Paris", "Rome"]}
made = llm.create_chat_completion(
    [{"role": "user", "content": "What is the capital of France?"}],
    response_format={"type": "json_object", "schema": schema},
    seed=1,
)
assert json.loads(made["choices"][0]["message"]["content"]) in schema["enum"]

# ---- Tokens, sizes, state ------------------------------------------------------------------------

tokens = llm.tokenize(b"Hello", add_bos=True, special=False)
assert tokens[0] == llm.token_bos()
assert llm.detokenize(tokens).decode("utf-8") == "Hello"
assert llm.n_ctx() == 1024
assert llm.n_vocab() > 0
assert llm.n_embd() > 0
assert isinstance(llm.token_eos(), int)
assert isinstance(llm.metadata["general.architecture"], str)

llm("The old man", max_tokens=4, seed=7)
state = llm.save_state()
first = llm("The old man and", max_tokens=4, seed=7)["choices"][0]["text"]
llm.reset()
llm.load_state(state)
assert llm("The old man and", max_tokens=4, seed=7)["choices"][0]["text"] == first
llm.reset()
llm.set_seed(3)
assert llm("The old man", max_tokens=4) is not None
llm.close()
