"""A task that a random tiny model can move on: more vowels, more reward. Loaded by dotted path."""

from __future__ import annotations

from typing import Any


class LetterEnv:
    runs_inline = True

    def __init__(self, *, env_config: Any, extras: dict[str, Any]) -> None:
        self.raises = extras.get("raises", False)

    def init(self, prompt: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        return prompt, {}

    def step(self, action: str) -> dict[str, Any]:
        if self.raises:
            raise ValueError("this row always fails")
        vowels = sum(letter in "aeiouAEIOU" for letter in action)
        return {"observations": [], "reward": min(1.0, vowels / 2), "done": True, "metadata": {}}

    def close(self) -> None:
        pass
