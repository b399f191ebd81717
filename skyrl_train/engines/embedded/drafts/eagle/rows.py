"""How a head's rows lie: its key for position p stands under the model's slot of position p + 1.

    position        0    1    2    3    4
    token           a    b    c    d    e         known; the model has computed a to d
    slot            7    3    9    4    -         4 has none, or one without content
    head's row      (b, hidden a)  (c, hidden b)  (d, hidden c)  (e, hidden d)
    its position    0              1              2              3
    its key's slot  3              9              4              spare

A row's key depends on the tokens up to the one after its position, which are those that the slot of that token depends
on: so what the prefix cache shares between requests is the head's to share as well. Keys of guesses lie in spare slots
behind the model's, which nobody shares.

Shapes: n requests, T rows, C positions, B branches of a tree.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from skyrl_train.engines.embedded.attention import PagedBatch

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class KnownRows:
    """Rows for known tokens: their tokens, the slots of the hidden states that they go on from, and how they attend."""

    token_ids: Longs  # [T]
    hidden_slots: Longs  # [T]
    batch: PagedBatch

    @property
    def last_rows(self) -> torch.Tensor:
        """The last row of each request [n]."""
        return torch.tensor(self.batch.cu_rows[1:]) - 1


def known_rows(tokens: Ints, slots: Ints, first: Longs, length: Longs, spare: Longs, table: Ints) -> KnownRows:
    """Rows for tokens at positions [first, length) of each request; first >= 1, and at least one each.

    tokens and slots [n, C] by position; `spare` [n] takes the last row's key; `table` [n, >= C] is what the rows attend
    through, already filled.
    """
    counts = length - first
    cu_rows = np.concatenate(([0], np.cumsum(counts)))
    owner = np.repeat(np.arange(len(first)), counts)
    position = np.arange(cu_rows[-1]) - np.repeat(cu_rows[:-1] - first, counts)  # of the token
    key_slots = slots[owner, position].astype(np.int64)
    key_slots[cu_rows[1:] - 1] = spare
    return KnownRows(
        token_ids=tokens[owner, position].astype(np.int64),
        hidden_slots=slots[owner, position - 1].astype(np.int64),
        batch=PagedBatch(
            row_slots=torch.from_numpy(key_slots),
            row_positions=torch.from_numpy(position - 1),
            row_seats=torch.from_numpy(owner.astype(np.int32)),
            request_seats=list(range(len(first))),
            cu_rows=cu_rows.tolist(),
            slot_table=torch.from_numpy(table),
        ),
    )


def guess_rows(positions: Longs, slots: Longs, table: Ints) -> PagedBatch:
    """One row for each row of `table` [R, C], at `positions` [R], with its key in `slots` [R]."""
    num_rows = len(positions)
    return PagedBatch(
        row_slots=torch.from_numpy(slots),
        row_positions=torch.from_numpy(positions),
        row_seats=torch.arange(num_rows, dtype=torch.int32),
        request_seats=list(range(num_rows)),
        cu_rows=list(range(num_rows + 1)),
        slot_table=torch.from_numpy(table),
    )
