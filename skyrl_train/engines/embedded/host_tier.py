"""Evicted prefixes in host memory: copied out when their slots are taken, copied back when a prompt wants them.

    device   slot 7 12 3 9 | 4 4 ...   any slots, token by token          the prefix cache (radix_cache)
               │ evicted     ▲ admitted
    host     [block 0] [block 1] ...   BLOCK tokens each, whole blocks only

A block is known by the hash of all tokens up to its end, so it says by itself what it is the keys of: blocks come and
go one by one, least recently used first, and nothing hangs below anything. A prompt's prefix is read back from where
its match on the device ends to the first block that isn't here; the tokens of an evicted path behind its last whole
block are computed again. What was read back stays here too, so that it costs no copy when it is evicted again.

Keys are copied to the bit. They belong to the weights that made them, and go with those: `forget` and `flush`.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from skyrl_train.engines.embedded.config import EmbeddedConfig, resolve_host_tokens
from skyrl_train.engines.embedded.kv_pool import KVPool, Slots
from skyrl_train.errors import ConfigError

Tokens = npt.NDArray[np.int32]

BLOCK = 16
"""Tokens of one block."""
EVICT_AT_ONCE = 256
"""Tokens that are evicted together while the pool is large: a copy of one token costs about as much as one of these."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evicted:
    """A path of `tokens` [n] in `slots` [n], of which those from `begin` on are evicted; the slots are still intact."""

    namespace: int
    tokens: Tokens
    slots: Slots
    begin: int


@dataclass(frozen=True, kw_only=True, eq=False)
class EvictedRun:
    """Blocks in a row on the host. The first token that is wanted of them is token `begin` of its path."""

    tier: HostTier
    begin: int
    hashes: list[bytes]

    def read_back(self, slots: Slots) -> int:
        """See `HostTier.read_back`."""
        return self.tier.read_back(self, slots)


class HostTier:
    """Room for `num_tokens` tokens of `pool`, in whole blocks. `num_read_total` tokens were copied back so far."""

    def __init__(self, pool: KVPool, num_tokens: int) -> None:
        self.num_blocks = num_tokens // BLOCK
        self.num_read_total = 0
        self.evicts_at_once = min(EVICT_AT_ONCE, max(pool.num_slots // 32, 1))
        self._pool = pool
        # Uninitialised: pages of blocks that were never used are never touched.
        self._keys = {i: self._empty(tensor) for i, tensor in pool.keys.items()}
        self._values = {i: self._empty(tensor) for i, tensor in pool.values.items()}
        self._blocks: OrderedDict[bytes, tuple[int, int]] = OrderedDict()
        """Hash -> number of the block and namespace, least recently used first."""
        self._free = list(range(self.num_blocks))

    def _empty(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(self.num_blocks, BLOCK, *tensor.shape[1:], dtype=tensor.dtype)

    @property
    def num_tokens(self) -> int:
        """That are here."""
        return len(self._blocks) * BLOCK

    def keep(self, paths: Sequence[Evicted]) -> None:
        """Copy the evicted blocks that aren't here yet, at the cost of the least recently used ones."""
        sources: dict[int, Slots] = {}
        for path in paths:
            first = path.begin // BLOCK
            hashes = block_hashes(path.namespace, path.tokens)
            # From the end: a path loses its end first here as well.
            for number in reversed(range(first, len(hashes))):
                key = hashes[number]
                if key in self._blocks:
                    self._blocks.move_to_end(key)
                    continue
                block = self._free.pop() if self._free else self._blocks.popitem(last=False)[1][0]
                self._blocks[key] = (block, path.namespace)
                sources[block] = path.slots[number * BLOCK : (number + 1) * BLOCK]
        if not sources:
            return
        blocks = torch.tensor(list(sources))
        slots = torch.from_numpy(np.concatenate(list(sources.values())))
        for device, host in self._layers():
            host.index_copy_(0, blocks, device.index_select(0, slots).view(-1, *host.shape[1:]))

    def find(self, namespace: int, tokens: Tokens, begin: int) -> EvictedRun:
        """What is here of the path `tokens` [n] from `begin` on. It becomes the most recently used."""
        hashes = block_hashes(namespace, tokens)[begin // BLOCK :]
        hashes = list(itertools.takewhile(self._blocks.__contains__, hashes))
        for key in reversed(hashes):
            self._blocks.move_to_end(key)
        return EvictedRun(tier=self, begin=begin, hashes=hashes)

    def read_back(self, run: EvictedRun, slots: Slots) -> int:
        """Copy the run to `slots` [n], those of its first tokens; how many tokens.

        It ends early where a block made room for others since it was found.
        """
        found = list(itertools.takewhile(self._blocks.__contains__, run.hashes))
        skipped = run.begin % BLOCK
        count = min(len(found) * BLOCK - skipped, len(slots))
        if count <= 0:
            return 0
        blocks = torch.tensor([self._blocks[key][0] for key in found])
        target = torch.from_numpy(slots[:count]).long()
        for device, host in self._layers():
            device.index_copy_(0, target, host.index_select(0, blocks).flatten(0, 1)[skipped : skipped + count])
        self.num_read_total += count
        return count

    def forget(self, namespace: int) -> None:
        """All of it: the weights that made it are gone."""
        for key in [key for key, (_, of) in self._blocks.items() if of == namespace]:
            self._free.append(self._blocks.pop(key)[0])

    def flush(self) -> None:
        self._blocks.clear()
        self._free = list(range(self.num_blocks))

    def give_back(self) -> int:
        """The memory, to the system; how many bytes. Flush it first. Nothing but `take_again` may follow."""
        assert not self._blocks
        tensors = [*self._keys.values(), *self._values.values()]
        for tensor in tensors:
            tensor.untyped_storage().resize_(0)
        return sum(tensor.nbytes for tensor in tensors)

    def take_again(self) -> None:
        """Raises torch's RuntimeError where there is no room; it can be called again then."""
        for tensor in (*self._keys.values(), *self._values.values()):
            tensor.untyped_storage().resize_(tensor.nbytes)

    def check_integrity(self) -> None:
        """Each block is free or known by one hash."""
        used = [block for block, _ in self._blocks.values()]
        assert sorted([*used, *self._free]) == list(range(self.num_blocks)), "a block has no owner, or two"

    def _layers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(the pool's tensor, ours) of each layer's keys, then values."""
        pool = self._pool
        return [
            *((pool.keys[i], host) for i, host in self._keys.items()),
            *((pool.values[i], host) for i, host in self._values.items()),
        ]


def make_tier(config: EmbeddedConfig, pool: KVPool, *, draft_bytes: int = 0) -> HostTier | None:
    """As the configuration asks. `draft_bytes`: what a drafter keeps of a token. Raises ConfigError."""
    num_tokens = resolve_host_tokens(config, pool.layers, pool.num_slots)
    if num_tokens is None:
        return None
    device = next(iter(pool.keys.values())).device
    if device.type != "cpu":
        raise ConfigError(
            f"embedded engine: a host cache behind a pool on {device} is not built yet; leave host_cache_ratio and "
            "host_cache_gb out"
        )
    if draft_bytes:
        raise ConfigError(
            "embedded engine: a host cache keeps the model's keys and not those of a draft model or head, whose "
            "guesses would be worthless after it; leave host_cache_ratio and host_cache_gb out, or guess by ngram"
        )
    if num_tokens < BLOCK:
        raise ConfigError(
            f"embedded engine: the host cache would hold {num_tokens} tokens, and one block has {BLOCK}; raise "
            "host_cache_ratio or host_cache_gb"
        )
    return HostTier(pool, num_tokens)


def block_hashes(namespace: int, tokens: Tokens) -> list[bytes]:
    """Of each whole block of `tokens` [n], the hash of all tokens up to its end. 128 bits: they don't collide."""
    data = memoryview(tokens.astype(np.int32, copy=False).tobytes())
    size = BLOCK * 4
    running = hashlib.blake2b(namespace.to_bytes(8, "little"), digest_size=16)
    hashes = []
    for end in range(size, len(data) + 1, size):
        running.update(data[end - size : end])
        hashes.append(running.copy().digest())
    return hashes
