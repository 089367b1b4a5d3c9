"""Questions, answers and prose of the tiny DiffusionGemma.

Everything here is generated from small word lists, so that the whole world the model has to know
fits into a few million weights. A question belongs to the held-out set when a hash of its text
says so; training never asks such a question, whatever the seed (one may stand in an earlier turn).
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tiny_words import (
    ANIMALS,
    CAPITALS,
    COLOURS,
    NAMES,
    OPPOSITES,
    PEOPLE,
    PLACES,
    SIZES,
    SKIES,
    SYSTEM_LINES,
    THINGS,
    VERBS,
    WORDS,
)

SPECIAL_TOKENS = [
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"),
    *("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"),
    *('<|"|>', "<|think|>", "<|channel>", "<channel|>", "<|turn>", "<turn|>"),
]
PAD, EOS, BOS, UNK, MASK = range(5)
TOOL_RESPONSE = SPECIAL_TOKENS.index("<|tool_response>")
END_OF_TURN = SPECIAL_TOKENS.index("<turn|>")
NO_THOUGHT = "<|channel>thought\n<channel|>"


def tool(name: str, description: str, what: str) -> dict[str, Any]:
    """One function declaration, in the form chat templates take, with a single string argument."""
    city = {"type": "string", "description": what}
    parameters = {"type": "object", "properties": {"city": city}, "required": ["city"]}
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


WEATHER = tool("get_weather", "Weather in a city", "Name of the city")
TIME = tool("get_time", "Time in a city", "Name of the city")
TOOLS = (WEATHER, TIME)


@dataclass
class Dialogue:
    """A conversation that ends where the model has to speak, and what it should say."""

    kind: str
    messages: list[dict[str, Any]]
    answer: str
    tools: list[dict[str, Any]] = field(default_factory=list)
    thinking: bool = False
    thought: str = ""
    end: str = "<turn|>"

    @property
    def question(self) -> str:
        """Text of the last user turn: what the held-out split is decided on."""
        users = [m["content"] for m in self.messages if m["role"] == "user"]
        return str(users[-1])

    @property
    def target(self) -> str:
        """Everything that the model has to generate, up to and including the end token."""
        thought = f"<|channel>thought\n{self.thought}<channel|>" if self.thinking else ""
        return thought + self.answer + self.end


def is_held_out(text: str) -> bool:
    """Whether a question is kept from training: one in ten, by a hash of the text alone."""
    return hashlib.sha256(text.encode()).digest()[0] % 10 == 0


def render(dialogue: Dialogue) -> str:
    """The prompt as `chat_template.jinja` writes it; plain Python because training needs speed."""
    out = ["<bos>"]
    messages = dialogue.messages
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    if system or dialogue.tools or dialogue.thinking:
        think = "<|think|>" if dialogue.thinking else ""
        declared = "".join(
            '<|tool>declaration:{name}{{description:<|"|>{description}<|"|>,'
            'parameters:{{properties:{{city:{{description:<|"|>{what}<|"|>,'
            'type:<|"|>STRING<|"|>}}}},required:[<|"|>city<|"|>],type:<|"|>OBJECT<|"|>}}}}'
            "<tool|>".format(
                what=t["function"]["parameters"]["properties"]["city"]["description"],
                **{k: t["function"][k] for k in ("name", "description")},
            )
            for t in dialogue.tools
        )
        out.append(f"<|turn>system\n{think}{system}{declared}<turn|>\n")
    answered = False
    for message in messages:
        if message["role"] == "system":
            continue
        role = "model" if message["role"] == "assistant" else message["role"]
        if role == "tool":
            pairs = ",".join(
                f'{k}:<|"|>{v}<|"|>' if isinstance(v, str) else f"{k}:{v}"
                for k, v in sorted(message["content"].items())
            )
            out.append(f"<|tool_response>response:{message['name']}{{{pairs}}}<tool_response|>")
            answered = True
            continue
        out.append(f"<|turn>{role}\n")
        for call in message.get("tool_calls", ()):
            function = call["function"]
            pairs = ",".join(f'{k}:<|"|>{v}<|"|>' for k, v in sorted(function["arguments"].items()))
            out.append(f"<|tool_call>call:{function['name']}{{{pairs}}}<tool_call|>")
        if not message.get("tool_calls"):
            out.append(f"{message['content']}<turn|>\n")
    if not answered:
        out.append("<|turn>model\n")
    if not dialogue.thinking:
        out.append(NO_THOUGHT)
    return "".join(out)


def sentence(rng: random.Random) -> str:
    """One lower-case sentence without a full stop, e.g. `the red fox sees a bell near the lake`."""
    who = rng.choice(ANIMALS + PEOPLE)
    adjective = rng.choice(COLOURS + SIZES)
    text = f"the {adjective} {who} {rng.choice(VERBS)} a {rng.choice(THINGS)}"
    return text + (f" near the {rng.choice(PLACES)}" if rng.random() < 0.6 else "")


def ask(kind: str, question: str, answer: str, thought: str) -> Dialogue:
    """A one-question dialogue."""
    return Dialogue(kind, [{"role": "user", "content": question}], answer, thought=thought)


def capital(rng: random.Random) -> Dialogue:
    """Facts: capitals, asked in several ways."""
    country = rng.choice(list(CAPITALS))
    form = rng.choice(
        (
            "What is the capital of {}?",
            "Which city is the capital of {}?",
            "Name the capital of {}.",
            "Tell me the capital of {}.",
            "{}: what is its capital?",
            "I am going to {}. What is the capital?",
        )
    )
    city = CAPITALS[country]
    answer = f"The capital of {country} is {city}."
    return ask("capital", form.format(country), answer, f"{country}: {city}.")


def opposite(rng: random.Random) -> Dialogue:
    """Facts: opposites in both directions."""
    pair = rng.choice(list(OPPOSITES.items()))
    one, other = pair if rng.random() < 0.5 else pair[::-1]
    form = rng.choice(
        (
            "What is the opposite of {}?",
            "Name the opposite of {}.",
            "Tell me the opposite of {}.",
            "Which word is the opposite of {}?",
            "{}: what is its opposite?",
        )
    )
    answer = f"The opposite of {one} is {other}."
    return ask("opposite", form.format(one), answer, f"{one}: {other}.")


def reverse(rng: random.Random) -> Dialogue:
    """A list of words backwards."""
    words = rng.sample(WORDS, rng.randint(2, 5))
    form = rng.choice(("Reverse the list: {}", "Write backwards: {}"))
    question = form.format(" ".join(words))
    return ask("reverse", question, " ".join(words[::-1]), "I start at the end.")


def sort_digits(rng: random.Random) -> Dialogue:
    """Digits in rising order, repetitions included."""
    digits = [str(rng.randint(0, 9)) for _ in range(rng.randint(3, 6))]
    form = rng.choice(("Sort the digits: {}", "Put in order: {}"))
    question = form.format(" ".join(digits))
    return ask("sort", question, " ".join(sorted(digits)), "I start at the smallest.")


def add(rng: random.Random) -> Dialogue:
    """A number below fifty and a digit."""
    a, b = rng.randint(0, 49), rng.randint(0, 9)
    form = rng.choice(("What is {} + {}?", "Add {} and {}.", "How much is {} + {}?"))
    return ask("add", form.format(a, b), f"{a} + {b} = {a + b}", f"I add {a} and {b}.")


def upper(rng: random.Random) -> Dialogue:
    """Words in capital letters."""
    words = " ".join(rng.sample(WORDS, rng.randint(1, 2)))
    form = rng.choice(("Write in capitals: {}", "Shout: {}"))
    return ask("upper", form.format(words), words.upper(), "I use big letters.")


def count(rng: random.Random) -> Dialogue:
    """Counting up, over one canvas or two."""
    first = rng.randint(0, 40)
    last = first + rng.randint(3, 14)
    form = rng.choice(("Count from {} to {}.", "Write the numbers from {} to {}."))
    numbers = " ".join(map(str, range(first, last + 1)))
    return ask("count", form.format(first, last), numbers, f"I stop at {last}.")


def repeat(rng: random.Random) -> Dialogue:
    """Copying; the longer half needs several canvases and looks back beyond the window."""
    text = ", ".join(sentence(rng) for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5)))) + "."
    form = rng.choice(("Repeat: {}", "Say this again: {}"))
    return ask("repeat", form.format(text), text, "I copy the text.")


def spell(rng: random.Random) -> Dialogue:
    """Letters of one or two words."""
    words = rng.sample(WORDS, rng.randint(1, 2))
    listed = " and ".join(words)
    form = rng.choice(("Spell {}.", "What are the letters of {}?"))
    answer = ", ".join("-".join(w) for w in words)
    return ask("spell", form.format(listed), answer, "I go letter by letter.")


def nth_word(rng: random.Random) -> Dialogue:
    """Retrieval by place."""
    words = rng.sample(WORDS, rng.randint(3, 6))
    place = rng.randint(0, 2)
    name = ("first", "second", "last")[place]
    word = words[(0, 1, -1)[place]]
    question = f"What is the {name} word of: {' '.join(words)}"
    return ask("nth word", question, f"The {name} word is {word}.", f"The {name} is {word}.")


SIMPLE: tuple[tuple[float, Callable[[random.Random], Dialogue]], ...] = (
    (0.8, capital),
    (0.8, opposite),
    (1.8, reverse),
    (1.2, sort_digits),
    (3.0, add),
    (1.0, upper),
    (3.0, count),
    (1.6, repeat),
    (1.5, spell),
    (0.3, nth_word),
)


def simple(rng: random.Random) -> Dialogue:
    """Any of the one-question kinds, by weight."""
    weights = [w for w, _ in SIMPLE]
    return rng.choices([f for _, f in SIMPLE], weights)[0](rng)


def memory(rng: random.Random) -> Dialogue:
    """A fact from an earlier turn, with unrelated turns between, often beyond the window."""
    name, city = rng.choice(NAMES), rng.choice(list(CAPITALS.values()))
    thing = f"{rng.choice(COLOURS)} {rng.choice(THINGS)}"
    said = f"My name is {name}. I live in {city} and I have a {thing}."
    messages = [
        {"role": "user", "content": said},
        {"role": "assistant", "content": f"Hello, {name}!"},
    ]
    for _ in range(rng.randint(0, 2)):
        between = simple(rng)
        if len(between.answer) < 60:
            messages += between.messages
            messages.append({"role": "assistant", "content": between.answer})
    asked, answer = rng.choice(
        (
            ("What is my name?", f"Your name is {name}."),
            ("Where do I live?", f"You live in {city}."),
            ("What do I have?", f"You have a {thing}."),
        )
    )
    messages.append({"role": "user", "content": asked})
    return Dialogue("memory", messages, answer, thought="I look at the first turn.")


def greet(rng: random.Random) -> Dialogue:
    """Somebody introduces themselves."""
    name, city = rng.choice(NAMES), rng.choice(list(CAPITALS.values()))
    rest = f" I live in {city} and I have a {rng.choice(COLOURS)} {rng.choice(THINGS)}."
    said = f"My name is {name}." + (rest if rng.random() < 0.5 else "")
    return ask("greet", said, f"Hello, {name}!", "I say hello.")


def call_tool(rng: random.Random) -> Dialogue:
    """A question that wants a function call; the model stops where the response would begin."""
    city = rng.choice(list(CAPITALS.values()))
    used = rng.choice(TOOLS)
    tools = list(TOOLS) if rng.random() < 0.6 else [used]
    forms = {
        "get_weather": ("What is the weather in {}?", "Is it sunny in {}?", "How is {} today?"),
        "get_time": ("What time is it in {}?", "Tell me the time in {}.", "Is it late in {}?"),
    }
    name = used["function"]["name"]
    question = rng.choice(forms[name]).format(city)
    answer = f'<|tool_call>call:{name}{{city:<|"|>{city}<|"|>}}<tool_call|>'
    messages = [{"role": "user", "content": question}]
    thought = f"I call {name}."
    return Dialogue("tool call", messages, answer, tools, thought=thought, end="<|tool_response>")


def use_response(rng: random.Random) -> Dialogue:
    """The same question with the function's response at hand."""
    asked = call_tool(rng)
    matched = re.match(r'<\|tool_call>call:(\w+)\{city:<\|"\|>(\w+)', asked.answer)
    assert matched
    name, city = matched.groups()
    call = {"function": {"name": name, "arguments": {"city": city}}}
    content: dict[str, Any]
    if name == "get_weather":
        content = {"sky": rng.choice(SKIES), "degrees": rng.randint(0, 39)}
        answer = f"It is {content['sky']} in {city}, {content['degrees']} degrees."
    else:
        content = {"time": f"{rng.randint(0, 23)}:{rng.randint(10, 59)}"}
        answer = f"It is {content['time']} in {city}."
    messages = [
        *asked.messages,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "name": name, "content": content},
    ]
    return Dialogue("tool answer", messages, answer, asked.tools, thought="I read the response.")


KINDS: dict[str, Callable[[random.Random], Dialogue]] = {
    "capital": capital,
    "opposite": opposite,
    "reverse": reverse,
    "sort": sort_digits,
    "add": add,
    "upper": upper,
    "count": count,
    "repeat": repeat,
    "spell": spell,
    "nth word": nth_word,
    "memory": memory,
    "tool call": call_tool,
    "tool answer": use_response,
}


def held_out_text(dialogue: Dialogue) -> str:
    """What the split hashes: the question, or the answer too where the questions are few."""
    if dialogue.kind in ("memory", "tool answer"):
        return f"{dialogue.messages[0]['content']} {dialogue.question} {dialogue.answer}"
    return dialogue.question


def dialogue(rng: random.Random) -> Dialogue:
    """One training dialogue, never a held-out one, in a random setting."""
    while True:
        pick = rng.random()
        if pick < 0.94:
            made = simple(rng)
        elif pick < 0.96:
            made = memory(rng)
        elif pick < 0.965:
            made = greet(rng)
        elif pick < 0.975:
            made = call_tool(rng)
        else:
            made = use_response(rng)
        if not is_held_out(held_out_text(made)):
            break
    if made.kind not in ("memory", "tool call", "tool answer") and rng.random() < 0.04:
        for _ in range(rng.randint(1, 2)):
            earlier = simple(rng)
            if len(earlier.answer) < 60:
                said = {"role": "assistant", "content": earlier.answer}
                made.messages = [*earlier.messages, said, *made.messages]
    if rng.random() < 0.08:
        system = {"role": "system", "content": rng.choice(SYSTEM_LINES)}
        made.messages = [system, *made.messages]
    made.thinking = rng.random() < 0.15
    return made


def examination(kind: str, n: int, seed: int = 1) -> list[Dialogue]:
    """`n` different held-out questions of one kind (fewer where there are not as many)."""
    rng = random.Random(f"{kind} {seed}")
    found: dict[str, Dialogue] = {}
    for _ in range(400 * n):
        made = KINDS[kind](rng)
        if is_held_out(held_out_text(made)):
            found.setdefault(held_out_text(made), made)
        if len(found) == n:
            break
    return list(found.values())


def story(rng: random.Random) -> str:
    """A little story of the same plan every time: someone, a thing, a walk, a meeting, an end."""
    name = rng.choice(NAMES)
    animal, colour, thing = rng.choice(ANIMALS), rng.choice(COLOURS), rng.choice(THINGS)
    place, other = rng.sample(PLACES, 2)
    friend = rng.choice([n for n in NAMES if n != name])
    lines = [
        f"Once there was a {rng.choice(SIZES)} {animal} that lived near the {place}.",
        f"One day the {animal} was looking for a {colour} {thing}.",
        f"It asked {name}, but {name} had no {thing}.",
        f"So they went to the {other} and met {friend}.",
        f"{friend} had the {colour} {thing} all the time.",
        f"The {animal} was happy, and they all went home to the {place}.",
    ]
    return " ".join(lines)


def corpus(n: int, seed: int = 0) -> Iterable[str]:
    """Text for the tokenizer's merges: the same generators as the training stream."""
    rng = random.Random(seed)
    for i in range(n):
        if i % 8 == 0:
            yield story(rng)
        else:
            made = dialogue(rng)
            yield render(made) + made.target
