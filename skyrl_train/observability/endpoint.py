"""A run's /metrics: our series, the engine's figures, and what its servers say of themselves, verbatim.

scrape ──HTTP──► a thread per request ──asks──► the run's event loop: engine.stats(), engine.metrics_text()
                 answers within ANSWER_S: if the loop is busy (a training step), with what was known last
"""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeoutError
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, Gauge, generate_latest

from skyrl_train.engines.base import Engine
from skyrl_train.errors import ConfigError, EngineError
from skyrl_train.observability.engine_series import EngineSeries
from skyrl_train.observability.run_series import RunSeries

ANSWER_S = 2.0
CLIENT_TIMEOUT_S = 10.0
HOST = "127.0.0.1"


class MetricsEndpoint:
    """Serves while it is entered, on loopback; one event loop. Raises ConfigError when the port is taken."""

    def __init__(self, series: RunSeries, engine: Engine, *, port: int | None = None) -> None:
        self._series = series
        self._engine = engine
        self._figures = EngineSeries(engine.info.name)
        series.registry.register(self._figures)
        self._age = Gauge(
            "skyrl_engine_figures_age_seconds",
            "Since the engine was asked; it isn't while the run's event loop is busy.",
            registry=series.registry,
        )
        self._text = ""
        self._asked_at = time.monotonic()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        try:
            self._server = _Server((HOST, port or 0), _Handler)
        except OSError as exc:
            raise ConfigError(
                f"generator.metrics.endpoint_port={port} can't be served on {HOST}: {exc}; take another one, or leave "
                "it out for a free one"
            ) from exc
        self._server.endpoint = self

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._server.server_address[1]}/metrics"

    async def __aenter__(self) -> MetricsEndpoint:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics endpoint", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop = None
        await asyncio.to_thread(self._server.shutdown)
        self._server.server_close()

    def page(self) -> bytes:
        """The text of /metrics. Called in a request's thread."""
        loop = self._loop
        if loop is not None and loop.is_running():
            asking = asyncio.run_coroutine_threadsafe(self._ask(), loop)
            try:
                asking.result(timeout=ANSWER_S)
            except (FutureTimeoutError, CancelledError):
                asking.cancel()
        self._age.set(time.monotonic() - self._asked_at)
        return generate_latest(self._series.registry) + self._text.encode()

    async def _ask(self) -> None:
        try:
            self._figures.latest = await self._engine.stats()
            text = await self._engine.metrics_text()
        except EngineError:
            self._figures.latest, text = None, ""
        self._text = text if not text or text.endswith("\n") else f"{text}\n"
        self._asked_at = time.monotonic()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    endpoint: MetricsEndpoint


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = CLIENT_TIMEOUT_S

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404, "only /metrics is here")
            return
        body = self.server.endpoint.page()
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE_LATEST)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """A scrape every few seconds is no news."""
