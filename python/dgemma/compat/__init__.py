"""The dictionaries and arguments of OpenAI and llama-cpp-python."""
