"""vLLM's Prometheus text as the figures of one server."""

from __future__ import annotations

import re
from collections.abc import Mapping

from skyrl_train.engines.server.client import ServerFigures
from skyrl_train.errors import EngineUnavailable

_SAMPLE = re.compile(r"^(vllm:[a-z_]+)(?:\{[^}]*\})?\s+([0-9eE+.\-]+|NaN)")


def totals(text: str) -> dict[str, float]:
    """Series name -> its sum over labels (one server may hold several engines)."""
    sums: dict[str, float] = {}
    for line in text.splitlines():
        if match := _SAMPLE.match(line):
            sums[match[1]] = sums.get(match[1], 0.0) + float(match[2])
    return sums


def figures(text: str, *, num_engines: int = 1) -> ServerFigures:
    """`kv_used_frac` is the mean over engines. Raises EngineUnavailable when the series aren't there."""
    sums = totals(text)
    try:
        return ServerFigures(
            num_running=int(sums["vllm:num_requests_running"]),
            num_waiting=int(sums["vllm:num_requests_waiting"]),
            kv_used_frac=sums["vllm:kv_cache_usage_perc"] / num_engines,
            num_prompt_tokens_total=int(sums["vllm:prompt_tokens_total"]),
            num_cached_tokens_total=_whole(sums, "vllm:prefix_cache_hits_total"),
            num_generated_tokens_total=int(sums["vllm:generation_tokens_total"]),
            num_retractions_total=_whole(sums, "vllm:num_preemptions_total"),
            num_steps_total=_whole(sums, "vllm:iteration_tokens_total_count"),
            accept_len=_accept_len(sums),
        )
    except KeyError as exc:
        raise EngineUnavailable(f"vLLM's /metrics has no series {exc}; is --disable-log-stats on?") from exc


def _whole(sums: Mapping[str, float], name: str) -> int | None:
    return int(sums[name]) if name in sums else None


def _accept_len(sums: Mapping[str, float]) -> float | None:
    """Tokens a verification step yields: the accepted ones and the one that every step makes. None without speculation,
    1 while nothing was drafted.
    """
    if "vllm:spec_decode_num_drafts_total" not in sums:
        return None
    drafts = sums["vllm:spec_decode_num_drafts_total"]
    return 1.0 + sums["vllm:spec_decode_num_accepted_tokens_total"] / max(drafts, 1.0)
