"""The prefix cache: a radix tree over token ids whose nodes own KV slots.

    root -- [5 6 7] -- [8 9]        two prompts that share 5 6 7
                    \\- [4]

A node's slots hold the keys and values of its tokens. `ref_count` counts the running requests whose prefix
passes through the node; a node with references is never evicted, and neither are its ancestors. Leaves
without references are evicted, least recently used first, from their end, token by token if need be.

Keys depend on the weights that made them, and adapters change weights: each namespace (an adapter's number) has a root
of its own, under which nothing of another namespace is ever found. Slots, ages and the order of eviction are common.

`num_pins` counts the pins whose path passes through the node. A pin asks for its path to be kept: pinned leaves are
evicted after all others, and only then. What is left of the path keeps the pin, which moves up to where that ends.

With a host tier (see host_tier) what is evicted is copied there first, and `evicted_after` finds it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from skyrl_train.engines.embedded.host_tier import Evicted, EvictedRun, HostTier
from skyrl_train.engines.embedded.kv_pool import KVPool, Slots

Tokens = npt.NDArray[np.int32]

BASE = 0
"""The namespace of the model without an adapter."""


class Pin:
    """One path that is to be kept, from the root to `node`."""

    __slots__ = ("node",)

    def __init__(self, node: Node) -> None:
        self.node = node


class Node:
    """`tokens` [n] on the edge from `parent`, their `slots` [n]. `pins` are those that end here."""

    __slots__ = ("children", "last_used", "num_pins", "parent", "pins", "ref_count", "serial", "slots", "tokens")

    def __init__(self, parent: Node | None, tokens: Tokens, slots: Slots, serial: int) -> None:
        self.parent = parent
        self.tokens = tokens
        self.slots = slots
        self.children: dict[int, Node] = {}
        self.ref_count = 0
        self.num_pins = 0
        self.pins: set[Pin] = set()
        self.last_used = 0
        self.serial = serial

    def age(self) -> tuple[bool, int, int]:
        """The lowest is evicted first."""
        return (self.num_pins > 0, self.last_used, self.serial)


class RadixCache:
    """`num_evictable` slots could be freed now; `num_evicted_total` were, so far; `num_pinned` are under a pin."""

    def __init__(self, pool: KVPool, tier: HostTier | None = None) -> None:
        self._pool = pool
        self.tier = tier
        self._serial = 0
        self._clock = 0
        self.root = Node(None, _EMPTY, _EMPTY, 0)
        self._roots = {BASE: self.root}
        self.num_evictable = 0
        self.num_locked = 0
        self.num_pinned = 0
        self.num_pins = 0
        self.num_evicted_total = 0
        self.num_flushes_total = 0
        self._num_nodes = 0
        self._heap: list[tuple[tuple[bool, int, int], Node]] = []

    def root_of(self, namespace: int) -> Node:
        """Where the prompts of a namespace begin; `root` is the one of BASE."""
        if namespace not in self._roots:
            self._roots[namespace] = Node(None, _EMPTY, _EMPTY, 0)
        return self._roots[namespace]

    def match(self, tokens: Tokens, below: Node | None = None) -> tuple[Node, Slots]:
        """The deepest node on the path of `tokens` (from BASE's root or `below`), and the slots of what matched.

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

    def cached_len(self, tokens: Tokens, below: Node) -> tuple[int, int]:
        """How many of `tokens` are below that node, and how many of those are in use; changes nothing."""
        node, done, held = below, 0, 0
        while done < len(tokens):
            child = node.children.get(int(tokens[done]))
            if child is None:
                break
            common = _common_prefix(child.tokens, tokens[done:])
            done += common
            held += common if child.ref_count else 0
            if common < len(child.tokens):
                break
            node = child
        return done, held

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

    def insert(self, below: Node, tokens: Tokens, slots: Slots) -> Node:
        """Add what follows the prefix that ends at `below`; takes over the slots. The node where it all ends.

        Slots of tokens that the tree has already are freed.
        """
        node, matched = self.match(tokens, below)
        done = len(matched)
        self._pool.free(slots[:done])
        if done < len(tokens):
            return self.extend(node, tokens[done:], slots[done:])
        self._touch(node)
        return node

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

    def pin(self, node: Node) -> Pin:
        """Ask for the path from `node` to the root to be evicted last."""
        pin = Pin(node)
        node.pins.add(pin)
        self.num_pins += 1
        step: Node | None = node
        while step is not None and step.parent is not None:
            if step.num_pins == 0:
                self.num_pinned += len(step.tokens)
            step.num_pins += 1
            step = step.parent
        self._offer(node)
        return pin

    def unpin(self, pin: Pin) -> None:
        """What is left of its path is evicted in its turn."""
        pin.node.pins.remove(pin)
        self.num_pins -= 1
        step: Node | None = pin.node
        while step is not None and step.parent is not None:
            step.num_pins -= 1
            if step.num_pins == 0:
                self.num_pinned -= len(step.tokens)
                self._offer(step)
            step = step.parent

    def evict(self, count: int) -> None:
        """Free exactly `count` slots; at least so many must be evictable."""
        assert count <= self.num_evictable, (count, self.num_evictable)
        self.num_evicted_total += count
        evicted: list[Evicted] = []
        while count > 0:
            age, node = heapq.heappop(self._heap)
            alive = node.parent is not None and node.ref_count == 0 and not node.children
            if not alive or node.age() != age:
                continue  # an older offer of a node that was used, pinned, split or evicted since
            taken = min(count, len(node.tokens))
            keep = len(node.tokens) - taken
            if self.tier is not None:
                evicted.append(self._path(node, keep))
            self._pool.free(node.slots[keep:])
            self.num_evictable -= taken
            self.num_pinned -= taken if node.num_pins else 0
            count -= taken
            if keep:
                node.tokens, node.slots = node.tokens[:keep], node.slots[:keep]
                self._offer(node)
            else:
                self._drop_leaf(node)
        if self.tier is not None:
            self.tier.keep(evicted)

    def make_room(self, count: int) -> None:
        """Free `count` slots; with a tier perhaps more, for copies are cheaper together."""
        more = 0 if self.tier is None else min(self.tier.evicts_at_once, self.num_evictable)
        self.evict(max(count, more))

    def evicted_after(self, root: Node, tokens: Tokens, begin: int) -> EvictedRun | None:
        """What the tier has of the path `tokens` from `begin` on; None without a tier."""
        return None if self.tier is None else self.tier.find(self._namespace(root), tokens, begin)

    def holders(self) -> list[KVPool | HostTier]:
        """Of the memory under the cache."""
        return [self._pool, *([] if self.tier is None else [self.tier])]

    def flush(self) -> None:
        """Forget everything. No node may be locked. Pins stay, with nothing under them."""
        assert self.num_locked == 0, f"{self.num_locked} tokens are in use"
        for namespace in list(self._roots):
            self.forget(namespace)
        self._heap.clear()
        if self.tier is not None:
            self.tier.flush()
        assert self._num_nodes == self.num_evictable == self.num_pinned == 0
        self.num_flushes_total += 1

    def forget(self, namespace: int) -> None:
        """Everything under its root: the weights that made it are gone. None of it may be locked. Pins stay."""
        if namespace not in self._roots:
            return
        root = self._roots[namespace]
        for node in _below(root):
            assert node.ref_count == 0, f"{len(node.tokens)} tokens are in use"
            self._pool.free(node.slots)
            self._num_nodes -= 1
            self.num_evictable -= len(node.tokens)
            self.num_pinned -= len(node.tokens) if node.num_pins else 0
            node.parent = None
            self._move_pins(node, self.root)
        self._move_pins(root, self.root)
        root.children.clear()
        if self.tier is not None:
            self.tier.forget(namespace)
        if root is not self.root:
            del self._roots[namespace]

    def nodes(self) -> Iterator[Node]:
        """All nodes but the roots."""
        return (node for root in self._roots.values() for node in _below(root))

    def check_integrity(self) -> None:
        if self.tier is not None:
            self.tier.check_integrity()
        evictable = locked = pinned = num_nodes = 0
        num_pins = sum(len(root.pins) for root in self._roots.values())
        assert all(root.parent is None and not root.ref_count for root in self._roots.values())
        for node in self.nodes():
            assert node.parent is not None and node.parent.children[int(node.tokens[0])] is node
            assert len(node.tokens) == len(node.slots) > 0
            assert node.ref_count >= sum(child.ref_count for child in node.children.values()) >= 0
            assert node.num_pins == len(node.pins) + sum(child.num_pins for child in node.children.values())
            assert all(pin.node is node for pin in node.pins)
            num_nodes += 1
            num_pins += len(node.pins)
            if node.num_pins:
                pinned += len(node.tokens)
            if node.ref_count:
                locked += len(node.tokens)
            else:
                evictable += len(node.tokens)
        assert (evictable, locked, num_nodes) == (self.num_evictable, self.num_locked, self._num_nodes)
        assert (pinned, num_pins) == (self.num_pinned, self.num_pins)
        offers = {(age, id(node)) for age, node in self._heap}
        for node in self.nodes():
            if node.ref_count == 0 and not node.children:
                assert (node.age(), id(node)) in offers, "an evictable leaf that eviction would never find"

    def _namespace(self, root: Node) -> int:
        return next(namespace for namespace, one in self._roots.items() if one is root)

    def _path(self, node: Node, keep: int) -> Evicted:
        """From the root to `node`, whose tokens from `keep` on are about to go."""
        nodes = [node]
        while (parent := nodes[-1].parent) is not None:
            nodes.append(parent)
        root = nodes.pop()
        tokens = np.concatenate([step.tokens for step in reversed(nodes)])
        return Evicted(
            namespace=self._namespace(root),
            tokens=tokens,
            slots=np.concatenate([step.slots for step in reversed(nodes)]),
            begin=len(tokens) - len(node.tokens) + keep,
        )

    def _new_node(self, parent: Node | None, tokens: Tokens, slots: Slots) -> Node:
        self._serial += 1
        self._num_nodes += 1
        return Node(parent, tokens, slots, self._serial)

    def _split(self, node: Node, at: int) -> Node:
        """[a b c d] becomes [a b] -- [c d]; returns the upper part. Holders and pins of `node` keep the lower one."""
        assert node.parent is not None and 0 < at < len(node.tokens)
        upper = self._new_node(node.parent, node.tokens[:at], node.slots[:at])
        upper.ref_count, upper.num_pins, upper.last_used = node.ref_count, node.num_pins, node.last_used
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
            heapq.heappush(self._heap, (node.age(), node))
            if len(self._heap) > 4 * self._num_nodes + 64:
                self._forget_stale_offers()

    def _forget_stale_offers(self) -> None:
        leaves = (node for node in self.nodes() if node.ref_count == 0 and not node.children)
        self._heap = [(node.age(), node) for node in leaves]
        heapq.heapify(self._heap)

    def _drop_leaf(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        del parent.children[int(node.tokens[0])]
        node.parent = None
        self._num_nodes -= 1
        self._move_pins(node, parent)
        self._offer(parent)

    def _move_pins(self, node: Node, ancestor: Node) -> None:
        """Up from a node that is gone; the ancestor has counted them already."""
        if node is ancestor:
            return
        for pin in node.pins:
            pin.node = ancestor
        ancestor.pins |= node.pins
        node.pins.clear()


_EMPTY: Slots = np.empty(0, dtype=np.int32)


def _below(root: Node) -> Iterator[Node]:
    stack = list(root.children.values())
    while stack:
        node = stack.pop()
        stack.extend(node.children.values())
        yield node


def _common_prefix(a: Tokens, b: Tokens) -> int:
    n = min(len(a), len(b))
    different = a[:n] != b[:n]
    first = int(different.argmax()) if n else 0
    return first if n and different[first] else n
