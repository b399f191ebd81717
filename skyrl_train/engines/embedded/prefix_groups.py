"""Which decoding requests read the same keys, found in the prefix cache's nodes.

    root -- [prompt A] -+- [answer 1]      requests of one prompt hold the node where it ends:
                        +- [answer 2]      the slots of its positions are the same for all of them
         -- [prompt B] --- ...

A group is worth it when what it saves reading outweighs two more kernels a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from skyrl_train.engines.embedded.radix_cache import Node
from skyrl_train.engines.embedded.request import RequestState

MIN_MEMBERS = 4
MIN_LENGTH = 64
"""Positions: one block of keys."""


@dataclass(frozen=True, kw_only=True)
class PrefixGroup:
    """`rows` of one step whose first `length` positions lie in the same slots."""

    length: int
    rows: tuple[int, ...]


def shared_prefixes(states: Sequence[RequestState]) -> list[PrefixGroup]:
    """Groups of rows, row i being of states[i]; each row is in one group at most, that of its longest shared prefix."""
    ends: dict[Node, tuple[int, list[int]]] = {}
    paths: list[list[Node]] = []
    for row, state in enumerate(states):
        node, end, path = state.node, state.num_owned_from, []
        while node is not None and node.parent is not None and end >= MIN_LENGTH:
            ends.setdefault(node, (end, []))[1].append(row)
            path.append(node)
            end -= len(node.tokens)
            node = node.parent
        paths.append(path)
    groups: dict[Node, list[int]] = {}
    for row, path in enumerate(paths):
        deepest = next((node for node in path if len(ends[node][1]) >= MIN_MEMBERS), None)
        if deepest is not None:
            groups.setdefault(deepest, []).append(row)
    return [
        PrefixGroup(length=ends[node][0], rows=tuple(rows)) for node, rows in groups.items() if len(rows) >= MIN_MEMBERS
    ]


def num_saved_tokens(groups: Sequence[PrefixGroup], rows_per_tile: int) -> int:
    """Keys that need not be read again in each layer, thanks to tiles of so many rows."""
    return sum(group.length * (len(group.rows) - -(-len(group.rows) // rows_per_tile)) for group in groups)


def max_tiles(num_rows: int) -> int:
    """Tiles that groups among so many rows can need, whatever the groups are."""
    return max(num_rows // MIN_MEMBERS, 1)


def lay_out_tiles(
    groups: Sequence[PrefixGroup], num_rows: int, rows_per_tile: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """lengths [N], rows [N, R] and row_starts [num_rows] of `PrefixTiles`; N is `max_tiles`.

    A group larger than a tile becomes several; they are of like sizes, so none has fewer than half a tile's rows.
    """
    num_tiles = max_tiles(num_rows)
    lengths = np.zeros(num_tiles, dtype=np.int32)
    rows = np.full((num_tiles, rows_per_tile), -1, dtype=np.int32)
    starts = np.zeros(num_rows, dtype=np.int32)
    tile = 0
    for group in groups:
        for part in np.array_split(np.asarray(group.rows), -(-len(group.rows) // rows_per_tile)):
            if tile == num_tiles:  # tiles of fewer rows than a group must have: the rest reads for itself
                return lengths, rows, starts
            lengths[tile] = group.length
            rows[tile, : len(part)] = part
            starts[part] = group.length
            tile += 1
    return lengths, rows, starts
