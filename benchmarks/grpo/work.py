"""What both sides must do in a step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.workload import LengthRange, Request, draw_tokens

LEARNING_RATE = 1e-6
EPS_CLIP = 0.2
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """P prompts with G samples each; `completion_lens` [P][G]. Lengths are every step's, tokens are each step's own."""

    prompt_lens: tuple[int, ...]
    completion_lens: tuple[tuple[int, ...], ...]
    vocab_size: int
    seed: int

    @classmethod
    def draw(
        cls, num_prompts: int, num_samples: int, *, prompt: LengthRange, new: LengthRange, vocab_size: int, seed: int
    ) -> StepWork:
        rng = random.Random(seed)
        return cls(
            prompt_lens=tuple(rng.randint(prompt.low, prompt.high) for _ in range(num_prompts)),
            completion_lens=tuple(
                tuple(rng.randint(new.low, new.high) for _ in range(num_samples)) for _ in range(num_prompts)
            ),
            vocab_size=vocab_size,
            seed=seed,
        )

    @property
    def num_prompts(self) -> int:
        return len(self.prompt_lens)

    @property
    def num_samples(self) -> int:
        """Samples a prompt."""
        return len(self.completion_lens[0])

    @property
    def flat_lens(self) -> tuple[int, ...]:
        """Of all completions, prompt after prompt."""
        return tuple(length for lens in self.completion_lens for length in lens)

    @property
    def num_completion_tokens(self) -> int:
        return sum(self.flat_lens)

    @property
    def max_completion_len(self) -> int:
        return max(self.flat_lens)

    def prompts(self, step: int) -> list[tuple[int, ...]]:
        """The prompts of step `step`: new ones each time, so that nothing can be reused from the step before."""
        rng = random.Random(self.seed * 1_000_003 + step + 1)
        return [draw_tokens(rng, length, self.vocab_size) for length in self.prompt_lens]

    def requests(self, step: int) -> list[Request]:
        """One for each completion."""
        return [
            Request(prompt_token_ids=prompt, max_new_tokens=length)
            for prompt, lens in zip(self.prompts(step), self.completion_lens, strict=True)
            for length in lens
        ]

    def __str__(self) -> str:
        lens = self.flat_lens
        return (
            f"{self.num_prompts} prompts x {self.num_samples} samples; prompt tokens {min(self.prompt_lens)} to "
            f"{max(self.prompt_lens)}, {sum(self.prompt_lens)} in all; completion tokens {min(lens)} to {max(lens)}, "
            f"{sum(lens)} in all"
        )


def reward(completion_ids: Sequence[int]) -> float:
    """How many even token ids: differs within every group and costs nothing."""
    return float(sum(token % 2 == 0 for token in completion_ids))
