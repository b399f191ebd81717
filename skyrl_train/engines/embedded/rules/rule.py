"""The rule of one request: it changes the logits of the next token, and is told which token was taken.

    ruled(logits) -> sample -> tell(token) -> ruled(logits) -> sample -> tell(token) -> ...

A rule lives as long as its request, on whatever seat that sits: a retracted request keeps its tokens, and its rule
with them. Requests with a rule get one token a step; nothing is guessed for them.

Rules come before everything else that the sampler does. Truncation then counts what is allowed: top-k of what a
grammar allows, where the other order could leave nothing. Penalties change the order of tokens and never bring a
forbidden one back. Of the two parts the grammar is the last, so that no processor can allow what it forbids.
The log-probability of a token stays that of the model without rules, as with penalties and truncation: it is what the
trainer computes for that token.

Shapes: n rows, V words.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from skyrl_train.engines.embedded.rules.grammar import GrammarState, apply_masks, fill_masks
from skyrl_train.engines.embedded.rules.processor import LogitProcessorFailed, Processor
from skyrl_train.types import FinishReason

Indices = npt.NDArray[np.intp]

NOTHING_ALLOWED = "the grammar goes on with nothing that the vocabulary has"
"""Stop reason of an answer that can neither go on nor end."""


class LogitRule:
    """`num_taken` counts the tokens of the answer that the rule has been told."""

    def __init__(self, *, grammar: GrammarState | None = None, processor: Processor | None = None) -> None:
        self.grammar = grammar
        self.processor = processor
        self.num_taken = 0
        self.failure: LogitProcessorFailed | None = None
        """Why the answer can't go on. The token that was sampled in its place counts for nothing."""

    def take(self, token: int) -> bool:
        """The answer's next token; False where the grammar has no place for it."""
        self.num_taken += 1
        if self.processor is not None:
            self.processor.answer.append(token)
        return self.grammar is None or self.grammar.take(token)


def ruled(logits: torch.Tensor, rules: Mapping[int, LogitRule], chosen: Indices) -> torch.Tensor:
    """The logits [n, V] of the seats `chosen` [n] under their rules; a copy where one of them has a rule."""
    rows = [(row, rules[seat]) for row, seat in enumerate(chosen.tolist()) if seat in rules]
    if not rows:
        return logits
    result = logits.clone(memory_format=torch.contiguous_format)
    for row, rule in rows:
        if rule.processor is not None:
            try:
                rule.processor.change(result[row])
            except LogitProcessorFailed as exc:
                # Its request ends with this when the step does; the others in the step are none of its business.
                rule.failure = exc
                result[row] = logits[row]
    grammars = {row: rule.grammar for row, rule in rows if rule.grammar is not None}
    if grammars:
        apply_masks(result, grammars)
    for row, rule in rows:
        has_both = rule.processor is not None and row in grammars
        if has_both and rule.failure is None and result[row].max() == -torch.inf:
            assert rule.processor is not None
            rule.failure = rule.processor.left_nothing_of_the_grammar()
            result[row] = logits[row]
    return result


def tell(
    rules: Mapping[int, LogitRule], chosen: Indices, tokens: npt.NDArray[np.int64]
) -> dict[int, tuple[FinishReason, str | None]]:
    """The seats `chosen` [n] took these tokens [n]. Those whose rule ends the answer: finish and stop reason."""
    pairs = zip(chosen.tolist(), tokens.tolist(), strict=True)
    told = [(seat, token, rules[seat]) for seat, token in pairs if seat in rules]
    for _, token, rule in told:
        accepted = rule.take(token) or rule.failure is not None
        assert accepted, f"token {token} was sampled against the grammar"
    grammars = {seat: rule.grammar for seat, _, rule in told if rule.grammar is not None}
    fill_masks([state for state in grammars.values() if not state.is_over])
    ended: dict[int, tuple[FinishReason, str | None]] = {
        seat: ("abort", str(rule.failure)) for seat, _, rule in told if rule.failure is not None
    }
    for seat, state in grammars.items():
        if state.is_over:
            ended[seat] = ("stop", None)
        elif state.is_stuck:
            ended[seat] = ("abort", NOTHING_ALLOWED)
    return ended
