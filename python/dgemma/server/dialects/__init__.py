"""Other APIs in the words of chat completions, and answers in theirs: no HTTP, no model."""
