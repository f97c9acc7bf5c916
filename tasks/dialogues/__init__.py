"""Training dialogues: the tasks' own prompts with the answers that a small model learns from."""
