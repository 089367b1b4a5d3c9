"""An agent with two tools: it calls them until it has an answer.

python examples/agent.py model.gguf "Is it sunny in Oslo?"
"""

import datetime
import json
import sys
from typing import Any

import dgemma

# Stands in for a weather service; the clock is real.
WEATHER = {"Oslo": ("cloudy", 12), "Rome": ("sunny", 27), "Paris": ("rainy", 17)}
OFFSETS = {"Oslo": 1, "Rome": 1, "Paris": 1, "London": 0, "Tokyo": 9}


def get_weather(city: str) -> dict[str, Any]:
    """Weather in a city."""
    sky, degrees = WEATHER[city]
    return {"sky": sky, "degrees": degrees}


def get_time(city: str) -> dict[str, Any]:
    """Time in a city."""
    zone = datetime.timezone(datetime.timedelta(hours=OFFSETS[city]))
    return {"time": datetime.datetime.now(zone).strftime("%H:%M")}


FUNCTIONS = {function.__name__: function for function in (get_weather, get_time)}
CITY = {"type": "string", "description": "Name of the city"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": (function.__doc__ or "").rstrip("."),
            "parameters": {"type": "object", "properties": {"city": CITY}, "required": ["city"]},
        },
    }
    for name, function in FUNCTIONS.items()
]


def call(name: str, arguments: dict[str, Any]) -> str:
    """Runs one tool; what goes wrong is told to the model, which may try again."""
    try:
        return json.dumps(FUNCTIONS[name](**arguments))
    except (KeyError, TypeError) as problem:
        return json.dumps({"error": f"{name} failed: {problem}"})


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
            print(f"{function['name']}({function['arguments']}) -> {result}", file=sys.stderr)
            messages.append({"role": "tool", "tool_call_id": asked["id"], "content": result})
    return f"no answer after {max_rounds} rounds"


if __name__ == "__main__":
    with dgemma.DiffusionGemma(sys.argv[1]) as model:
        print(run(model, sys.argv[2], max_tokens=512))
