"""The prefix cache: a radix tree over token ids whose nodes own KV slots.

    root -- [5 6 7] -- [8 9]        two prompts that share 5 6 7
                    \\- [4]

A node's slots hold the keys and values of its tokens. `ref_count` counts the running requests whose prefix
passes through the node; a node with references is never evicted, and neither are its ancestors. Leaves
without references are evicted, least recently used first, from their end, token by token if need be.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from skyrl_train.engines.embedded.kv_pool import KVPool, Slots

Tokens = npt.NDArray[np.int32]


class Node:
    """`tokens` [n] on the edge from `parent`, their `slots` [n]."""

    __slots__ = ("children", "last_used", "parent", "ref_count", "serial", "slots", "tokens")

    def __init__(self, parent: Node | None, tokens: Tokens, slots: Slots, serial: int) -> None:
        self.parent = parent
        self.tokens = tokens
        self.slots = slots
        self.children: dict[int, Node] = {}
        self.ref_count = 0
        self.last_used = 0
        self.serial = serial


class RadixCache:
    """`num_evictable` slots could be freed right now; `num_evicted_total` were, so far."""

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self._serial = 0
        self._clock = 0
        self.root = Node(None, _EMPTY, _EMPTY, 0)
        self.num_evictable = 0
        self.num_locked = 0
        self.num_evicted_total = 0
        self.num_flushes_total = 0
        self._num_nodes = 0
        self._heap: list[tuple[int, int, Node]] = []

    def match(self, tokens: Tokens, below: Node | None = None) -> tuple[Node, Slots]:
        """The deepest node on the path of `tokens` (from the root or `below`), and the slots of what matched.

        A node that matches in part is split, so the prefix always ends at a node. Lock it before anything is
        allocated: allocation may evict what nobody holds.
        """
        node, parts, done = below or self.root, [], 0
        while done < len(tokens):
            child = node.children.get(int(tokens[done]))
            if child is None:
                break
            common = _common_prefix(child.tokens, tokens[done:])
            if common < len(child.tokens):
                child = self._split(child, common)
            parts.append(child.slots)
            done += common
            node = child
        if len(parts) == 1:
            return node, parts[0]
        return node, np.concatenate(parts) if parts else _EMPTY

    def extend(self, node: Node, tokens: Tokens, slots: Slots) -> Node:
        """Hang `tokens` below `node` and take over their `slots`; no child may start with the same token."""
        assert len(tokens) == len(slots) and len(tokens) > 0
        first = int(tokens[0])
        assert first not in node.children, f"token {first} already continues this prefix"
        child = self._new_node(node, tokens.copy(), slots.copy())
        node.children[first] = child
        self.num_evictable += len(tokens)
        self._touch(child)
        return child

    def insert(self, below: Node, tokens: Tokens, slots: Slots) -> None:
        """Add what follows the prefix that ends at `below`; takes over the slots.

        Slots of tokens that the tree has already are freed.
        """
        node, matched = self.match(tokens, below)
        done = len(matched)
        self._pool.free(slots[:done])
        if done < len(tokens):
            self.extend(node, tokens[done:], slots[done:])
        else:
            self._touch(node)

    def lock(self, node: Node) -> None:
        """Hold the path from `node` to the root."""
        step: Node | None = node
        while step is not None and step.parent is not None:
            if step.ref_count == 0:
                self.num_evictable -= len(step.tokens)
                self.num_locked += len(step.tokens)
            step.ref_count += 1
            step = step.parent

    def lock_below(self, upper: Node, lower: Node) -> None:
        """Move a hold from `upper` down to its child `lower`, which was just added."""
        assert lower.parent is upper and lower.ref_count == 0
        self.num_evictable -= len(lower.tokens)
        self.num_locked += len(lower.tokens)
        lower.ref_count = 1

    def unlock(self, node: Node) -> None:
        self._clock += 1
        step: Node | None = node
        while step is not None and step.parent is not None:
            assert step.ref_count > 0, "unlocked more often than locked"
            step.ref_count -= 1
            step.last_used = self._clock
            if step.ref_count == 0:
                self.num_evictable += len(step.tokens)
                self.num_locked -= len(step.tokens)
                self._offer(step)
            step = step.parent

    def evict(self, count: int) -> None:
        """Free exactly `count` slots; at least so many must be evictable."""
        assert count <= self.num_evictable, (count, self.num_evictable)
        self.num_evicted_total += count
        while count > 0:
            last_used, serial, node = heapq.heappop(self._heap)
            alive = node.parent is not None and node.ref_count == 0 and not node.children
            if not alive or (node.last_used, node.serial) != (last_used, serial):
                continue  # an older offer of a node that was used, split or evicted since
            taken = min(count, len(node.tokens))
            keep = len(node.tokens) - taken
            self._pool.free(node.slots[keep:])
            self.num_evictable -= taken
            count -= taken
            if keep:
                node.tokens, node.slots = node.tokens[:keep], node.slots[:keep]
                self._offer(node)
            else:
                self._drop_leaf(node)

    def flush(self) -> None:
        """Forget everything. No node may be locked."""
        assert self.num_locked == 0, f"{self.num_locked} tokens are in use"
        for node in self.nodes():
            self._pool.free(node.slots)
            node.parent = None
        self.root.children.clear()
        self._heap.clear()
        self._num_nodes = 0
        self.num_evictable = 0
        self.num_flushes_total += 1

    def nodes(self) -> Iterator[Node]:
        """All nodes but the root."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node

    def check_integrity(self) -> None:
        evictable = locked = num_nodes = 0
        for node in self.nodes():
            assert node.parent is not None and node.parent.children[int(node.tokens[0])] is node
            assert len(node.tokens) == len(node.slots) > 0
            assert node.ref_count >= sum(child.ref_count for child in node.children.values()) >= 0
            num_nodes += 1
            if node.ref_count:
                locked += len(node.tokens)
            else:
                evictable += len(node.tokens)
        assert (evictable, locked, num_nodes) == (self.num_evictable, self.num_locked, self._num_nodes)
        offers = {(last_used, id(node)) for last_used, _, node in self._heap}
        for node in self.nodes():
            if node.ref_count == 0 and not node.children:
                assert (node.last_used, id(node)) in offers, "an evictable leaf that eviction would never find"

    def _new_node(self, parent: Node | None, tokens: Tokens, slots: Slots) -> Node:
        self._serial += 1
        self._num_nodes += 1
        return Node(parent, tokens, slots, self._serial)

    def _split(self, node: Node, at: int) -> Node:
        """[a b c d] becomes [a b] -- [c d]; returns the upper part. Holders of `node` keep the lower one."""
        assert node.parent is not None and 0 < at < len(node.tokens)
        upper = self._new_node(node.parent, node.tokens[:at], node.slots[:at])
        upper.ref_count, upper.last_used = node.ref_count, node.last_used
        node.parent.children[int(node.tokens[0])] = upper
        node.parent, node.tokens, node.slots = upper, node.tokens[at:], node.slots[at:]
        upper.children[int(node.tokens[0])] = node
        return upper

    def _touch(self, node: Node) -> None:
        self._clock += 1
        step: Node | None = node
        while step is not None and step.parent is not None:
            step.last_used = self._clock
            step = step.parent
        self._offer(node)

    def _offer(self, node: Node) -> None:
        """Put an evictable leaf into the queue of victims; offers that went stale are skipped when popped."""
        if node.ref_count == 0 and not node.children and node.parent is not None:
            heapq.heappush(self._heap, (node.last_used, node.serial, node))
            if len(self._heap) > 4 * self._num_nodes + 64:
                self._forget_stale_offers()

    def _forget_stale_offers(self) -> None:
        leaves = (node for node in self.nodes() if node.ref_count == 0 and not node.children)
        self._heap = [(node.last_used, node.serial, node) for node in leaves]
        heapq.heapify(self._heap)

    def _drop_leaf(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        del parent.children[int(node.tokens[0])]
        node.parent = None
        self._num_nodes -= 1
        self._offer(parent)


_EMPTY: Slots = np.empty(0, dtype=np.int32)


def _common_prefix(a: Tokens, b: Tokens) -> int:
    n = min(len(a), len(b))
    different = a[:n] != b[:n]
    first = int(different.argmax()) if n else 0
    return first if n and different[first] else n
