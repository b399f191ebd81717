from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_train.engines.embedded.config import KVShape
from skyrl_train.engines.embedded.kv_pool import KVPool
from skyrl_train.engines.embedded.radix_cache import Node, Pin, RadixCache


def make_pool(num_slots: int = 32) -> KVPool:
    shape = KVShape(num_heads=1, num_kv_heads=1, head_dim=2, dtype=torch.float32)
    return KVPool({0: shape}, num_slots, torch.device("cpu"))


def tokens(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


def put(cache: RadixCache, pool: KVPool, ids: np.ndarray) -> np.ndarray:
    """Insert a sequence as a finished request would: what is cached already is reused."""
    _, matched = cache.match(ids)
    slots = np.concatenate((matched, pool.allocate(len(ids) - len(matched))))
    cache.insert(cache.match(ids[: len(matched)])[0], ids[len(matched) :], slots[len(matched) :])
    cache.check_integrity()
    return slots


def test_freed_slots_come_back_first() -> None:
    pool = make_pool(8)
    first = pool.allocate(3)
    assert first.tolist() == [0, 1, 2]
    pool.free(first)
    assert pool.allocate(2).tolist() == [0, 1]
    assert pool.num_free == 6


def test_freeing_a_slot_twice_is_caught() -> None:
    pool = make_pool(4)
    slots = pool.allocate(1)
    pool.free(slots)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(slots)


def test_a_partly_matching_sequence_shares_the_common_prefix() -> None:
    pool = make_pool()
    cache = RadixCache(pool)
    slots = put(cache, pool, tokens(5, 6, 7, 8))
    node, matched = cache.match(tokens(5, 6, 9))
    assert matched.tolist() == slots[:2].tolist()
    assert node.tokens.tolist() == [5, 6]
    cache.check_integrity()


def test_inserting_what_is_cached_frees_the_duplicate_slots() -> None:
    pool = make_pool()
    cache = RadixCache(pool)
    put(cache, pool, tokens(1, 2, 3))
    free = pool.num_free
    cache.insert(cache.root, tokens(1, 2, 3), pool.allocate(3))
    assert pool.num_free == free


def test_the_least_recently_used_leaf_is_evicted_first_and_from_its_end() -> None:
    pool = make_pool()
    cache = RadixCache(pool)
    put(cache, pool, tokens(1, 2, 3))
    put(cache, pool, tokens(4, 5, 6))
    old = cache.match(tokens(1, 2, 3))[0]
    cache.lock(old)
    cache.unlock(old)  # used again: [4 5 6] is now the oldest
    cache.evict(2)
    assert len(cache.match(tokens(4, 5, 6))[1]) == 1
    assert len(cache.match(tokens(1, 2, 3))[1]) == 3
    cache.check_integrity()


def test_a_locked_prefix_survives_eviction_of_everything_else() -> None:
    pool = make_pool()
    cache = RadixCache(pool)
    put(cache, pool, tokens(1, 2, 3, 4))
    put(cache, pool, tokens(1, 2, 9))
    node, matched = cache.match(tokens(1, 2))
    cache.lock(node)
    cache.evict(cache.num_evictable)
    assert cache.match(tokens(1, 2, 3, 4))[1].tolist() == matched.tolist()
    with pytest.raises(AssertionError):
        cache.evict(1)
    cache.unlock(node)
    cache.check_integrity()


def test_a_pin_follows_what_is_left_of_its_path() -> None:
    pool = make_pool()
    cache = RadixCache(pool)
    put(cache, pool, tokens(1, 2, 3, 4))
    put(cache, pool, tokens(1, 2, 9))
    deep = cache.pin(cache.match(tokens(1, 2, 3, 4))[0])
    short = cache.pin(cache.match(tokens(1, 2, 3))[0])
    assert cache.num_pinned == 4
    cache.evict(2)  # [9] first, then [4]
    assert len(cache.match(tokens(1, 2, 3, 4))[1]) == 3 and deep.node is short.node
    cache.check_integrity()
    cache.unpin(short)
    assert cache.num_pinned == 3
    cache.evict(3)
    assert deep.node is cache.root
    cache.unpin(deep)
    cache.check_integrity()
    assert cache.num_pins == cache.num_pinned == 0 and pool.num_free == 32


def test_many_uses_of_one_leaf_do_not_make_the_queue_of_victims_grow() -> None:
    pool = make_pool()
    cache = RadixCache(pool)
    put(cache, pool, tokens(1, 2, 3))
    node = cache.match(tokens(1, 2, 3))[0]
    for _ in range(1000):
        cache.lock(node)
        cache.unlock(node)
    assert len(cache._heap) < 100
    cache.check_integrity()


sequences = st.lists(st.integers(0, 2), min_size=1, max_size=8)
operations = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "lock", "unlock", "pin", "unpin", "evict", "flush"]),
        sequences,
        st.integers(0, 40),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(operations)
def test_the_tree_agrees_with_a_table_of_prefixes(script: list[tuple[str, list[int], int]]) -> None:
    """A dictionary prefix -> slot is the slow reference; eviction may only shorten what is not locked."""
    pool = make_pool(40)
    cache = RadixCache(pool)
    table: dict[tuple[int, ...], int] = {}
    locked: list[tuple[Node, tuple[int, ...]]] = []
    pinned: list[tuple[Pin, tuple[int, ...]]] = []
    for verb, ids, number in script:
        if verb == "put":
            missing = len(ids) - len(cache.match(tokens(*ids))[1])
            if missing <= pool.num_free:
                slots = put(cache, pool, tokens(*ids))
                table |= {tuple(ids[: i + 1]): int(slot) for i, slot in enumerate(slots)}
        elif verb == "lock":
            node, matched = cache.match(tokens(*ids))
            cache.lock(node)
            locked.append((node, tuple(ids[: len(matched)])))
        elif verb == "unlock" and locked:
            cache.unlock(locked.pop(number % len(locked))[0])
        elif verb == "pin":
            node, matched = cache.match(tokens(*ids))
            pinned.append((cache.pin(node), tuple(ids[: len(matched)])))
        elif verb == "unpin" and pinned:
            cache.unpin(pinned.pop(number % len(pinned))[0])
        elif verb == "evict":
            wanted = {path[: i + 1] for _, path in pinned for i in range(len(path))}
            others = [n for n in cache.nodes() if not n.num_pins and not n.ref_count]
            count = min(number, cache.num_evictable)
            enough = sum(len(n.tokens) for n in others) >= count
            before = {tuple(path) for path, _ in _paths(cache)}
            cache.evict(count)
            if enough:  # then nothing that is pinned went
                assert wanted & before <= {tuple(path) for path, _ in _paths(cache)}
            # A pin whose path was cut holds what is left of it, not what is put there again.
            pinned = [(pin, path[: _depth(pin.node)]) for pin, path in pinned]
        elif verb == "flush" and not locked:
            cache.flush()
            assert cache.num_pinned == 0 and cache.num_pins == len(pinned)
            pinned = [(pin, ()) for pin, _ in pinned]
            assert pool.num_free == pool.num_slots
        cache.check_integrity()
        known = {tuple(path): slot for path, slot in _paths(cache)}
        assert known.items() <= table.items()
        for _, prefix in locked:
            assert all(prefix[: i + 1] in known for i in range(len(prefix)))
        if verb == "put" and tuple(ids) in known:
            assert cache.match(tokens(*ids))[1].tolist() == [table[tuple(ids[: i + 1])] for i in range(len(ids))]
        table = known


def _depth(node: Node) -> int:
    return 0 if node.parent is None else len(node.tokens) + _depth(node.parent)


def _paths(cache: RadixCache) -> list[tuple[list[int], int]]:
    """Every prefix in the tree with the slot of its last token."""
    found: list[tuple[list[int], int]] = []
    stack = [(cache.root, [])]
    while stack:
        node, prefix = stack.pop()
        for child in node.children.values():
            path = list(prefix)
            for token, slot in zip(child.tokens, child.slots, strict=True):
                path = [*path, int(token)]
                found.append((path, int(slot)))
            stack.append((child, path))
    return found


def test_a_namespace_finds_nothing_of_another_and_is_forgotten_alone() -> None:
    pool = make_pool(16)
    cache = RadixCache(pool)
    mine, other = cache.root_of(7), cache.root_of(8)
    for root in (cache.root, mine, other):
        cache.insert(root, tokens(1, 2, 3), pool.allocate(3))
    found = [cache.match(tokens(1, 2, 3), root)[1].tolist() for root in (cache.root, mine, other)]
    assert len({slot for slots in found for slot in slots}) == 9
    cache.check_integrity()

    pin = cache.pin(cache.match(tokens(1, 2), mine)[0])
    cache.forget(7)
    cache.forget(9)  # nobody ever asked for it
    cache.check_integrity()
    assert pool.num_free == 16 - 6 and pin.node is cache.root
    assert len(cache.match(tokens(1, 2, 3), cache.root_of(7))[1]) == 0
    assert cache.match(tokens(1, 2, 3), other)[1].tolist() == found[2]
    cache.unpin(pin)

    cache.evict(6)  # the oldest first, wherever it hangs
    cache.check_integrity()
    assert pool.num_free == 16 and cache.num_evictable == 0


def test_the_least_recently_used_goes_first_over_all_namespaces() -> None:
    pool = make_pool(8)
    cache = RadixCache(pool)
    for namespace in (1, 2):
        cache.insert(cache.root_of(namespace), tokens(5, 6), pool.allocate(2))
    held, _ = cache.match(tokens(5, 6), cache.root_of(1))
    cache.lock(held)
    cache.unlock(held)
    cache.evict(2)
    assert [len(cache.match(tokens(5, 6), cache.root_of(n))[1]) for n in (1, 2)] == [2, 0]
    cache.flush()
    cache.check_integrity()
    assert pool.num_free == 8
