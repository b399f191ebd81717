"""Speculation in one engine: asks the drafter when there is room, and counts what comes of it.

Guesses take what is left: rows that no prompt needs, slots that are free or hold nothing but evictable prefixes. Nobody
waits, is cut short or sent back to the queue for a guess.

Shapes: n seats, K guesses at most.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from skyrl_train.engines.base import Capability
from skyrl_train.engines.embedded.drafts.auto import Auto, Size
from skyrl_train.engines.embedded.drafts.base import ROOT, Drafter, DraftSource, FollowedRows, Indices, Ints
from skyrl_train.engines.embedded.drafts.guesses import Guesses, first_branch, in_order
from skyrl_train.engines.embedded.drafts.verify import VerifiedTokens
from skyrl_train.engines.embedded.request import Seats
from skyrl_train.errors import ConfigError

if TYPE_CHECKING:
    from skyrl_train.engines.embedded.runner import Runner
    from skyrl_train.engines.embedded.scheduler import Scheduler

logger = logging.getLogger(__name__)

SPECULATES: frozenset[Capability] = frozenset({"speculation"})


class Slots(Protocol):
    """Who gives slots: the scheduler."""

    @property
    def num_available(self) -> int: ...

    def give_slots(self, chosen: Indices, count: Ints) -> None:
        """`count` [n] slots more for each of these seats."""
        ...


@dataclass(kw_only=True)
class Counts:
    """Since the engine began. A verification is one seat in one step that had guesses for it."""

    verifications: int = 0
    guessed: int = 0
    committed: int = 0
    """Tokens that verifications brought, the one after the last right guess included."""

    @property
    def accept_len(self) -> float:
        return self.committed / self.verifications if self.verifications else 1.0

    @property
    def accept_rate(self) -> float:
        """Right guesses over all guesses."""
        return (self.committed - self.verifications) / self.guessed if self.guessed else 0.0


@runtime_checkable
class Follower(Protocol):
    """Who computes steps: a runner that can verify guesses."""

    def speculate(self, speculation: Speculation) -> None: ...


class Speculation:
    """One drafter at work."""

    @classmethod
    def of(cls, drafts: DraftSource, scheduler: Scheduler, runner: Runner) -> Speculation:
        """Make the drafter, and tell those who take part. Raises ConfigError where the runner can't verify guesses."""
        if not isinstance(runner, Follower):
            raise ConfigError(
                "embedded engine: speculation is built for the CPU; leave generator.speculative_decoding out on a GPU"
            )
        drafter = drafts.make(scheduler.pool.num_slots, scheduler.seats.num_seats)
        speculation = cls(drafter, Auto() if drafts.measures else None, follows_model=drafts.follows_model)
        scheduler.speculation = speculation
        runner.speculate(speculation)
        return speculation

    def __init__(self, drafter: Drafter, auto: Auto | None = None, *, follows_model: bool = False) -> None:
        self.drafter = drafter
        self._can_be_behind = drafter.has_weights and not follows_model
        self.auto = auto
        self.counts = Counts()
        self._measured: tuple[Size, float] | None = None
        self.num_updates_behind = 0
        """Weight updates of the model since the drafter was made or `refreshed`."""

    def plan(self, seats: Seats, decoding: Indices, budget: int, slots: Slots, *, only_decodes: bool) -> Guesses | None:
        """Guesses for the seats `decoding` [n], `budget` at most; None if there are none.

        Their `computed` counts the last known token already, which the coming step computes.
        """
        if self.auto is not None:
            size = self.auto.size(len(decoding))
            is_guessing = size.guesses
            if only_decodes and size.idle:
                size.rest()
            elif only_decodes:
                self._measured = (size, time.thread_time())
            if not is_guessing:
                return None
        return self._guess(seats, decoding, budget, slots)

    def step_done(self, num_tokens: int) -> None:
        """The step that was planned last brought so many tokens."""
        if self._measured is not None:
            size, began = self._measured
            size.add(time.thread_time() - began, num_tokens)
            self._measured = None

    def _guess(self, seats: Seats, decoding: Indices, budget: int, slots: Slots) -> Guesses | None:
        room = self._room(seats, decoding, budget, slots)
        asked = np.nonzero(room > 0)[0]
        if not len(asked):
            return None
        chosen, room = decoding[asked], room[asked]
        if self.drafter.pools:
            _give(seats, chosen, room, slots)  # it writes keys of its guesses
        drafts = self.drafter.propose(seats, chosen, room)
        if not drafts.counts.any():
            return None
        assert (drafts.counts <= room).all(), f"{self.drafter.name} guessed more than there was room for"
        _give(seats, chosen, drafts.counts, slots)
        guesses, order = in_order(drafts)
        row, place = np.nonzero(np.arange(guesses.tokens.shape[1]) < guesses.counts[:, None])
        position = seats.computed[chosen[row]] + place
        seats.tokens[chosen[row], position] = guesses.tokens[row, place]
        if order is not None:
            moved_from = seats.computed[chosen[row]] + order[row, place]
            seats.slots[chosen[row], position] = seats.slots[chosen[row], moved_from]
            # Penalties look at a seat's tokens position by position, and only the first branch stands there.
            guesses = first_branch(guesses, seats.sampling.penalises[chosen])
        return guesses if len(asked) == len(decoding) else _spread(guesses, asked, len(decoding))

    def figures(self) -> dict[str, Any]:
        """Of EngineStats."""
        counts = self.counts
        return {
            "accept_len": counts.accept_len,
            "num_verifications_total": counts.verifications,
            "num_drafted_tokens_total": counts.guessed,
            "num_accepted_tokens_total": counts.committed - counts.verifications,
            "draft_updates_behind": self.num_updates_behind if self.drafter.has_weights else None,
        }

    def refreshed(self) -> None:
        """The drafter's own weights were made anew, after the model's last update."""
        self.num_updates_behind = 0

    def follow(self, rows: FollowedRows) -> None:
        self.drafter.follow(rows)

    def verified(self, guesses: Guesses, tokens: VerifiedTokens) -> None:
        """Count a step; `guesses` are of the first of its seats."""
        had_some = guesses.counts > 0
        self.counts.verifications += int(had_some.sum())
        self.counts.guessed += guesses.total
        self.counts.committed += int(tokens.counts[: len(had_some)][had_some].sum())

    def weights_changed(self) -> None:
        self.drafter.weights_changed()
        if not self._can_be_behind:
            return
        self.num_updates_behind += 1
        if self.num_updates_behind == 1:
            logger.info(
                "the model was updated, the weights of its %s draft were not: engine/draft_updates_behind counts, "
                "engine/accept_len tells what it costs",
                self.drafter.name,
            )

    def _room(self, seats: Seats, decoding: Indices, budget: int, slots: Slots) -> Ints:
        """How many guesses [n] each seat may have."""
        most = min(self.drafter.max_tokens, budget // max(len(decoding), 1))
        computed = seats.computed[decoding]
        # One token comes without a guess, so a guess for the last one of an answer would be for nothing.
        room = np.minimum(seats.max_len[decoding] - computed - 1, most)
        room[seats.has_rule[decoding]] = 0
        room = np.maximum(room, 0)
        spare = seats.allocated[decoding] - computed
        missing = np.maximum(room - spare, 0)
        if missing.any():
            is_too_much = np.cumsum(missing) > slots.num_available
            room = np.where(is_too_much, np.minimum(room, spare), room)
        result: Ints = room.astype(np.int32)
        return result


def _give(seats: Seats, chosen: Indices, count: Ints, slots: Slots) -> None:
    """See to it that `count` [n] guesses of each seat have slots."""
    missing = np.maximum(seats.computed[chosen] + count - seats.allocated[chosen], 0)
    if missing.any():
        slots.give_slots(chosen, missing)


def _spread(guesses: Guesses, at: Indices, n: int) -> Guesses:
    """For n seats, of which those `at` have these guesses and the others none."""
    counts = np.zeros(n, dtype=np.int32)
    counts[at] = guesses.counts
    tokens = np.zeros((n, guesses.tokens.shape[1]), dtype=np.int32)
    tokens[at] = guesses.tokens
    parents = np.full_like(tokens, ROOT)
    parents[at] = guesses.parents
    paths = None
    if guesses.paths is not None:
        paths = np.full((n, *guesses.paths.shape[1:]), -1, dtype=np.int32)
        paths[at] = guesses.paths
    return Guesses(tokens=tokens, parents=parents, counts=counts, paths=paths)
