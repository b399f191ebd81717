"""Work whose answers have long-tailed lengths, for any shape: a random model that stops at one of many tokens.

A random model's next token is nearly uniform over the vocabulary of V. With V / m stop tokens an answer ends at each
token with probability 1 / m: lengths are geometric with mean m, cut at the limit, as wide as a policy's own.
The reward counts words from the lower half of the vocabulary; it has nothing to do with length.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import ModelShape, build_byte_tokenizer, build_model

FIRST_FILLER_ID = 259
_WORD = re.compile(r"w(\d+)")
LETTERS = "abcdefghijklmnopqrstuvwxyz "


class LowWords:
    """Reward: the fraction of an answer's words whose number is under the row's `half`. One turn."""

    def __init__(self, *, env_config: Any, extras: dict[str, Any]) -> None:
        self._half = int(extras["half"])

    def init(self, prompt: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        return prompt, {}

    def step(self, action: str) -> dict[str, Any]:
        numbers = [int(number) for number in _WORD.findall(action)]
        reward = sum(number < self._half for number in numbers) / len(numbers) if numbers else 0.0
        return {"observations": [], "reward": reward, "done": True, "metadata": {}}

    def close(self) -> None:
        pass


def write_work(
    folder: Path,
    shape: ModelShape,
    *,
    num_prompts: int,
    prompt_chars: int,
    device: str,
    dtype: torch.dtype,
    seed: int,
) -> tuple[Path, Path]:
    """A model's folder, made once on `device`, and a file of prompts."""
    name = f"{shape.name}-{str(dtype).removeprefix('torch.')}-{seed}"
    model_folder = folder / name
    if not (model_folder / "config.json").is_file():
        model = build_model(shape, attn_implementation="sdpa", device=device, dtype=dtype, seed=seed)
        build_byte_tokenizer(shape.vocab_size).save_pretrained(model_folder)
        model.save_pretrained(model_folder)
    rng = random.Random(seed)
    rows = [
        {"prompt": "".join(rng.choices(LETTERS, k=prompt_chars)), "half": shape.vocab_size // 2}
        for _ in range(num_prompts)
    ]
    data = folder / f"{name}-{num_prompts}x{prompt_chars}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model_folder, data


def stop_ids(vocab_size: int, mean_length: int) -> list[int]:
    """Evenly spread over the words, so that neither half of the vocabulary ends more answers than the other."""
    count = max(vocab_size // mean_length, 1)
    step = (vocab_size - FIRST_FILLER_ID) / count
    return sorted({FIRST_FILLER_ID + int(i * step) for i in range(count)})
