"""A run's spans at a real collector: step -> phase -> trajectory -> request, and none where no run is traced."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from skyrl_train.config.load import load_config
from skyrl_train.entrypoints.run import DONE, run
from skyrl_train.errors import ConfigError
from skyrl_train.observability.tracing import span, traced, traceparent
from tests.entrypoints.test_main_job import STEPS, arguments, inputs
from tests.observability.collector import collecting

__all__ = ["inputs"]


def test_where_no_run_is_traced_there_is_no_span() -> None:
    with span("step", step=1):
        assert traceparent() is None
    with traced(None), span("step", step=1):
        assert traceparent() is None


def test_spans_stand_within_each_other_over_tasks_and_say_what_failed() -> None:
    async def child(number: int) -> str | None:
        await asyncio.sleep(0)
        with span("child", number=number):
            await asyncio.sleep(0)
            return traceparent()

    async def family() -> list[str | None]:
        with span("parent"):
            found = await asyncio.gather(child(1), child(2))
        with pytest.raises(RuntimeError), span("broken"):
            raise RuntimeError("no room")
        assert traceparent() is None
        return found

    with collecting() as collector:
        with traced(collector.endpoint, run="mine"):
            headers = asyncio.run(family())
        (parent,), children, (broken,) = (collector.named(name) for name in ("parent", "child", "broken"))
    assert parent.parent_id == "" and parent.service == "skyrl_train" and parent.resource["skyrl.run"] == "mine"
    assert [one.parent_id for one in children] == [parent.span_id] * 2
    assert {one.attributes["skyrl.number"] for one in children} == {1, 2}
    # Flags: sampled, and since some release of OpenTelemetry also that the trace's id is random.
    assert {str(header)[:-3] for header in headers} == {f"00-{one.trace_id}-{one.span_id}" for one in children}
    assert all(int(str(header)[-2:], 16) & 1 for header in headers)
    assert broken.failed and broken.trace_id != parent.trace_id


def test_a_whole_run_is_one_trace_a_step_down_to_each_request(inputs: Path, tmp_path: Path) -> None:
    with collecting() as collector:
        with traced(collector.endpoint, run="tiny"):
            assert run(load_config(arguments(inputs, tmp_path / "run"))) == DONE
        steps = {one.attributes["skyrl.step"]: one for one in collector.named("step")}
        assert sorted(steps) == list(range(1, STEPS + 1))
        assert len({one.trace_id for one in steps.values()}) == STEPS
        for step in steps.values():
            phases = {one.name: one for one in collector.children(step)}
            assert {"rollout", "advantages", "train", "weight_sync"} <= phases.keys()
            trajectories = collector.children(phases["rollout"])
            assert len(trajectories) == 16
            for trajectory in trajectories:
                (request,) = collector.children(trajectory)
                assert request.name == "request"
                assert request.attributes["skyrl.request_id"] == trajectory.attributes["skyrl.trajectory_id"]
                assert request.trace_id == step.trace_id


def test_a_missing_package_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"skyrl_train\[tracing\]"), traced("localhost:4317"):
        raise AssertionError("there is nothing to trace with")


def test_a_collector_that_is_away_ends_no_run() -> None:
    with traced("127.0.0.1:9"), span("step", step=1):
        assert traceparent() is not None
