"""`EngineStats` as Prometheus series."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from skyrl_train.engines.base import EngineStats

_GAUGES = (
    ("skyrl_engine_paused", "1 while requests wait for a resume.", "paused"),
    ("skyrl_requests_running", "Requests that are being computed.", "num_running"),
    ("skyrl_requests_waiting", "Requests in the engine's queue.", "num_waiting"),
    ("skyrl_kv_used_frac", "KV cache in use, prefix cache included.", "kv_used_frac"),
    ("skyrl_cache_hit_frac", "Prompt tokens from the prefix cache over all prompt tokens.", "cache_hit_frac"),
    ("skyrl_policy_version", "Version of the weights that are served.", "policy_version"),
    ("skyrl_accept_len", "Tokens accepted per speculative step.", "accept_len"),
    ("skyrl_draft_updates_behind", "Weight updates since the draft's own weights.", "draft_updates_behind"),
    ("skyrl_sessions_open", "Sessions that are open.", "num_sessions"),
)
_COUNTERS = (
    ("skyrl_prompt_tokens", "Prompt tokens of requests that were started.", "num_prompt_tokens_total"),
    ("skyrl_cached_tokens", "Prompt tokens that came from the prefix cache.", "num_cached_tokens_total"),
    ("skyrl_generated_tokens", "Tokens sampled.", "num_generated_tokens_total"),
    ("skyrl_retractions", "Times a running request was sent back to the queue.", "num_retractions_total"),
    ("skyrl_evicted_tokens", "Tokens dropped from the prefix cache.", "num_evicted_tokens_total"),
    ("skyrl_host_cached_tokens", "Tokens read back from host memory.", "num_host_cached_tokens_total"),
    ("skyrl_steps", "Steps of the engine.", "num_steps_total"),
    ("skyrl_drafted_tokens", "Tokens drafted by the embedded engine.", "num_drafted_tokens_total"),
    ("skyrl_accepted_tokens", "Drafted tokens that were right, in the embedded engine.", "num_accepted_tokens_total"),
    ("skyrl_engine_restarts", "Times a server was lost and started again.", "num_restarts_total"),
    (
        "skyrl_requests_resent",
        "Attempts at requests after the first: a server was lost, or paused.",
        "num_resent_total",
    ),
)


class EngineSeries(Collector):
    """`EngineStats` as series; `latest` None means that the engine gave none: it is down."""

    def __init__(self, engine_name: str) -> None:
        self._labels = ("engine",)
        self._values = (engine_name,)
        self.latest: EngineStats | None = None

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("skyrl_engine_up", "1 while the engine answers.", labels=self._labels)
        up.add_metric(self._values, float(self.latest is not None))
        yield up
        if self.latest is None:
            return
        for name, text, field in _GAUGES:
            value = getattr(self.latest, field)
            if value is not None:
                gauge = GaugeMetricFamily(name, text, labels=self._labels)
                gauge.add_metric(self._values, float(value))
                yield gauge
        for name, text, field in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=self._labels)
            counter.add_metric(self._values, float(getattr(self.latest, field)))
            yield counter
