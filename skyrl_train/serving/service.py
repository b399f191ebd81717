"""A prepared call through the engine, to a response: whole, or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from skyrl_train.engines.base import Engine, EngineStats
from skyrl_train.errors import EngineUnavailable
from skyrl_train.serving.answer import AnswerPiece, AnswerReader, read_whole
from skyrl_train.serving.errors import ApiError, as_api_error, error_body
from skyrl_train.serving.fan_out import generate_all, stream_all, unless_client_goes
from skyrl_train.serving.metrics import ServingMetrics
from skyrl_train.serving.prepare import Call
from skyrl_train.serving.shapes import Json, Usage, token_details

logger = logging.getLogger(__name__)

HEALTH_TIMEOUT_S = 10.0
"""A step that takes longer counts as stuck."""


class Service:
    """One engine, served under one name. Doesn't own the engine: whoever made it closes it."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        model_name: str,
        metrics: ServingMetrics,
        *,
        health_timeout_s: float = HEALTH_TIMEOUT_S,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.model_name = model_name
        self._metrics = metrics
        self._health_timeout_s = health_timeout_s

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for a name that isn't served."""
        if name is not None and name != self.model_name:
            raise ApiError(
                404,
                f"model {name!r} is not served here; {self.model_name!r} is",
                param="model",
                code="model_not_found",
            )

    async def why_unhealthy(self) -> str | None:
        """None while the engine serves; else the reason why it doesn't."""
        name = self.engine.info.name
        try:
            stats = await self._stats()
        except TimeoutError:
            return f"engine {name} has not answered for {self._health_timeout_s:g} s"
        except EngineUnavailable as exc:
            return str(exc)
        return f"engine {name} is paused: requests wait until it resumes" if stats.paused else None

    async def render_metrics(self) -> bytes:
        """The text of /metrics."""
        try:
            stats = await self._stats()
        except (EngineUnavailable, TimeoutError):
            return self._metrics.render(None)
        return self._metrics.render(stats)

    async def _stats(self) -> EngineStats:
        async with asyncio.timeout(self._health_timeout_s):
            return await self.engine.stats()

    async def answer(self, call: Call, http: Request) -> Response:
        """The response to a call. A client that hangs up aborts it."""
        arrived_at = time.perf_counter()
        if not call.streams:
            return JSONResponse(await self._whole(call, http, arrived_at))
        events = self._events(call, arrived_at)
        # The first event decides the status: what the engine refuses is refused before a stream begins.
        first = await unless_client_goes(http, anext(events))
        return EventStream(first, events)

    async def _whole(self, call: Call, http: Request, arrived_at: float) -> Json:
        with self._metrics.open_answers(len(call.requests)) as open_answers:
            completions = await unless_client_goes(http, generate_all(self.engine, call.requests))
            for index, completion in enumerate(completions):
                open_answers.ended(completion, len(call.prompt_of(index)), arrived_at)
        usage = Usage(num_prompt_tokens=call.num_prompt_tokens)
        choices = []
        for index, completion in enumerate(completions):
            answer = read_whole(self.tokenizer, completion, stop=call.stop, with_logprobs=call.with_logprobs)
            usage.add(completion, is_first_of_prompt=call.is_first_of_prompt(index))
            choice = call.shape.choice(index, answer)
            choices.append(self._with_details(call, index, answer, choice, is_first=True))
        envelope = self._envelope(call, call.shape.whole_object)
        return {**envelope, "choices": choices, "usage": usage.to_json(), "system_fingerprint": usage.fingerprint()}

    async def _events(self, call: Call, arrived_at: float) -> AsyncGenerator[bytes, None]:
        """Server-sent events. An engine error after the first one becomes the last one, and no [DONE] follows."""
        readers = [
            AnswerReader(self.tokenizer, stop=call.stop, with_logprobs=call.with_logprobs) for _ in call.requests
        ]
        clocks = [self._metrics.token_clock(arrived_at) for _ in call.requests]
        begun: set[int] = set()
        usage = Usage(num_prompt_tokens=call.num_prompt_tokens)
        envelope = self._envelope(call, call.shape.chunk_object)
        if call.streams_usage:
            envelope["usage"] = None
        pieces = stream_all(self.engine, call.requests)
        with self._metrics.open_answers(len(call.requests)) as open_answers:
            try:
                async for index, tokens in pieces:
                    clocks[index].tokens_came(len(tokens.token_ids))
                    piece = readers[index].read(tokens)
                    if piece.completion is not None:
                        open_answers.ended(piece.completion, len(call.prompt_of(index)), arrived_at)
                        usage.add(piece.completion, is_first_of_prompt=call.is_first_of_prompt(index))
                    is_first = index not in begun
                    if is_first or _says_something(call, piece):
                        begun.add(index)
                        choice = call.shape.delta(index, piece, is_first=is_first)
                        choices = [self._with_details(call, index, piece, choice, is_first=is_first)]
                        yield _event({**envelope, "choices": choices})
            except Exception as exc:
                error = as_api_error(exc)
                if error is None or not begun:
                    raise
                logger.warning("%s broke off: %s", call.call_id, error.message)
                yield _event(error_body(error.status, error.message, param=error.param, code=error.code))
                return
            finally:
                await pieces.aclose()
        if call.streams_usage:
            fingerprint = usage.fingerprint()
            yield _event({**envelope, "choices": [], "usage": usage.to_json(), "system_fingerprint": fingerprint})
        yield b"data: [DONE]\n\n"

    def _envelope(self, call: Call, kind: str) -> Json:
        return {"id": call.call_id, "object": kind, "created": int(time.time()), "model": self.model_name}

    def _with_details(self, call: Call, index: int, piece: AnswerPiece, choice: Json, *, is_first: bool) -> Json:
        if not call.with_token_ids:
            return choice
        return {**choice, **token_details(piece, call.prompt_of(index) if is_first else None)}


class EventStream(StreamingResponse):
    """Server-sent events, the first one already made. When it ends, however it ends, its generator is closed."""

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None]) -> None:
        self._events = events

        async def content() -> AsyncGenerator[bytes, None]:
            yield first
            async for event in events:
                yield event

        # Proxies that collect a response before they pass it on would undo the streaming.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(content(), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


def _says_something(call: Call, piece: AnswerPiece) -> bool:
    """Whether a piece has anything to send: its text may be held back."""
    has_tokens = bool(piece.token_ids) and (call.with_logprobs or call.with_token_ids)
    return bool(piece.text) or piece.completion is not None or has_tokens


def _event(content: Json) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
