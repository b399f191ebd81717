"""What an SGLang server is doing: from /v1/loads, from its Prometheus series where they are on, from its answers.

/v1/loads has no counters and the series are off by default, so tokens are counted from the answers' own figures:
exact, for what this client asked, in every release.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skyrl_train.engines.server.client import ServerFigures

_SAMPLE = re.compile(r"^(sglang:[a-z0-9_]+)(?:\{[^}]*\})? (\S+)", re.MULTILINE)


@dataclass(kw_only=True)
class Counts:
    """Over all answers of one client. `spec_verifications` counts the steps that verified drafts."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    retractions: int = 0
    spec_tokens: int = 0
    spec_verifications: int = 0

    def add(self, answer: Mapping[str, Any]) -> None:
        """An answer that was aborted in the queue has only some of the figures."""
        meta = answer["meta_info"]
        generated = meta.get("completion_tokens") or 0
        self.prompt_tokens += meta.get("prompt_tokens") or 0
        self.cached_tokens += meta.get("cached_tokens") or 0
        self.generated_tokens += generated
        self.retractions += meta.get("num_retractions") or 0
        if verifications := meta.get("spec_verify_ct"):
            self.spec_tokens += generated
            self.spec_verifications += verifications


def server_figures(loads: Sequence[Mapping[str, Any]], metrics: str, counts: Counts) -> ServerFigures:
    """`loads` has an entry for each data-parallel rank; `metrics` is empty where the series are off."""
    series = _sums(metrics)
    capacity = sum(load["max_total_num_tokens"] for load in loads)
    return ServerFigures(
        num_running=sum(load["num_running_reqs"] for load in loads),
        num_waiting=sum(load["num_waiting_reqs"] for load in loads),
        kv_used_frac=sum(load["num_used_tokens"] for load in loads) / max(capacity, 1),
        num_prompt_tokens_total=counts.prompt_tokens,
        num_cached_tokens_total=counts.cached_tokens,
        num_generated_tokens_total=counts.generated_tokens,
        num_retractions_total=counts.retractions,
        num_evicted_tokens_total=_whole(series.get("sglang:evicted_tokens_total"), metrics),
        num_steps_total=_whole(series.get("sglang:cuda_graph_passes_total"), metrics),
        accept_len=counts.spec_tokens / counts.spec_verifications if counts.spec_verifications else None,
    )


def _sums(metrics: str) -> dict[str, float]:
    """Each counter or gauge over its labels."""
    sums: dict[str, float] = {}
    for name, value in _SAMPLE.findall(metrics):
        sums[name] = sums.get(name, 0.0) + float(value)
    return sums


def _whole(value: float | None, metrics: str) -> int | None:
    """A series that has no sample yet is 0; without any series nothing is known."""
    if not metrics:
        return None
    return 0 if value is None else int(value)
