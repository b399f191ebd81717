"""Guesses from n-grams: what followed where the same words stood before (native/ngram.c says which place is taken).

A request learns from its own text and from the answers of its siblings: all requests with the same prompt, running or
done, of this session path or another. Their answers stay known over weight updates. A policy changes little in one
step, its old answers are the best guess at the new ones when a prompt comes again, and a wrong guess costs time, never
an answer. The table has a fixed size; what was not said for longest is forgotten first.

How far to guess is learned from each request's last guesses: one more than were right when some were wrong, twice as
many when all were right.

Shapes: n seats, S seats of the engine, K guesses at most, C positions.
"""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import dataclass

import numpy as np

from skyrl_train.engines.embedded.drafts.base import Drafts, FollowedRows, Indices, Ints
from skyrl_train.engines.embedded.drafts.ngram_tables import NativeTable, PlainTable, Table
from skyrl_train.engines.embedded.kv_pool import KVPool
from skyrl_train.engines.embedded.request import Seats
from skyrl_train.engines.embedded.twin import InferenceModel


@dataclass(frozen=True, kw_only=True)
class NgramSettings:
    """`longest`: words of the text's end that are looked for, `shortest` of them must be found.

    `capacity`: contexts that are remembered for all prompts together, two for each word of an answer.
    """

    max_guesses: int = 11
    shortest: int = 2
    longest: int = 18
    capacity: int = 1 << 17


class NgramDrafter:
    """See base.Drafter. Keeps no keys, and reads nothing of the model."""

    name = "ngram"
    taps: tuple[int, ...] = ()
    has_weights = False
    pools: tuple[KVPool, ...] = ()
    models: tuple[InferenceModel, ...] = ()

    def __init__(self, settings: NgramSettings, num_seats: int, native: ctypes.CDLL | None) -> None:
        self.max_tokens = settings.max_guesses
        reach, shortest, longest = settings.max_guesses, settings.shortest, settings.longest
        self._table: Table = (
            PlainTable(reach=reach, shortest=shortest, longest=longest)
            if native is None
            else NativeTable(native, capacity=settings.capacity, reach=reach, shortest=shortest, longest=longest)
        )
        self._step = 0
        self._tenancy = np.full(num_seats, -1, dtype=np.int64)
        self._prompt = np.zeros(num_seats, dtype=np.uint64)
        self._learned = np.zeros(num_seats, dtype=np.int32)
        self._limit = np.zeros(num_seats, dtype=np.int32)
        self._guessed = np.zeros(num_seats, dtype=np.int32)
        self._guessed_at = np.zeros(num_seats, dtype=np.int64)
        self._length = np.zeros(num_seats, dtype=np.int32)

    def propose(self, seats: Seats, chosen: Indices, room: Ints) -> Drafts:
        newcomers = chosen[self._tenancy[chosen] != seats.tenancy[chosen]]
        if len(newcomers):
            self._greet(seats, newcomers)
        length = seats.length[chosen]
        self._learn_limits(chosen, length)
        learned = self._learned[chosen]
        room = np.minimum(room, self._limit[chosen])
        tokens, counts = self._table.guess(
            seats.tokens, chosen, length, seats.prompt_len[chosen], self._prompt[chosen], learned, room, self.max_tokens
        )
        self._learned[chosen] = learned
        self._guessed[chosen] = counts
        self._guessed_at[chosen] = self._step
        self._length[chosen] = length
        parents = np.broadcast_to(np.arange(-1, self.max_tokens - 1, dtype=np.int32), tokens.shape)
        return Drafts(tokens=tokens, parents=parents, counts=counts)

    def follow(self, rows: FollowedRows) -> None:
        self._step += 1

    def weights_changed(self) -> None:
        """Answers of older weights stay (see above)."""

    def _greet(self, seats: Seats, newcomers: Indices) -> None:
        for seat in newcomers.tolist():
            prompt = seats.tokens[seat, : seats.prompt_len[seat]].tobytes()
            self._prompt[seat] = int.from_bytes(hashlib.blake2b(prompt, digest_size=8).digest(), "little")
        self._tenancy[newcomers] = seats.tenancy[newcomers]
        self._learned[newcomers] = seats.prompt_len[newcomers]
        self._limit[newcomers] = self.max_tokens
        self._guessed[newcomers] = 0

    def _learn_limits(self, chosen: Indices, length: Ints) -> None:
        guessed = self._guessed[chosen]
        if not guessed.any():
            return
        right = np.minimum(length - self._length[chosen] - 1, guessed)
        limit = np.where(right == guessed, np.maximum(2 * guessed, self._limit[chosen]), right + 1)
        is_known = (guessed > 0) & (self._guessed_at[chosen] == self._step - 1)
        self._limit[chosen] = np.where(is_known, np.minimum(limit, self.max_tokens), self._limit[chosen])
