"""Sessions of the embedded engine: the book says what a request goes on after, pins keep the keys of that.

    request  [4 4] after r1  ──►  prompt [12 7 3 9 2 | 4 4]      12 7 3 9 are in the prefix cache: the path of r1
                                                                 2 was sampled and never read: it has no keys yet

So a turn computes its new tokens and the last one of its parent's answer, and nothing else (a runner that is a step
ahead of the host may have read that one too). A slot of the cache is one
token: there are no partly filled pages to share, to copy on write, or to compute again.

A pin is a preference, not a promise. Pinned keys are evicted when nothing else is left, because the book has their
tokens and they can be computed again: a session that is open for long can't stop the engine, and a KV pool smaller
than all sessions together serves them, slower. A weight update forgets all keys, pinned or not; tokens stay.
"""

from __future__ import annotations

from dataclasses import replace

from skyrl_train.engines.embedded.radix_cache import Node, Pin, RadixCache
from skyrl_train.engines.session_book import Node as Answered
from skyrl_train.engines.session_book import SessionBook
from skyrl_train.types import GenerateRequest


class EmbeddedSessions:
    """All open sessions of one engine core. A pin ends where an answered request's keys do."""

    def __init__(self, name: str, cache: RadixCache) -> None:
        self.book = SessionBook(name)
        self._cache = cache
        self._pins: dict[str, dict[str, Pin]] = {}

    def __len__(self) -> int:
        return len(self.book)

    def open(self, capacity: int) -> str:
        """Raises RequestRejected, as all of these."""
        session_id = self.book.open(capacity)
        self._pins[session_id] = {}
        return session_id

    def clear(self, session_id: str) -> None:
        self.book.clear(session_id)
        self._unpin(session_id)

    def close(self, session_id: str) -> None:
        """Nothing runs in it any more. An unknown one is fine."""
        self.book.close(session_id)
        self._unpin(session_id)
        self._pins.pop(session_id, None)

    def whole(self, request: GenerateRequest) -> GenerateRequest:
        """The request with all tokens of its path before its own; as it is where it names no session."""
        if request.session is None:
            return request
        before = self.book.path(request.session)
        return replace(request, prompt_token_ids=before + request.prompt_token_ids) if before else request

    def enter(self, request: GenerateRequest) -> None:
        """Take room for a request as it came, with its new tokens only."""
        ref, name = request.session, request.request_id
        if ref is None:
            return
        self.book.reserve(ref, name, len(request.prompt_token_ids), request.sampling.max_new_tokens)
        earlier = self._pins[ref.session_id].pop(name, None)
        if earlier is not None:  # made again
            self._cache.unpin(earlier)

    def leave(self, request: GenerateRequest, token_ids: tuple[int, ...] | None, end: Node) -> None:
        """The whole `request` ended with the answer `token_ids`, and its keys at `end`. None: as if it had never been.

        A session that was closed meanwhile is fine.
        """
        ref, name = request.session, request.request_id
        if ref is None or ref.session_id not in self.book:
            return
        answered = None
        if token_ids is not None:
            new = request.prompt_token_ids[len(self.book.path(ref)) :]
            answered = Answered(parent=ref.parent_request_id, token_ids=new + token_ids)
            self._pins[ref.session_id][name] = self._cache.pin(end)
        self.book.settle(ref, name, answered)

    def check_integrity(self) -> None:
        """Each pin is of an answered request, and is the cache's; the cache has no others."""
        self.book.check_integrity()
        pins = [pin for of_session in self._pins.values() for pin in of_session.values()]
        assert all(pin in pin.node.pins for pin in pins)
        assert len(pins) == self._cache.num_pins, "pins that no session knows of"
        for session_id, of_session in self._pins.items():
            assert of_session.keys() == set(self.book.answered(session_id)), session_id

    def _unpin(self, session_id: str) -> None:
        for pin in self._pins.get(session_id, {}).values():
            self._cache.unpin(pin)
        if session_id in self._pins:
            self._pins[session_id] = {}
