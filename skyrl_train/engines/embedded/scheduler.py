"""Who computes what in the next step.

    waiting (see queue_order) --admit--> running: prefilling -> decoding --finish-->
         ^                                        |
         +--------------- retract ----------------+

A step's rows: one for each decoding request, then prompt tokens up to `max_num_batched_tokens`. A request gets
the slots of its whole prompt when it is admitted, so a prompt cut into chunks never waits for memory half way.
When decoding requests need a slot and none is free or evictable, the youngest of the lowest priority goes back to
the queue; its tokens are kept, its keys and values enter the cache and are recomputed if they get evicted.

Sharing: what a step will compute is put into the prefix cache while the step is planned. All rows write their keys
and values before any row of that layer attends, so the next request of the same group can be admitted into the
very same step and computes only its last prompt token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from skyrl_train.engines.embedded.adapters.served import ServedAdapters
from skyrl_train.engines.embedded.config import EmbeddedConfig
from skyrl_train.engines.embedded.drafts.guesses import Guesses
from skyrl_train.engines.embedded.drafts.speculation import Speculation
from skyrl_train.engines.embedded.host_tier import HostTier
from skyrl_train.engines.embedded.kv_pool import KVPool, Slots
from skyrl_train.engines.embedded.queue_order import FirstComeFirstServed, LongestPrefixFirst, QueueOrder, make_way
from skyrl_train.engines.embedded.radix_cache import Node, RadixCache
from skyrl_train.engines.embedded.request import RequestState, Seats
from skyrl_train.engines.embedded.waiting import WaitingQueue
from skyrl_train.errors import RequestRejected

Indices = npt.NDArray[np.intp]

LOOKAHEAD_TOKENS = 32
"""A request is admitted only if the running ones could each grow by so many tokens (or to their end)."""

GROWTH_SLOTS = 16
"""A decoding request takes so many slots at once while there are free ones: neighbours in memory, and less to do."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Rows for tokens [start, end) of one prefilling request; `samples` when they reach its last token."""

    seat: int
    start: int
    end: int
    samples: bool


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One step: decoding seats [n] (one row each and one for each guess, first), then the chunks.

    `sample_seats`: seats that get a token, in row order: the decoding ones, then the chunks that sample.
    """

    decode_seats: Indices
    chunks: tuple[Chunk, ...]
    sample_seats: Indices
    guesses: Guesses | None = None

    @property
    def num_rows(self) -> int:
        num_guesses = 0 if self.guesses is None else self.guesses.total
        return len(self.decode_seats) + num_guesses + sum(chunk.end - chunk.start for chunk in self.chunks)


class Scheduler:
    """Owns the queue and the seats; moves slots between the pool, the requests and the cache."""

    def __init__(
        self,
        config: EmbeddedConfig,
        seats: Seats,
        pool: KVPool,
        adapters: ServedAdapters | None = None,
        tier: HostTier | None = None,
    ) -> None:
        self._config = config
        self._adapters = adapters
        self.seats = seats
        self.pool = pool
        self.cache = RadixCache(pool, tier)
        self._order: QueueOrder = FirstComeFirstServed()
        if config.scheduling_policy == "lpm":
            self._order = LongestPrefixFirst(lambda state: self._cached_len(state)[0])
        self._fresh = WaitingQueue()
        self._retracted = WaitingQueue()
        self._decoding: dict[int, RequestState] = {}
        self._decode_seats: Indices | None = None
        self._prefilling: list[RequestState] = []
        self.speculation: Speculation | None = None
        self.num_prompt_tokens_total = 0
        self.num_cached_tokens_total = 0
        self.num_retractions_total = 0

    # -- what is where

    @property
    def num_waiting(self) -> int:
        return len(self._fresh) + len(self._retracted)

    @property
    def num_started(self) -> int:
        """Requests that have begun and not ended, whether they have a seat or were retracted."""
        return self.num_running + len(self._retracted)

    @property
    def num_running(self) -> int:
        return self.seats.num_seats - self.seats.num_free

    @property
    def num_available(self) -> int:
        """Slots that are free or can be made free without touching a running request."""
        return self.pool.num_free + self.cache.num_evictable

    def running(self) -> list[RequestState]:
        """Running requests in the order of submission."""
        return sorted((owner for owner in self.seats.owners if owner is not None), key=lambda state: state.order)

    def waiting(self) -> list[RequestState]:
        """Queued requests by priority and age, the order in which fcfs admits them."""
        return sorted([*self._fresh.in_order(), *self._retracted.in_order()], key=RequestState.sort_key)

    def started(self) -> list[RequestState]:
        """Requests that have begun and not ended, in the order of submission."""
        return sorted([*self.running(), *self._retracted.in_order()], key=lambda state: state.order)

    # -- requests come and go

    def check(self, name: str, request_id: str, num_prompt: int, max_new: int, context_len: int) -> None:
        """Raise RequestRejected if the request can never run here."""
        total = num_prompt + max_new
        for limit, what in ((context_len, "a context of"), (self.pool.num_slots, "a KV cache of")):
            if total > limit:
                raise RequestRejected(
                    f"request {request_id}: prompt ({num_prompt}) and max_new_tokens ({max_new}) need {total} tokens, "
                    f"engine {name} has {what} {limit}; shorten the prompt or lower max_new_tokens"
                )

    def enqueue(self, state: RequestState) -> None:
        (self._retracted if state.was_started else self._fresh).push(state)

    def dequeue(self, state: RequestState) -> None:
        """Take a queued request out."""
        (self._retracted if state in self._retracted else self._fresh).remove(state)

    def release(self, state: RequestState, *, retract: bool = False) -> Node:
        """Take a running request off its seat; what it computed goes to the cache, to the end of the returned node."""
        seats, seat = self.seats, state.seat
        computed, allocated = int(seats.computed[seat]), int(seats.allocated[seat])
        slots, begin, node = seats.slots[seat], state.num_owned_from, state.node
        assert node is not None
        if not self._config.enable_prefix_caching:
            self.pool.free(slots[begin:allocated])
            end = self.cache.root
        else:
            self.pool.free(slots[computed:allocated])
            end = node
            if begin < computed:
                end = self.cache.insert(node, seats.tokens[seat, begin:computed], slots[begin:computed])
            self.cache.unlock(node)
        state.node = None
        if self._adapters is not None:
            self._adapters.places.leave(seat)
        seats.leave(state)
        if self._decoding.pop(seat, None) is None:
            self._prefilling.remove(state)
        self._decode_seats = None
        if retract:
            self.num_retractions_total += 1
            self.enqueue(state)
        return end

    def retract_all(self) -> None:
        """Send every running request back to the queue: its keys and values belong to weights that are gone."""
        for state in self.running():
            self.release(state, retract=True)

    # -- planning

    def plan(self, policy_version: int, *, admit_new: bool) -> StepPlan | None:
        """The next step, or None when there is nothing to compute. Allocates its slots.

        Without `admit_new` only what has begun goes on, retracted requests included.
        """
        self._order.new_step()
        if self._config.preemption_threshold is not None:
            self._make_way(self._config.preemption_threshold, admit_new)
        decode_seats = self._grow_decoding()
        budget = self._config.max_num_batched_tokens - len(decode_seats)
        chunks: list[Chunk] = []
        for state in list(self._prefilling):
            if budget > 0:
                budget -= self._add_chunk(state, budget, chunks)
        reserve = self._growth_reserve()
        while budget > 0 and self.seats.num_free:
            head = self._next_waiting(admit_new)
            if head is None:
                break
            growth = self._growth(head) if reserve or chunks else 0
            if not self._admit(head, policy_version, reserve + growth, budget, is_first=not chunks):
                break
            reserve += self._growth(head)
            budget -= self._add_chunk(head, budget, chunks)
        if not chunks and not len(decode_seats):
            stuck = self._next_waiting(admit_new) is not None and not self.num_running
            assert not stuck, "requests wait, none runs, and none can start"
            return None
        sampling = [chunk.seat for chunk in chunks if chunk.samples]
        guesses = None
        if self.speculation is not None and len(decode_seats):
            guesses = self.speculation.plan(self.seats, decode_seats, budget, self, only_decodes=not chunks)
        return StepPlan(
            guesses=guesses,
            decode_seats=decode_seats,
            chunks=tuple(chunks),
            sample_seats=np.concatenate((decode_seats, np.asarray(sampling, dtype=np.intp)))
            if sampling
            else decode_seats,
        )

    def _grow_decoding(self) -> Indices:
        """A slot for the next token of each decoding request, retracting until they fit; their seats."""
        seats = self.seats
        while True:
            decoding = self._current_decode_seats()
            if seats.in_flight.any():
                # A token that is on its way may be the last one that the request asked for.
                decoding = decoding[(seats.length + seats.in_flight)[decoding] < seats.max_len[decoding]]
            growing = decoding[seats.computed[decoding] == seats.allocated[decoding]]
            if len(growing) <= self.num_available:
                break
            if not self._free_spares():
                self.release(max(self.running(), key=RequestState.sort_key), retract=True)
        if len(growing):
            self._give_slots(growing)
        seats.computed[decoding] += 1
        return decoding

    def _give_slots(self, growing: Indices) -> None:
        """One more slot for each of these seats, or a run of them while the pool has plenty."""
        seats = self.seats
        start = seats.allocated[growing]
        most = GROWTH_SLOTS if len(growing) * GROWTH_SLOTS <= self.pool.num_free else 1
        self.give_slots(growing, np.minimum(most, seats.max_len[growing] - start))

    def give_slots(self, chosen: Indices, count: npt.NDArray[np.int32]) -> None:
        """`count` [n] slots more for each of the seats `chosen` [n]."""
        start = self.seats.allocated[chosen]
        total = int(count.sum())
        run_start = np.cumsum(count) - count
        position = np.repeat(start - run_start, count) + np.arange(total)
        self.seats.slots[np.repeat(chosen, count), position] = self._allocate(total)
        self.seats.allocated[chosen] = start + count

    def _free_spares(self) -> bool:
        """Take back slots that decoding requests hold in advance; False if there are none."""
        seats, decoding = self.seats, self._current_decode_seats()
        spare = decoding[seats.allocated[decoding] > seats.computed[decoding]]
        for seat in spare:
            self.pool.free(seats.slots[seat, seats.computed[seat] : seats.allocated[seat]])
        seats.allocated[spare] = seats.computed[spare]
        return len(spare) > 0

    def _current_decode_seats(self) -> Indices:
        """Seats of decoding requests, in the order in which they began to decode."""
        if self._decode_seats is None:
            self._decode_seats = np.fromiter(self._decoding, dtype=np.intp, count=len(self._decoding))
        return self._decode_seats

    def _next_waiting(self, admit_new: bool) -> RequestState | None:
        """Who is to be admitted next, without taking it."""
        return self._order.next([self._retracted, self._fresh] if admit_new else [self._retracted])

    def _make_way(self, threshold: int, admit_new: bool) -> None:
        """Retract running requests for a waiting one of higher priority, if there is one and it finds no room."""

        def fits(state: RequestState) -> bool:
            _, held = self._cached_len(state)
            needed = len(state.tokens) - held + self._growth_reserve() + self._growth(state)
            has_adapter = self._adapters is None or self._adapters.has_room(state)
            # An engine that runs nothing else takes it, whatever it reserves otherwise.
            return not self.num_running or (self.seats.num_free > 0 and has_adapter and needed <= self.num_available)

        head = self._next_waiting(admit_new)
        if head is not None:
            retract = partial(self.release, retract=True)
            make_way(head, threshold=threshold, fits=fits, running=self.running, retract=retract)

    def _cached_len(self, state: RequestState) -> tuple[int, int]:
        """How many of its tokens are in the cache, and how many of those are in use."""
        root = self.cache.root
        if self._adapters is not None:
            root = self.cache.root_of(self._adapters.namespace(state))
        return self.cache.cached_len(state.tokens[:-1], root)

    def _admit(self, state: RequestState, policy_version: int, reserve: int, budget: int, *, is_first: bool) -> bool:
        """Seat the queue's head if its tokens and the reserve fit; gives it the slots of all its tokens."""
        tokens, root = state.tokens, self.cache.root
        if self._adapters is not None:
            if not self._adapters.has_room(state):
                return False  # and nobody passes it by: the queue's head is never starved
            root = self.cache.root_of(self._adapters.namespace(state))
        node, matched = root, tokens[:0]
        if self._config.enable_prefix_caching:
            # The last token is always computed: its hidden state predicts the next one.
            node, matched = self.cache.match(tokens[:-1], root)
        self.cache.lock(node)
        needed = len(tokens) - len(matched)
        must_wait = not self._config.chunked_prefill and needed > budget and not is_first
        if must_wait or needed + reserve > self.num_available:
            self.cache.unlock(node)
            return False
        self.dequeue(state)
        self._order.admitted(state)
        state.node = node
        state.num_owned_from = len(matched)
        state.shares_prompt = self._config.enable_prefix_caching
        seat = self.seats.take(state, matched)
        if self._adapters is not None:
            self._adapters.sit(state)
        evicted = self.cache.evicted_after(root, tokens, len(matched))
        self.seats.slots[seat, len(matched) : len(tokens)] = self._allocate(needed)
        self.seats.allocated[seat] = len(tokens)
        if evicted is not None:
            self.seats.computed[seat] += evicted.read_back(self.seats.slots[seat, len(matched) : len(tokens) - 1])
        if not state.was_started:
            # A partial answer that the request came with is no prompt, wherever its keys are.
            state.num_cached_tokens = min(int(self.seats.computed[seat]), state.num_prompt_tokens)
            self.num_prompt_tokens_total += state.num_prompt_tokens
            self.num_cached_tokens_total += state.num_cached_tokens
        if not state.version_marks or state.version_marks[-1][0] != policy_version:
            state.version_marks.append((policy_version, len(tokens) - state.num_prompt_tokens))
        self._prefilling.append(state)
        return True

    def _growth_reserve(self) -> int:
        """Slots that the running requests will want soon; 0 if none runs."""
        seats, decoding = self.seats, self._current_decode_seats()
        left = seats.max_len[decoding] - seats.allocated[decoding]
        return int(np.minimum(left, LOOKAHEAD_TOKENS).sum()) + sum(self._growth(state) for state in self._prefilling)

    def _growth(self, state: RequestState) -> int:
        wanted = state.num_prompt_tokens + state.request.sampling.max_new_tokens - len(state.tokens)
        return min(wanted, LOOKAHEAD_TOKENS)

    def _add_chunk(self, state: RequestState, budget: int, chunks: list[Chunk]) -> int:
        """Plan the next rows of a prefilling request; returns how many."""
        seats, seat = self.seats, state.seat
        start, length = int(seats.computed[seat]), int(seats.length[seat])
        end = min(length, start + budget) if self._config.chunked_prefill else length
        seats.computed[seat] = end
        chunks.append(Chunk(seat=seat, start=start, end=end, samples=end == length))
        self._share(state, end)
        if end == length:
            self._prefilling.remove(state)
            self._decoding[seat] = state
            self._decode_seats = None
        return end - start

    def _share(self, state: RequestState, end: int) -> None:
        """Hand positions [num_owned_from, end) to the cache: this step computes them."""
        if not state.shares_prompt:
            return
        assert state.node is not None
        begin, seat = state.num_owned_from, state.seat
        tokens: Slots = self.seats.tokens[seat, begin:end]
        if int(tokens[0]) in state.node.children:
            # Another request was faster with the same continuation. Ours stays private until it finishes.
            state.shares_prompt = False
            return
        node = self.cache.extend(state.node, tokens, self.seats.slots[seat, begin:end])
        self.cache.lock_below(state.node, node)
        state.node, state.num_owned_from = node, end

    def _allocate(self, count: int) -> Slots:
        if count > self.pool.num_free:
            self.cache.make_room(count - self.pool.num_free)
        return self.pool.allocate(count)

    # -- after a step, and in tests

    def check_integrity(self) -> None:
        """Each slot is free, in the cache, or owned by exactly one running request; references add up."""
        seats = self.seats
        self.cache.check_integrity()
        owned = [self.pool.free_slots(), *(node.slots for node in self.cache.nodes())]
        held = 0
        for state in self.running():
            seat, allocated = state.seat, int(seats.allocated[state.seat])
            assert seats.owners[seat] is state
            assert seats.rules.get(seat) is state.rule and seats.has_rule[seat] == (state.rule is not None)
            assert state.rule is None or state.rule.num_taken == seats.length[seat] - seats.prompt_len[seat]
            assert (seat in self._decoding) != (state in self._prefilling), "decoding and prefilling exclude each other"
            assert seats.computed[seat] <= seats.length[seat] + seats.in_flight[seat]
            assert seats.length[seat] <= seats.max_len[seat]
            assert seats.computed[seat] <= allocated <= seats.max_len[seat]
            own_slots = seats.slots[seat, state.num_owned_from : allocated]
            owned.append(own_slots)
            node, at = state.node, state.num_owned_from
            assert node is not None
            while node.parent is not None:
                assert node.ref_count > 0
                at -= len(node.tokens)
                path = slice(at, at + len(node.tokens))
                assert np.array_equal(seats.slots[seat, path], node.slots)
                assert np.array_equal(seats.tokens[seat, path], node.tokens)
                held += 1
                node = node.parent
            assert at == 0, f"request {state.request.request_id} holds a prefix of the wrong length: {at}"
        assert held == sum(node.ref_count for node in self.cache.nodes()), "references without a holder"
        everything = np.sort(np.concatenate(owned))
        assert np.array_equal(everything, np.arange(self.pool.num_slots)), "a slot has no owner, or two"
        assert len(self._decoding) + len(self._prefilling) == self.num_running
        queued = self.waiting()
        assert all(state.seat < 0 and state.node is None for state in queued)
        assert len(queued) == self.num_waiting
        ruled = [state for state in self.running() if state.rule is not None]
        assert len(seats.rules) == len(ruled) == seats.has_rule.sum(), "a rule on a seat that nobody has"
