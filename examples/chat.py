"""A chat: reads questions line by line, and prints each answer as its canvases settle.

python examples/chat.py model.gguf
"""

import sys

import dgemma


def main(path: str) -> None:
    """Talks until the input ends."""
    messages: list[dict[str, str]] = []
    with dgemma.DiffusionGemma(path) as llm:
        for line in sys.stdin:
            messages.append({"role": "user", "content": line.strip()})
            answer = ""
            for chunk in llm.create_chat_completion(messages, stream=True, max_tokens=512):
                text = chunk["choices"][0]["delta"].get("content", "")
                print(text, end="", flush=True)
                answer += text
            print()
            messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main(sys.argv[1])
