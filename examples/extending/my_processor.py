"""A logit processor: it forbids a token that the answer has often enough."""

from collections.abc import Sequence

import torch


def at_most(
    logits: torch.Tensor, prompt: Sequence[int], answer: Sequence[int], *, token_id: int, times: int = 1
) -> None:
    """Changes the next token's logits [V] in place: -inf is never sampled, and one token at least must stay."""
    if answer.count(token_id) >= times:
        logits[token_id] = -torch.inf
