"""A chat: reads questions line by line, and prints each answer as its canvases settle.

python examples/chat.py model.gguf [conversation.session]

With a second argument the encoded conversation is kept in that file, so that the next start goes on
without encoding it again.
"""

import json
import sys
from pathlib import Path

import dgemma


def main(path: str, kept: str | None = None) -> None:
    """Talks until the input ends."""
    messages: list[dict[str, str]] = []
    words = Path(f"{kept}.json")
    with dgemma.DiffusionGemma(path) as llm:
        if kept is not None and words.exists():
            messages = json.loads(words.read_text(encoding="utf-8"))
            llm.load(kept)
        for line in sys.stdin:
            messages.append({"role": "user", "content": line.strip()})
            answer = ""
            for chunk in llm.create_chat_completion(messages, stream=True, max_tokens=512):
                text = chunk["choices"][0]["delta"].get("content", "")
                print(text, end="", flush=True)
                answer += text
            print()
            messages.append({"role": "assistant", "content": answer})
        if kept is not None:
            llm.save(kept)
            words.write_text(json.dumps(messages, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
