"""An environment: it may rewrite the prompt, and judges the answer. skyrl-gym's BaseTextEnv fits as well."""

from typing import Any


class DigitByDigit:
    """Every digit in its right place is worth its share of 1."""

    runs_inline = True  # it only computes; without this line each call is made in a thread, with a deadline

    def __init__(self, *, env_config: Any, extras: dict[str, Any]) -> None:
        self.target = extras["reward_spec"]["ground_truth"]  # extras: the row's columns

    def init(self, prompt: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        return prompt, {}

    def step(self, action: str) -> dict[str, Any]:
        right = sum(a == b for a, b in zip(action, self.target, strict=False))
        reward = right / max(len(action), len(self.target))
        return {"observations": [], "reward": reward, "done": True, "metadata": {}}

    def close(self) -> None:
        pass  # called when the trajectory ends, fails or is cancelled
