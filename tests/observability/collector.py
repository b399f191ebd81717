"""An OpenTelemetry collector: takes spans over OTLP's gRPC and keeps them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True, kw_only=True)
class Spot:
    """One span, ids in hex; `parent_id` is empty for the first of a trace."""

    name: str
    service: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    resource: dict[str, Any]
    failed: bool


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.spans: list[Spot] = []
        self.endpoint = ""

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        for resource in request.resource_spans:
            about = _plain(resource.resource.attributes)
            for scope in resource.scope_spans:
                self.spans += [
                    Spot(
                        name=span.name,
                        service=about.get("service.name", ""),
                        trace_id=span.trace_id.hex(),
                        span_id=span.span_id.hex(),
                        parent_id=span.parent_span_id.hex(),
                        attributes=_plain(span.attributes),
                        resource=about,
                        failed=span.status.code == 2,
                    )
                    for span in scope.spans
                ]
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str) -> list[Spot]:
        return [span for span in list(self.spans) if span.name == name]

    def children(self, parent: Spot) -> list[Spot]:
        return [span for span in list(self.spans) if span.parent_id == parent.span_id]

    def wait_for(self, arrived: Callable[[Sequence[Spot]], bool], *, within_s: float = 30.0) -> None:
        """Spans come in batches, some time after they ended."""
        deadline = time.monotonic() + within_s
        while not arrived(list(self.spans)):
            assert time.monotonic() < deadline, f"only these arrived: {sorted({span.name for span in self.spans})}"
            time.sleep(0.05)


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a free port of this machine, `collector.endpoint`."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    collector.endpoint = f"127.0.0.1:{port}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait()


def _plain(attributes: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value") or "string_value") for pair in attributes}
