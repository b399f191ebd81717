"""The endpoint's figures in Prometheus' text format: the engine's state now, and what requests met.

Each app has a registry of its own, so several can live in one process.
"""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from skyrl_train.engines.base import EngineStats
from skyrl_train.observability.engine_series import EngineSeries
from skyrl_train.serving.errors import CLIENT_GONE_STATUS
from skyrl_train.types import Completion

TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
REQUEST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKEN_COUNTS = tuple(float(2**power) for power in range(0, 18))
UNKNOWN_PATH = "other"
DROPPED = "dropped"


class ServingMetrics:
    """What requests met, and the engine's figures beside it."""

    def __init__(self, engine_name: str) -> None:
        self.registry = CollectorRegistry()
        self._engine = EngineSeries(engine_name)
        self.registry.register(self._engine)
        ProcessCollector(registry=self.registry)
        self.http_requests = Counter(
            "skyrl_http_requests",
            f"Answered HTTP requests; status {CLIENT_GONE_STATUS} is a client that hung up.",
            ("endpoint", "status"),
            registry=self.registry,
        )
        self._finished = Counter(
            "skyrl_answers",
            f"Answers by the reason of their end; {DROPPED}: the client hung up, or the engine refused or failed.",
            ("finish_reason",),
            registry=self.registry,
        )
        self._first_token = self._histogram(
            "skyrl_time_to_first_token_seconds", "From a streamed request's arrival to its first token.", TOKEN_SECONDS
        )
        self._inter_token = self._histogram(
            "skyrl_inter_token_seconds", "Between tokens of one streamed answer.", TOKEN_SECONDS
        )
        self._request = self._histogram(
            "skyrl_request_seconds", "From a request's arrival to the end of an answer.", REQUEST_SECONDS
        )
        self._prompt_len = self._histogram("skyrl_request_prompt_tokens", "Prompt tokens of an answer.", TOKEN_COUNTS)
        self._answer_len = self._histogram("skyrl_request_generated_tokens", "Tokens of an answer.", TOKEN_COUNTS)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)

    def open_answers(self, count: int) -> OpenAnswers:
        """A context in which `count` answers to one request are made."""
        return OpenAnswers(self, count)

    def answered(self, completion: Completion, num_prompt_tokens: int, arrived_at: float) -> None:
        """An answer has ended. `arrived_at`: time.perf_counter() when its request came."""
        self._finished.labels(completion.finish_reason).inc()
        self._request.observe(time.perf_counter() - arrived_at)
        self._prompt_len.observe(num_prompt_tokens)
        self._answer_len.observe(len(completion.token_ids))

    def dropped(self, count: int) -> None:
        """So many answers will never end."""
        self._finished.labels(DROPPED).inc(count)

    def token_clock(self, arrived_at: float) -> TokenClock:
        """For one streamed answer."""
        return TokenClock(self._first_token, self._inter_token, arrived_at)

    def render(self, stats: EngineStats | None) -> bytes:
        """The text of /metrics. `stats` None: the engine is down."""
        self._engine.latest = stats
        return generate_latest(self.registry)


class OpenAnswers:
    """Counts as dropped what has not ended when the context is left, however it is left."""

    def __init__(self, metrics: ServingMetrics, count: int) -> None:
        self._metrics = metrics
        self._num_open = count

    def __enter__(self) -> OpenAnswers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._num_open:
            self._metrics.dropped(self._num_open)

    def ended(self, completion: Completion, num_prompt_tokens: int, arrived_at: float) -> None:
        self._num_open -= 1
        self._metrics.answered(completion, num_prompt_tokens, arrived_at)


class TokenClock:
    """When the tokens of one streamed answer came.

    A piece of several tokens counts as that many equal waits, but in the first piece they came with the first token.
    """

    def __init__(self, first: Histogram, between: Histogram, arrived_at: float) -> None:
        self._first = first
        self._between = between
        self._last = arrived_at
        self._started = False

    def tokens_came(self, count: int) -> None:
        if not count:
            return
        now = time.perf_counter()
        waited, self._last = now - self._last, now
        if not self._started:
            self._started = True
            self._first.observe(waited)
            count, waited = count - 1, 0.0
        for _ in range(count):
            self._between.observe(waited / count)


class CountRequests:
    """ASGI middleware: counts answers by route and status. Unknown paths share one label, as anybody can make them."""

    def __init__(self, app: ASGIApp, *, metrics: ServingMetrics) -> None:
        self._app = app
        self._requests = metrics.http_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            route = scope.get("route")
            self._requests.labels(getattr(route, "path", UNKNOWN_PATH), str(status)).inc()
