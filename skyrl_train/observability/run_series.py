"""A run's metrics as Prometheus series. Takes each step's row like any other tracker.

skyrl_train_<group>_<name>                    the last row's value: reward/mean is skyrl_train_reward_mean
skyrl_train_phase_seconds_total{phase=…}      timing/<phase>_s of all steps
skyrl_train_step_seconds, …_weight_sync_…     histograms
skyrl_train_{rollout,loss}_tokens_total, …    what rows count, added up
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from skyrl_train.observability.metrics import STEP_SECONDS

PREFIX = "skyrl_train_"
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500)
_SYNC = "timing/weight_sync_s"
_ADDED_UP = (
    ("rollout_tokens", "Tokens sampled for training.", "rollout/num_tokens"),
    ("loss_tokens", "Tokens trained on.", "train/num_loss_tokens"),
    ("updates", "Optimizer steps.", "train/num_updates"),
    ("trajectories", "Trajectories rolled out for training.", "rollout/num_trajectories"),
    ("failed_trajectories", "Trajectories whose environment failed.", "rollout/num_failed"),
)


class RunSeries:
    """Owns the registry of one run. Written by the run's thread, read by a scrape's."""

    def __init__(self, *, run_name: str, backend: str, model: str, total_steps: int) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._rows = _LastRow()
        self.registry.register(self._rows)
        about = Gauge(f"{PREFIX}info", "1; its labels say which run it is.", ("run", "backend", "model"), registry=None)
        about.labels(run_name, backend, model).set(1)
        self.registry.register(about)
        self._step = self._gauge("step", "The last complete step.")
        self._gauge("total_steps", "Steps of the whole run.").set(total_steps)
        self._phase = Gauge(f"{PREFIX}phase", "1 for what the run does now.", ("phase",), registry=self.registry)
        self._phase_seconds = Counter(
            f"{PREFIX}phase_seconds", "Seconds spent in each phase.", ("phase",), registry=self.registry
        )
        self._step_seconds = self._histogram("step_seconds", "Seconds of a step.")
        self._sync_seconds = self._histogram("weight_sync_seconds", "Seconds until the engines had a step's weights.")
        self._added_up = {
            key: Counter(f"{PREFIX}{name}", text, registry=self.registry) for name, text, key in _ADDED_UP
        }
        self._now: str | None = None

    def phase(self, name: str) -> None:
        """The run begins with this phase."""
        if self._now is not None:
            self._phase.labels(self._now).set(0)
        self._phase.labels(name).set(1)
        self._now = name

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step's row."""
        self._rows.latest = dict(metrics)
        self._step.set(step)
        for key, value in metrics.items():
            if key.startswith("timing/") and key != STEP_SECONDS:
                self._phase_seconds.labels(key.removeprefix("timing/").removesuffix("_s")).inc(value)
        if STEP_SECONDS in metrics:
            self._step_seconds.observe(metrics[STEP_SECONDS])
        if _SYNC in metrics:
            self._sync_seconds.observe(metrics[_SYNC])
        for key, counter in self._added_up.items():
            counter.inc(metrics.get(key, 0))

    def close(self) -> None:
        """Nothing is held: what was logged stays readable."""

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"{PREFIX}{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"{PREFIX}{name}", text, buckets=SECONDS, registry=self.registry)


class _LastRow(Collector):
    """The last row's metrics, but for seconds of phases, which are added up elsewhere."""

    def __init__(self) -> None:
        self.latest: Mapping[str, float] = {}

    def collect(self) -> Iterator[Metric]:
        done = set[str]()
        for key, value in self.latest.items():
            name = series_name(key)
            if key.startswith("timing/") or name in done:
                continue
            done.add(name)
            yield GaugeMetricFamily(name, f"{key} of the last step.", value=float(value))


def series_name(key: str) -> str:
    """Of a metric of the log: `throughput/rollout_tokens_per_s` is skyrl_train_throughput_rollout_tokens_per_s."""
    return PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", key)
