"""What is asked of every engine: prompts and lengths drawn with a fixed seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.models import FIRST_WORD_ID


@dataclass(frozen=True, kw_only=True)
class LengthRange:
    """Lengths drawn uniformly from [low, high], both included; written "16:256", or "256" for a constant."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> LengthRange:
        low, _, high = text.partition(":")
        result = cls(low=int(low), high=int(high or low))
        if not 1 <= result.low <= result.high:
            raise ValueError(f"a length range is LOW:HIGH with 1 <= LOW <= HIGH, found {text!r}")
        return result

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"


@dataclass(frozen=True, kw_only=True)
class Request:
    """One completion to make, of exactly `max_new_tokens` tokens."""

    prompt_token_ids: tuple[int, ...]
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Output:
    """What an engine made of one request; `logprobs` are the sampled tokens'."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


def draw_requests(
    num_requests: int, *, prompt: LengthRange, new: LengthRange, vocab_size: int, seed: int
) -> tuple[Request, ...]:
    """Random prompts without a common prefix, so that no cache can help."""
    rng = random.Random(seed)
    return tuple(
        Request(
            prompt_token_ids=draw_tokens(rng, rng.randint(prompt.low, prompt.high), vocab_size),
            max_new_tokens=rng.randint(new.low, new.high),
        )
        for _ in range(num_requests)
    )


def draw_tokens(rng: random.Random, length: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(rng.randrange(FIRST_WORD_ID, vocab_size) for _ in range(length))


def num_new_tokens(requests: Sequence[Request]) -> int:
    return sum(request.max_new_tokens for request in requests)


def describe(requests: Sequence[Request]) -> str:
    prompts = [len(request.prompt_token_ids) for request in requests]
    new = [request.max_new_tokens for request in requests]
    return (
        f"{len(requests)} requests; prompt tokens {min(prompts)} to {max(prompts)}, {sum(prompts)} in all; "
        f"new tokens {min(new)} to {max(new)}, {sum(new)} in all"
    )
