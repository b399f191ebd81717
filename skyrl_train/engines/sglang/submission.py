"""Attempts that arrive together travel together: one POST for all, each answered as soon as it is done.

    generate ─┐                             ┌─ answer of a     (the server streams, with an interval that no answer
    generate ─┼─ one turn of the loop ─ POST ┼─ answer of c     reaches: a first token, which is skipped, and the whole)
    generate ─┘                             └─ answer of b

For SGLang's HTTP process a request of its own costs more than the work on its tokens. A POST has one priority and one
session for all its prompts, so only attempts without a session and of one priority share one; and one span to go on
from, so those of a traced run go alone. A batch that the server refuses is sent again one by one: it refuses all for
one that it can't serve, before it starts any.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from skyrl_train.engines.server.client import ServerBusy
from skyrl_train.engines.sglang.sampling import ONLY_THE_END
from skyrl_train.engines.sglang.wire import Wire
from skyrl_train.errors import EngineError, EngineUnavailable

MAX_BATCH = 256
_NOT_YET = b'"finish_reason":null'


@dataclass(frozen=True, kw_only=True)
class Sending:
    """One attempt as SGLang takes it. `answer` gets the server's answer as parsed JSON, or the error."""

    rid: str
    what: str
    token_ids: tuple[int, ...]
    sampling: dict[str, Any]
    adapter: str | None
    priority: int | None
    session: Mapping[str, Any] | None
    traceparent: str | None = None
    answer: asyncio.Future[Mapping[str, Any]]


class Submission:
    """Sends attempts to one server. Each `Sending.answer` is set exactly once, unless it was cancelled."""

    def __init__(self, wire: Wire, *, batched: bool) -> None:
        self._wire = wire
        self._batched = batched
        self._waiting: list[Sending] = []
        self._posts: set[asyncio.Task[None]] = set()

    def add(self, sending: Sending) -> None:
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._send_all)
        self._waiting.append(sending)

    async def close(self) -> None:
        """Ends all POSTs; what has no answer yet gets EngineUnavailable."""
        unsent, self._waiting = self._waiting, []
        posts = list(self._posts)
        for post in posts:
            post.cancel()
        await asyncio.gather(*posts, return_exceptions=True)
        _fail(unsent, EngineUnavailable(f"{self._wire.name}: the client was closed"))

    def _send_all(self) -> None:
        waiting, self._waiting = self._waiting, []
        groups: dict[int | None, list[Sending]] = {}
        for sending in waiting:
            if sending.answer.done():
                continue
            if self._batched and sending.session is None and sending.traceparent is None:
                groups.setdefault(sending.priority, []).append(sending)
            else:
                self._start([sending])
        for group in groups.values():
            for start in range(0, len(group), MAX_BATCH):
                self._start(group[start : start + MAX_BATCH])

    def _start(self, sendings: Sequence[Sending]) -> None:
        post = asyncio.get_running_loop().create_task(self._post(sendings))
        self._posts.add(post)
        post.add_done_callback(self._posts.discard)

    async def _post(self, sendings: Sequence[Sending]) -> None:
        error: EngineError = EngineUnavailable(f"{self._wire.name}: the client was closed")
        try:
            if len(sendings) == 1:
                await self._post_one(sendings[0])
            else:
                await self._post_batch(sendings)
            error = EngineUnavailable(f"{self._wire.name}: the server's stream ended without an answer")
        except EngineError as exc:
            error = exc
        finally:
            _fail(sendings, error)

    async def _post_one(self, sending: Sending) -> None:
        body: dict[str, Any] = {
            "rid": sending.rid,
            "input_ids": sending.token_ids,
            "sampling_params": sending.sampling,
            "return_logprob": True,
        }
        if sending.adapter is not None:
            body["lora_path"] = sending.adapter
        if sending.priority is not None:
            body["priority"] = sending.priority
        if sending.session is not None:
            body["session_params"] = sending.session
        text = await self._wire.post(
            "/generate", body, what=sending.what, timeout_s=None, traceparent=sending.traceparent
        )
        if not sending.answer.done():
            sending.answer.set_result(json.loads(text))

    async def _post_batch(self, sendings: Sequence[Sending]) -> None:
        body: dict[str, Any] = {
            "rid": [sending.rid for sending in sendings],
            "input_ids": [sending.token_ids for sending in sendings],
            "sampling_params": [{**sending.sampling, "stream_interval": ONLY_THE_END} for sending in sendings],
            "return_logprob": True,
            "stream": True,
        }
        if any(sending.adapter is not None for sending in sendings):
            body["lora_path"] = [sending.adapter for sending in sendings]
        if sendings[0].priority is not None:
            body["priority"] = sendings[0].priority
        data = json.dumps(body, separators=(",", ":")).encode()
        what = f"{self._wire.name}: {len(sendings)} requests"
        by_rid = {sending.rid: sending for sending in sendings}
        refused = False
        try:
            async with self._wire.exchange("POST", "/generate", data, what=what, timeout_s=None) as response:
                async for answer in _events(response):
                    if "error" in answer:
                        refused = True
                        break
                    sending = by_rid[answer["meta_info"]["id"]]
                    if not sending.answer.done():
                        sending.answer.set_result(answer)
        except (EngineUnavailable, ServerBusy):
            raise
        except EngineError:
            refused = True
        if refused:
            left = [sending for sending in sendings if not sending.answer.done()]
            await asyncio.gather(*(self._post([sending]) for sending in left))


async def _events(response: aiohttp.ClientResponse) -> Any:
    """The whole answers of a stream, and its error where it has one. Lines can be longer than any line limit."""
    rest = b""
    async for chunk in response.content.iter_any():
        *complete, rest = (rest + chunk).split(b"\n\n") if rest else chunk.split(b"\n\n")
        for answer in _answers(complete):
            yield answer


def _answers(events: Sequence[bytes]) -> Iterator[Any]:
    for event in events:
        if not event.startswith(b"data: {") or _NOT_YET in event:
            continue
        answer = json.loads(event[len(b"data: ") :])
        if "error" in answer or answer["meta_info"]["finish_reason"] is not None:
            yield answer


def _fail(sendings: Sequence[Sending], error: EngineError) -> None:
    for sending in sendings:
        if not sending.answer.done():
            sending.answer.set_exception(error)
