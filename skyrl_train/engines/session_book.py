"""Sessions as trees of token ids: what a request with a parent means, whatever the engine keeps of it.

    root ── r1 [12 7 3 | 9 2] ── r2 [4 4 | 8]          r2 asks with the tokens 4 4 only;
                             └── r3 [5 | 6 6]          its whole prompt is 12 7 3 9 2 4 4
            new ────┘  └── answer

An engine over a server keeps the tree on this side: a server that restarts loses nothing, and one without sessions
gets whole prompts. The embedded engine keeps it beside its prefix cache, and loses nothing when that is flushed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from skyrl_train.errors import RequestRejected
from skyrl_train.types import SessionRef

Ids = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Node:
    """One answered request: `token_ids` are its new tokens and its answer. `wire` names what a server keeps of it:
    the attempt, and the life of the server that it belongs to; None where nothing is kept to continue from.
    """

    parent: str | None
    token_ids: Ids
    wire: tuple[int, str] | None = None


@dataclass(frozen=True, kw_only=True)
class _Room:
    """What a running request may fill."""

    parent: str | None
    num_tokens: int


@dataclass(kw_only=True)
class _Session:
    capacity: int
    nodes: dict[str, Node] = field(default_factory=dict)
    num_held: int = 0
    reserved: dict[str, _Room] = field(default_factory=dict)

    @property
    def num_taken(self) -> int:
        return self.num_held + sum(room.num_tokens for room in self.reserved.values())

    def has_children(self, request_id: str) -> bool:
        parents = [node.parent for node in self.nodes.values()] + [room.parent for room in self.reserved.values()]
        return request_id in parents


class SessionBook:
    """All open sessions of one engine. Room is taken before a request starts, for its whole budget, so that a session
    never grows over its capacity half way through an answer.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._sessions: dict[str, _Session] = {}
        self._num_opened = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._sessions

    def open(self, capacity: int) -> str:
        """A new session for at most `capacity` tokens. Raises RequestRejected."""
        if capacity < 1:
            raise RequestRejected(f"engine {self._name}: a session of {capacity} tokens holds nothing; ask for more")
        self._num_opened += 1
        session_id = f"{self._name}-session-{self._num_opened}"
        self._sessions[session_id] = _Session(capacity=capacity)
        return session_id

    def close(self, session_id: str) -> None:
        """Forgets it; an unknown id is fine."""
        self._sessions.pop(session_id, None)

    def running(self, session_id: str) -> tuple[str, ...]:
        """Requests that have room in it and have not ended. An unknown session has none."""
        session = self._sessions.get(session_id)
        return () if session is None else tuple(session.reserved)

    def answered(self, session_id: str) -> tuple[str, ...]:
        """Requests that can be gone on from. An unknown session has none."""
        session = self._sessions.get(session_id)
        return () if session is None else tuple(session.nodes)

    def clear(self, session_id: str) -> None:
        """As new. Raises RequestRejected for an unknown session, or while requests run in it."""
        session = self._find(session_id)
        if session.reserved:
            raise RequestRejected(
                f"session {session_id}: {len(session.reserved)} requests run in it; wait for them or abort them"
            )
        session.nodes.clear()
        session.num_held = 0

    def reserve(self, ref: SessionRef, request_id: str, num_new: int, max_new_tokens: int) -> Ids:
        """Takes room for a request and returns the tokens before its own. Raises RequestRejected."""
        session = self._find(ref.session_id)
        before = self.path(ref)
        if request_id in session.reserved:
            raise RequestRejected(f"session {ref.session_id}: a request {request_id} runs in it already")
        earlier = session.nodes.get(request_id)
        if earlier is not None and session.has_children(request_id):
            raise RequestRejected(
                f"session {ref.session_id}: other requests go on after {request_id}, so it can't be made again; "
                "send it under another id"
            )
        given_back = 0 if earlier is None else len(earlier.token_ids)
        wanted = num_new + max_new_tokens
        if session.num_taken - given_back + wanted > session.capacity:
            raise RequestRejected(
                f"request {request_id}: session {ref.session_id} holds {session.num_taken - given_back} of "
                f"{session.capacity} tokens, {num_new} new ones with max_new_tokens={max_new_tokens} need {wanted}; "
                "open it with more capacity (generator.sessions.default_capacity)"
            )
        if earlier is not None:  # the request is made again: an aborted answer gives way
            session.num_held -= given_back
            del session.nodes[request_id]
        session.reserved[request_id] = _Room(parent=ref.parent_request_id, num_tokens=wanted)
        return before

    def path(self, ref: SessionRef) -> Ids:
        """All tokens up to and with the parent's answer. Raises RequestRejected for an unknown session or parent."""
        session = self._find(ref.session_id)
        parts: list[Ids] = []
        at = ref.parent_request_id
        while at is not None:
            node = session.nodes.get(at)
            if node is None:
                raise RequestRejected(
                    f"session {ref.session_id} has no answered request {at!r} to go on from; the parent must have "
                    "ended before its child is sent"
                )
            parts.append(node.token_ids)
            at = node.parent
        return tuple(token for part in reversed(parts) for token in part)

    def parent(self, ref: SessionRef) -> Node | None:
        """The parent's node; None for the root."""
        if ref.parent_request_id is None:
            return None
        return self._find(ref.session_id).nodes[ref.parent_request_id]

    def settle(self, ref: SessionRef, request_id: str, node: Node | None) -> None:
        """The request ended: its room is what it made. None: it made nothing. A session closed meanwhile is fine."""
        session = self._sessions.get(ref.session_id)
        if session is None:
            return
        session.reserved.pop(request_id, None)
        if node is not None:
            session.nodes[request_id] = node
            session.num_held += len(node.token_ids)

    def check_integrity(self) -> None:
        """What each session holds is the sum of its nodes, and is within its capacity."""
        for name, session in self._sessions.items():
            held = sum(len(node.token_ids) for node in session.nodes.values())
            assert held == session.num_held, (name, held, session.num_held)
            assert session.num_taken <= session.capacity, (name, session.num_taken, session.capacity)

    def _find(self, session_id: str) -> _Session:
        session = self._sessions.get(session_id)
        if session is None:
            raise RequestRejected(
                f"engine {self._name} has no open session {session_id!r}: it was closed or never open"
            )
        return session
