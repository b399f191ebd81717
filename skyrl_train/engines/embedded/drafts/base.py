"""What a drafter is: it guesses, the model verifies, and the answer never depends on who guessed.

    propose ──► guesses in slots beyond the known tokens ──► one forward over all of them ──► verify ──► commit
       ▲                                                             │ hidden states
       └───────────────────────── follow ────────────────────────────┘

Verification samples each token exactly as it would be sampled without drafts, from the same uniform number of
(seed, index), and goes on while a guess is that token. For a guess that is a point mass this is rejection sampling
(Leviathan, Kalman, Matias, arXiv:2211.17192: accept with probability p(guess), else draw from the rest), and it keeps
more than the distribution: with a seed the answer is the one without drafts. A drafter with a distribution of its own
guesses best by the inverse of its cumulative distribution at the same uniform number.

Shapes: n seats, K guesses at most, T rows of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from skyrl_train.engines.embedded.attention import PagedBatch
from skyrl_train.engines.embedded.kv_pool import KVPool
from skyrl_train.engines.embedded.request import Seats
from skyrl_train.engines.embedded.twin import InferenceModel

Indices = npt.NDArray[np.intp]
Ints = npt.NDArray[np.int32]

ROOT = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class Drafts:
    """Guesses for n seats. Row i has `counts[i]` of them; what stands behind is filler.

    `parents[i, j]` < j is the guess that guess j follows, ROOT the last known token: a chain is -1 0 1 2, a tree of two
    first guesses of which the first goes on -1 -1 0. Guesses with one parent differ. Guess j of seat s has its keys and
    values, the model's and the drafter's, in slot `seats.slots[s, seats.length[s] + j]`, whatever its depth.
    """

    tokens: Ints  # [n, K]
    parents: Ints  # [n, K]
    counts: Ints  # [n]


@dataclass(frozen=True, kw_only=True, eq=False)
class FollowedRows:
    """Rows that the model computed in this step, guesses included: their tokens, where their keys are, and `hidden`.

    `hidden` [T, len(taps) * H] joins the outputs of the layers that the drafter taps; None where it taps none. With
    trees in it a seat has several runs of rows in `batch`, each with a line of its own in `batch.slot_table`.
    """

    token_ids: torch.Tensor  # [T] int64
    batch: PagedBatch
    hidden: torch.Tensor | None


class Drafter(Protocol):
    """Guesses for decoding requests. Its own keys and values, if any, lie under the same slots as the model's.

    So what the prefix cache shares, moves and forgets of the model's holds for the drafter's too.
    """

    name: str
    max_tokens: int
    """K: guesses for one request in one step at most."""
    taps: tuple[int, ...]
    """Indices of the decoder layers whose outputs `follow` reads; -1 is the input of the first, and the number of
    layers is what the final norm makes of the last one's output."""

    has_weights: bool
    """It was trained for the model, and stays behind when that learns; else it guesses from text alone."""

    pools: tuple[KVPool, ...]
    """Of its own keys and values. Like `models`, what it computes with, they sleep with the engine's (see sleep)."""
    models: tuple[InferenceModel, ...]

    def propose(self, seats: Seats, chosen: Indices, room: Ints) -> Drafts:
        """Guesses for the seats `chosen` [n], at most `room` [n] each, which is 1 or more. Nothing is in flight.

        Slots for `room` guesses are there if it has pools, and the model's keys of all known tokens but the last one.
        """
        ...

    def follow(self, rows: FollowedRows) -> None:
        """The model computed these rows; called after each step, before its tokens are committed."""
        ...

    def weights_changed(self) -> None:
        """The model's weights were updated; all keys are gone."""
        ...


@dataclass(frozen=True, kw_only=True)
class DraftSource:
    """A drafter that is still to be made: the pools are sized together, by what a token takes in each.

    `make(num_slots, num_seats)`: the model's pool has so many slots and one more that belongs to nobody, and so many
    requests run at once. `bytes_per_token` of the drafter's own keys and values, 0 if it has none.
    """

    bytes_per_token: int
    make: Callable[[int, int], Drafter]
    follows_model: bool = False
    """Its weights are trained along: they are new when the model's are."""
    measures: bool = False
    """Leave guesses out where they cost more time than they save (see auto)."""
