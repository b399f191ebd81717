"""A reward: how close the answer's number is, so that a near miss is worth something."""

import re


def closeness(response: str, target: str) -> float:
    """1 for the right number, 0 for none or one that is 100 or more away. `target` is the row's data.target_key."""
    numbers = re.findall(r"-?\d+", response)
    if not numbers:
        return 0.0
    return max(0.0, 1.0 - abs(int(numbers[-1][:9]) - int(target)) / 100)
