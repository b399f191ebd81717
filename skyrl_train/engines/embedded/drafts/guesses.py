"""A step's guesses, in the order in which they are computed, and the rows that compute them.

A tree is put into runs of rows in which each guess follows the one before it, so that a run attends like any request:

    drafted  0:a  1:b  2:a c  3:b d        in order  0:a  1:a c | 2:b  3:b d        positions  p+1 p+2 | p+1 p+2

The first run lies in the seat's own slots, position by position. Each other run sees its ancestors instead of what
else stands at their positions: it gets a line of its own in a slot table that is made for this step.

Shapes: n decoding seats, K guesses at most, D the deepest guess, T rows, R runs of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from skyrl_train.engines.embedded.drafts.base import ROOT, Drafts, Indices, Ints
from skyrl_train.engines.embedded.request import Seats

Longs = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Guesses:
    """Guesses for n seats, written to `seats.tokens` behind the known tokens, guess j with slot `length + j`."""

    tokens: Ints  # [n, K]
    parents: Ints  # [n, K]
    counts: Ints  # [n]
    paths: Ints | None
    """[n, K, D]: the guesses from the root to each one, then filler (NO_GUESS); None where all rows are chains."""

    @property
    def total(self) -> int:
        return int(self.counts.sum())


NO_GUESS = -1


def in_order(drafts: Drafts) -> tuple[Guesses, npt.NDArray[np.intp] | None]:
    """The guesses in runs, and which drafted guess [n, K] stands at each place; None: all where they were."""
    most = max(int(drafts.counts.max(initial=0)), 0)
    tokens, parents, counts = drafts.tokens[:, :most], drafts.parents[:, :most], drafts.counts
    place = np.arange(most, dtype=np.int32)
    is_there = place < counts[:, None]
    if (parents == place - 1)[is_there].all():
        return Guesses(tokens=tokens, parents=parents, counts=counts, paths=None), None
    parents = np.where(is_there, parents, ROOT)
    paths = _paths(parents, is_there)
    by_place = [paths[:, :, depth].ravel() for depth in reversed(range(paths.shape[2]))]
    row = np.repeat(np.arange(len(counts)), most)
    order = np.lexsort((*by_place, ~is_there.ravel(), row)).reshape(len(counts), most) % most
    new_place = np.empty_like(order)
    np.put_along_axis(new_place, order, np.broadcast_to(place, order.shape), axis=1)
    old_parents = np.take_along_axis(parents, order, axis=1)
    moved = np.where(old_parents == ROOT, ROOT, np.take_along_axis(new_place, np.maximum(old_parents, 0), axis=1))
    guesses = Guesses(
        tokens=np.take_along_axis(tokens, order, axis=1),
        parents=moved.astype(np.int32),
        counts=counts,
        paths=None,
    )
    return replace(guesses, paths=_paths(guesses.parents, is_there)), order


def first_branch(guesses: Guesses, which: npt.NDArray[np.bool_]) -> Guesses:
    """Of the rows `which` [n] of a tree keep the first run of guesses alone."""
    assert guesses.paths is not None
    if not which.any():
        return guesses
    follows = guesses.parents == np.arange(guesses.parents.shape[1]) - 1
    run = np.logical_and.accumulate(follows, axis=1).sum(axis=1)
    counts = np.where(which, np.minimum(guesses.counts, run), guesses.counts).astype(np.int32)
    is_there = np.arange(guesses.parents.shape[1]) < counts[:, None]
    paths = np.where(is_there[:, :, None], guesses.paths, NO_GUESS)
    return replace(guesses, counts=counts, paths=paths)


def _paths(parents: Ints, is_there: npt.NDArray[np.bool_]) -> Ints:
    """[n, K] -> [n, K, D]. A guess of which nobody asked has an empty path."""
    n, most = parents.shape
    row = np.arange(n)
    depth = np.zeros((n, most + 1), dtype=np.int64)  # of ROOT, the last column, and before it of each guess
    paths = np.full((n, most + 1, most), NO_GUESS, dtype=np.int32)
    for j in range(most):
        parent = parents[:, j]
        paths[:, j] = paths[row, parent]
        paths[row, j, depth[row, parent]] = j
        depth[:, j] = depth[row, parent] + 1
    paths = paths[:, :most]
    paths[~is_there] = NO_GUESS
    deepest = int((paths != NO_GUESS).sum(-1).max(initial=0))
    return paths[:, :, :deepest]


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodeRows:
    """The rows of the decoding seats: of each its last known token, then its guesses.

    Row t computes token `places[t]` of seat `seats[t]` at position `positions[t]`; `known[t]` tokens come before the
    one that it predicts. `begins` [n] are the seats' first rows. Run r is of seat `run_seats[r]`, ends before row
    `ends[r]` and, among trees, leads through the guesses `paths[r]` and NO_GUESS behind them.
    """

    seats: npt.NDArray[np.intp]  # [T]
    places: Longs  # [T]
    positions: Longs  # [T]
    begins: Longs  # [n]
    ends: list[int]  # [R]
    run_seats: npt.NDArray[np.intp]  # [R]
    paths: Ints | None  # [R, D]; None where each seat has one run, a chain

    @property
    def known(self) -> Ints:
        return (self.positions + 1).astype(np.int32)


def decode_rows(seats: Seats, decoding: Indices, guesses: Guesses | None) -> DecodeRows:
    """For the seats `decoding` [n], whose `computed` counts the last known token already."""
    base = seats.computed[decoding].astype(np.int64) - 1
    n = len(decoding)
    if guesses is None:
        begins = np.arange(n)
        return DecodeRows(
            seats=decoding,
            places=base,
            positions=base,
            begins=begins,
            ends=(begins + 1).tolist(),
            run_seats=decoding,
            paths=None,
        )
    num_rows = guesses.counts.astype(np.int64) + 1
    ends = np.cumsum(num_rows)
    begins = ends - num_rows
    row = np.repeat(np.arange(n), num_rows)
    offset = np.arange(int(ends[-1])) - begins[row]
    places = base[row] + offset
    if guesses.paths is None:
        return DecodeRows(
            seats=decoding[row],
            places=places,
            positions=places,
            begins=begins,
            ends=ends.tolist(),
            run_seats=decoding,
            paths=None,
        )
    paths = np.full((len(row), guesses.paths.shape[2]), NO_GUESS, dtype=np.int32)
    is_guess = offset > 0
    paths[is_guess] = guesses.paths[row[is_guess], offset[is_guess] - 1]
    follows = is_guess & (guesses.parents[row, offset - 1] == offset - 2)
    last = np.nonzero(~np.append(follows[1:], False))[0]
    return DecodeRows(
        seats=decoding[row],
        places=places,
        positions=base[row] + (paths != NO_GUESS).sum(-1),
        begins=begins,
        ends=(last + 1).tolist(),
        run_seats=decoding[row[last]],
        paths=paths[last],
    )


def slot_lines(seats: Seats, rows: DecodeRows, owners: Sequence[int], width: int) -> torch.Tensor:
    """[len(owners), width] int32: the slots that each run sees, position by position; runs of trees come first.

    `owners`: the seats of the runs.
    """
    assert rows.paths is not None
    table = seats.slots[np.asarray(owners), :width]
    run, depth = np.nonzero(rows.paths != NO_GUESS)
    first = seats.computed[rows.run_seats[run]]
    table[run, first + depth] = seats.slots[rows.run_seats[run], first + rows.paths[run, depth]]
    return torch.from_numpy(table)
