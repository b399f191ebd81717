"""OpenTelemetry spans of a run, joined to its servers' own: generator.metrics.tracing.

    step 12 ─┬─ rollout ─┬─ trajectory 7/2/0 ─┬─ request 7/2/0    ─── the server's spans of it
             │           │                    └─ request 7/2/0/t1 ─── …
             ├─ train    └─ trajectory 7/3/0 …
             └─ weight_sync

A step is a trace. `span` opens one inside the one that is open in this task, and nothing where no run is traced; a
server's client sends `traceparent()` along, from which the server goes on. The packages are an extra of ours,
`skyrl_train[tracing]`, and imported when a run is traced.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from skyrl_train.engines.base import GenerateFn
from skyrl_train.errors import ConfigError
from skyrl_train.types import Completion, GenerateRequest

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

SERVICE_NAME = "skyrl_train"
EXPORT_TIMEOUT_S = 5
"""For one batch of spans. A collector that is away costs this at the end of the run, and no step waits for it."""


@dataclass(frozen=True, kw_only=True)
class _Here:
    """Where this task is: in `span`, if in any."""

    tracer: Tracer
    span: Span | None = None


_here: ContextVar[_Here | None] = ContextVar("skyrl_train_span", default=None)


@contextmanager
def traced(endpoint: str | None, **attributes: str) -> Iterator[None]:
    """Spans inside go to the collector at `endpoint`, `host:port` of OTLP over gRPC; None traces nothing.

    `attributes` are the run's, on all of them. Raises ConfigError where the packages are not installed.
    """
    if endpoint is None:
        yield
        return
    provider = _provider(endpoint, attributes)
    _here.set(_Here(tracer=provider.get_tracer(SERVICE_NAME)))
    try:
        yield
    finally:
        _here.set(None)
        provider.shutdown()


@contextmanager
def span(name: str, **attributes: str | int | float) -> Iterator[None]:
    """A span around the block, in the task that runs it and in those that start in it. An exception marks it."""
    before = _here.get()
    if before is None:
        yield
        return
    from opentelemetry.trace import set_span_in_context

    parent = None if before.span is None else set_span_in_context(before.span)
    named = {f"skyrl.{key}": value for key, value in attributes.items()}
    opened = before.tracer.start_span(name, context=parent, attributes=named)
    _here.set(replace(before, span=opened))
    try:
        yield
    except BaseException as exc:
        _mark(opened, exc)
        raise
    finally:
        _here.set(before)
        opened.end()


def traceparent() -> str | None:
    """The span that is open in this task as the W3C's header of that name; None where there is none."""
    here = _here.get()
    if here is None or here.span is None:
        return None
    context = here.span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def with_request_spans(generate: GenerateFn) -> GenerateFn:
    """`generate` with a span around each request."""

    async def generate_in_span(request: GenerateRequest) -> Completion:
        with span("request", request_id=request.request_id, prompt_tokens=len(request.prompt_token_ids)):
            return await generate(request)

    return generate_in_span


def _mark(opened: Span, exc: BaseException) -> None:
    from opentelemetry.trace import Status, StatusCode

    opened.set_status(Status(StatusCode.ERROR, f"{type(exc).__name__}: {exc}"))


def _provider(endpoint: str, attributes: dict[str, str]) -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as exc:
        raise ConfigError(
            f"generator.metrics.tracing.enabled=true needs OpenTelemetry, and {exc.name} is not installed: "
            "pip install 'skyrl_train[tracing]', or leave tracing off"
        ) from exc
    # Its own words on a collector that is away come once a batch.
    logging.getLogger("opentelemetry.exporter.otlp.proto.grpc.exporter").setLevel(logging.ERROR)
    resource = Resource.create({"service.name": SERVICE_NAME, **{f"skyrl.{key}": v for key, v in attributes.items()}})
    # Ours alone: the process-wide provider is the user's.
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=True, timeout=EXPORT_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider
