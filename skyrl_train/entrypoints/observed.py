"""What looks at a run beside its files: the engine's figures of each step, and an endpoint for Prometheus."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from skyrl_train.config.schema import Config
from skyrl_train.engines.base import Engine
from skyrl_train.observability.endpoint import MetricsEndpoint
from skyrl_train.observability.engine_watch import EngineWatch
from skyrl_train.observability.progress import Progress
from skyrl_train.observability.run_series import RunSeries


def build_series(config: Config, *, total_steps: int) -> RunSeries | None:
    """The run's series, where generator.metrics asks for them."""
    if not config.generator.metrics.enabled:
        return None
    keys = config.trainer
    return RunSeries(
        run_name=keys.run_name,
        backend=config.generator.backend,
        model=keys.policy.model.path,
        total_steps=total_steps,
    )


def build_endpoint(config: Config, series: RunSeries | None, engine: Engine) -> MetricsEndpoint | None:
    """Takes the port; raises ConfigError where it is taken."""
    return None if series is None else MetricsEndpoint(series, engine, port=config.generator.metrics.endpoint_port)


def on_phase(progress: Progress, series: RunSeries | None) -> Callable[[str], None]:
    """Who is told when a phase begins."""

    def begins(name: str) -> None:
        progress.phase(name)
        if series is not None:
            series.phase(name)

    return begins


@asynccontextmanager
async def observed(
    watch: EngineWatch | None, endpoint: MetricsEndpoint | None, progress: Progress
) -> AsyncIterator[None]:
    """Inside, the engine is looked at and the endpoint answers. The engine is up by then."""
    async with AsyncExitStack() as stack:
        if watch is not None:
            await stack.enter_async_context(watch)
        if endpoint is not None:
            await stack.enter_async_context(endpoint)
            progress.message(f"metrics {endpoint.url}")
        yield
