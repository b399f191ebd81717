"""A rule of one request: it changes the logits of the next token, and is told which token was taken.

    next(logits) -> sample -> take(token) -> next(logits) -> sample -> take(token) -> ...

A rule lives as long as its request, on whatever seat that sits: a retracted request keeps its tokens, and its rule
with them. Requests with a rule get one token a step; nothing is guessed for them.

Rules come before everything else that the sampler does. Truncation then counts what is allowed: top-k of what a
grammar allows, where the other order could leave nothing. Penalties change the order of tokens and never bring a
forbidden one back. The log-probability of a token stays that of the model without rules, as with penalties and
truncation: what the trainer computes for that token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

Indices = npt.NDArray[np.intp]


class LogitRule(Protocol):
    """Of one request. `num_taken` counts the tokens of its answer that the rule was told."""

    @property
    def num_taken(self) -> int: ...

    def change(self, logits: torch.Tensor) -> None:
        """Change the logits [V] of the next token in place; -inf forbids a token. One token at least must stay."""
        ...

    def take(self, token: int) -> None:
        """This token is the answer's next one."""
        ...


def ruled(logits: torch.Tensor, rules: Mapping[int, LogitRule], chosen: Indices) -> torch.Tensor:
    """The logits [n, V] of the seats `chosen` [n] under their rules; a copy where one of them has a rule."""
    rows = [(row, rules[seat]) for row, seat in enumerate(chosen.tolist()) if seat in rules]
    if not rows:
        return logits
    result = logits.clone()
    for row, rule in rows:
        rule.change(result[row])
    return result


def tell(rules: Mapping[int, LogitRule], chosen: Indices, tokens: npt.NDArray[np.int64]) -> None:
    """The seats `chosen` [n] took these tokens [n]."""
    for seat, token in zip(chosen.tolist(), tokens.tolist(), strict=True):
        if seat in rules:
            rules[seat].take(token)
