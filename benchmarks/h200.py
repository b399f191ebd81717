"""Everything for one large GPU in one run of under 8 minutes, the table last.

    python -m benchmarks.h200

Jobs run in the order below while time is left; one that would start too late is a row that says so. The ceilings
are measured first. The Qwen2.5-0.5B shape, random weights, bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import grpo_step, rollouts

BUDGET_S = 480.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """`needs_s` is about what it takes: the job starts only if that much is left."""

    name: str
    needs_s: float
    run: Callable[[list[str]], list[list[str]]]
    argv: tuple[str, ...]


def rollout_rows(argv: list[str]) -> list[list[str]]:
    """A row for each engine: its setting, tokens a second, the ratio to the best peer."""
    results = rollouts.main(argv)
    return [
        [
            result.engine,
            result.setting or result.error,
            *(
                f"{figures.tokens_per_s:,.0f} tokens/s" if (figures := result.figures.get("sampled")) else "",
                figures.over_best_peer if figures else "",
                figures.of_limit if figures else "",
            ),
        ]
        for result in results
    ]


def step_rows(argv: list[str]) -> list[list[str]]:
    results = grpo_step.main(argv)
    return [
        [result.side, result.setting or result.error, result.figure("median"), result.figure("ratio"), ""]
        for result in results
    ]
