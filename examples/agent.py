"""An agent with two tools: it calls them until it has an answer.

python examples/agent.py model.gguf "What is 27 + 48, and what time is it?"
"""

import datetime
import json
import sys
from typing import Any

import dgemma

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
                "required": ["a", "b"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "now",
            "description": "Says the time of day.",
            "parameters": {"type": "object", "properties": {}},
        },
    },
]


def call(name: str, arguments: dict[str, Any]) -> str:
    """Runs one tool; what goes wrong is told to the model, which may try again."""
    try:
        if name == "add":
            return str(float(arguments["a"]) + float(arguments["b"]))
        if name == "now":
            return datetime.datetime.now().strftime("%H:%M")
        return f"error: there is no tool {name}"
    except (KeyError, TypeError, ValueError) as problem:
        return f"error: {problem!r}"


def run(llm: dgemma.DiffusionGemma, question: str, max_rounds: int = 8, **options: Any) -> str:
    """The answer, after as many rounds of tool calls as it takes."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
    for _ in range(max_rounds):
        answer = llm.create_chat_completion(messages, tools=TOOLS, **options)
        message = answer["choices"][0]["message"]
        messages.append(message)
        if "tool_calls" not in message:
            return str(message["content"])
        for asked in message["tool_calls"]:
            function = asked["function"]
            result = call(function["name"], json.loads(function["arguments"]))
            messages.append({"role": "tool", "tool_call_id": asked["id"], "content": result})
    return "no answer after so many rounds"


if __name__ == "__main__":
    with dgemma.DiffusionGemma(sys.argv[1]) as model:
        print(run(model, sys.argv[2], max_tokens=512))
