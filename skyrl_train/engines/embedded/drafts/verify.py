"""Which guesses the model would have sampled itself, and how those enter the answer.

Row by row the sampler has drawn the token that follows; a guess is right if it is the token drawn at its parent's row.
So an answer grows by the right guesses and the token drawn after the last of them, and all of it is what the engine
would have drawn one token a step.

Shapes: n sampling seats, T rows that sample, W tokens of a seat in this step at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from skyrl_train.engines.embedded.drafts.base import ROOT
from skyrl_train.engines.embedded.drafts.guesses import DecodeRows, Guesses
from skyrl_train.engines.embedded.request import Seats

Indices = npt.NDArray[np.intp]
Longs = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class VerifiedTokens:
    """PendingTokens of a step with guesses: seat i gets the first `counts[i]` of its row."""

    seats: Indices  # [n]
    tenancy: Longs  # [n]
    tokens: Longs  # [n, W]
    logprobs: Floats  # [n, W]
    counts: Longs  # [n]

    def result(self) -> tuple[Longs, Floats]:
        """The first token of each seat [n] and its log-probability [n]."""
        return self.tokens[:, 0], self.logprobs[:, 0]


def verify(
    seats: Seats, chosen: Indices, guesses: Guesses, rows: DecodeRows, tokens: Longs, logprobs: Floats
) -> VerifiedTokens:
    """What the seats `chosen` [n] get: the decoding ones first, then those whose prompt ends in this step.

    tokens and logprobs [T] were drawn at the rows of the first, in their order, and at one row of each of the others.
    """
    num_decoding, most = guesses.tokens.shape
    num_others = len(chosen) - num_decoding
    row_of = np.concatenate((rows.begins, len(tokens) - num_others + np.arange(num_others)))
    counts = np.ones(len(chosen), dtype=np.int64)
    if guesses.paths is None:
        at = np.minimum(row_of[:, None] + np.arange(most + 1), len(tokens) - 1)
        drawn = tokens[at]
        is_right = (drawn[:num_decoding, :most] == guesses.tokens) & (np.arange(most) < guesses.counts[:, None])
        counts[:num_decoding] += np.logical_and.accumulate(is_right, axis=1).sum(axis=1)
    else:
        at, drawn = np.repeat(row_of[:, None], most + 1, axis=1), None
        counts[:num_decoding] += _follow_tree(seats, chosen[:num_decoding], guesses, tokens, at[:num_decoding])
        drawn = tokens[at]
    width = int(counts.max())
    return VerifiedTokens(
        seats=chosen,
        tenancy=seats.tenancy[chosen],
        tokens=drawn[:, :width],
        logprobs=logprobs[at[:, :width]],
        counts=counts,
    )


def _follow_tree(seats: Seats, decoding: Indices, guesses: Guesses, tokens: Longs, at: Longs) -> Longs:
    """How many guesses are right [n]. Writes the right path's rows to `at` [n, K + 1], of which the first are given.

    The slots of right guesses become those of the positions that they stand for.
    """
    n, most = guesses.tokens.shape
    is_there = np.arange(most) < guesses.counts[:, None]
    first = at[:, 0]
    last = np.full(n, ROOT, dtype=np.int64)
    num_right = np.zeros(n, dtype=np.int64)
    path = np.zeros((n, most), dtype=np.int64)
    goes_on = np.ones(n, dtype=bool)
    for depth in range(most):
        drawn = tokens[first + last + 1]
        is_next = is_there & (guesses.parents == last[:, None]) & (guesses.tokens == drawn[:, None])
        goes_on &= is_next.any(axis=1)
        if not goes_on.any():
            break
        last = np.where(goes_on, is_next.argmax(axis=1), last)
        path[:, depth] = last
        num_right += goes_on
        at[goes_on, depth + 1] = (first + last + 1)[goes_on]
    for i in np.nonzero((path != np.arange(most)).any(axis=1))[0]:
        right = path[i, : num_right[i]]
        if len(right) and right[-1] != len(right) - 1:
            others = np.setdiff1d(np.arange(guesses.counts[i]), right)
            begin = seats.computed[decoding[i]]
            own = seats.slots[decoding[i], begin : begin + guesses.counts[i]]
            own[:] = own[np.concatenate((right, others))]
    return num_right


def commit_plain(seats: Seats, verified: VerifiedTokens) -> tuple[int, Indices]:
    """Append to the answers that nothing ends in this step; how many tokens that were, and the other rows."""
    chosen, counts = verified.seats, verified.counts
    length = seats.length[chosen].astype(np.int64)
    ends = length + counts >= seats.max_len[chosen]
    place = np.arange(verified.tokens.shape[1])
    is_new = place < counts[:, None]
    hits = (seats.stops.ids[chosen][:, None, :] == verified.tokens[:, :, None]).any(-1)
    ends |= (hits & is_new).any(axis=1)
    ends |= seats.has_rule[chosen]
    if seats.stops.strings:
        ends |= np.isin(chosen, list(seats.stops.strings))
    row, column = np.nonzero(is_new & ~ends[:, None])
    seats.tokens[chosen[row], length[row] + column] = verified.tokens[row, column]
    seats.logprobs[chosen[row], length[row] + column] = verified.logprobs[row, column]
    plain = chosen[~ends]
    seats.length[plain] += counts[~ends].astype(np.int32)
    seats.computed[plain] = seats.length[plain] - 1
    return len(row), np.nonzero(ends)[0]


def one_by_one(seats: Seats, verified: VerifiedTokens, rows: Indices) -> Iterator[tuple[Indices, Longs, Floats]]:
    """(seats, tokens, log-probabilities) to append, a token each; who has left its seat meanwhile gets no more."""
    for column in range(verified.tokens.shape[1]):
        rows = rows[verified.counts[rows] > column]
        rows = rows[seats.tenancy[verified.seats[rows]] == verified.tenancy[rows]]
        if not len(rows):
            return
        chosen = verified.seats[rows]
        seats.computed[chosen] = seats.length[chosen]
        yield chosen, verified.tokens[rows, column], verified.logprobs[rows, column]
