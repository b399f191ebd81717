"""Drafters that tests control: right, wrong, random, trees; none of them may change an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from skyrl_train.engines.embedded.drafts.base import ROOT, Drafter, Drafts, DraftSource, FollowedRows, Indices, Ints
from skyrl_train.engines.embedded.kv_pool import KVPool
from skyrl_train.engines.embedded.request import Seats
from skyrl_train.engines.embedded.twin import InferenceModel


def source(drafter: Drafter) -> DraftSource:
    return DraftSource(bytes_per_token=0, make=lambda num_slots, num_seats: drafter)


class TestDrafter:
    """Notes what it follows; keeps nothing."""

    __test__ = False
    name = "test"
    taps: tuple[int, ...] = ()
    has_weights = False
    pools: tuple[KVPool, ...] = ()
    models: tuple[InferenceModel, ...] = ()

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.num_updates = 0

    def follow(self, rows: FollowedRows) -> None:
        assert (rows.hidden is None) == (not self.taps)

    def weights_changed(self) -> None:
        self.num_updates += 1


class Knowing(TestDrafter):
    """Knows each request's answer, by its id: guesses are right but for every `wrong_each`-th token."""

    def __init__(self, answers: Mapping[str, Sequence[int]], max_tokens: int, wrong_each: int = 0) -> None:
        super().__init__(max_tokens)
        self.answers = answers
        self.wrong_each = wrong_each

    def propose(self, seats: Seats, chosen: Indices, room: Ints) -> Drafts:
        tokens = np.zeros((len(chosen), self.max_tokens), dtype=np.int32)
        counts = np.zeros(len(chosen), dtype=np.int32)
        for i, seat in enumerate(chosen):
            owner = seats.owners[seat]
            assert owner is not None
            begin = int(seats.length[seat] - seats.prompt_len[seat])
            coming = list(self.answers[owner.request.request_id][begin : begin + int(room[i])])
            for at in range(len(coming)):
                if self.wrong_each and (begin + at) % self.wrong_each == self.wrong_each - 1:
                    coming[at] = (coming[at] + 1) % 256
            tokens[i, : len(coming)] = coming
            counts[i] = len(coming)
        return Drafts(tokens=tokens, parents=chain(tokens), counts=counts)


class RandomTrees(TestDrafter):
    """Trees of any shape from few words, with the right token among them where `answers` knows it."""

    def __init__(self, answers: Mapping[str, Sequence[int]], max_tokens: int, seed: int, num_words: int = 256) -> None:
        super().__init__(max_tokens)
        self.answers = answers
        self.random = np.random.default_rng(seed)
        self.num_words = num_words

    def propose(self, seats: Seats, chosen: Indices, room: Ints) -> Drafts:
        shape = (len(chosen), self.max_tokens)
        tokens, parents = np.zeros(shape, dtype=np.int32), np.full(shape, ROOT, dtype=np.int32)
        counts = self.random.integers(0, room + 1).astype(np.int32)
        for i, seat in enumerate(chosen):
            owner = seats.owners[seat]
            assert owner is not None
            begin = int(seats.length[seat] - seats.prompt_len[seat])
            answer = list(self.answers.get(owner.request.request_id, ()))
            depth = {ROOT: 0}
            for j in range(counts[i]):
                parents[i, j] = parent = int(self.random.integers(-1, j))
                depth[j] = depth[parent] + 1
                taken = {int(tokens[i, k]) for k in range(j) if parents[i, k] == parent}
                at = begin + depth[j] - 1
                word = answer[at] if at < len(answer) and self.random.random() < 0.7 else -1
                while word in taken or word < 0:
                    word = int(self.random.integers(0, self.num_words))
                tokens[i, j] = word
        return Drafts(tokens=tokens, parents=parents, counts=counts)


def chain(tokens: Ints) -> Ints:
    """Parents [n, K] of guesses that follow each other."""
    return np.broadcast_to(np.arange(-1, tokens.shape[1] - 1, dtype=np.int32), tokens.shape)
