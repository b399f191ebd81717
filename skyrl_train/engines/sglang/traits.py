"""What a server that was started with these arguments can do, and what its log-probabilities are of.

Read in the samplers of 0.5.17 and 0.5.23 and measured against transformers with 0.5.23:

- Log-probabilities are those of softmax(logits / temperature), after penalties, min_new_tokens, grammar and logit bias
  and before top-k, top-p and min-p; those of greedy requests are at temperature 1. SGLANG_RETURN_ORIGINAL_LOGPROB=1
  makes them those at temperature 1.
- Seeds are read with deterministic inference only; a speculating server draws its own numbers.
- Penalties are on the answer's tokens alone: frequency and presence are subtracted, repetition divides, in an order
  that changes from start to start (a set of Python classes). They are exact with disable_overlap_schedule only: else
  the newest token is not penalised yet, and the prompt's last one is.
  A request that was put back into the queue (`hold`, or a full cache) loses the count of what it had, for its
  penalties and for min_new_tokens.
- While it speculates it ignores min_p, and its penalties and min_new_tokens count verification steps, not tokens. On a
  CPU it accepts the likeliest token whatever the temperature (`samples_greedily`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skyrl_train.engines.base import Capability
from skyrl_train.engines.server.client import ServerTraits
from skyrl_train.engines.sglang.releases import release_number

VERSION_SPANS_SINCE = (0, 5, 23)
"""The first release whose answers say which tokens were sampled under which weight version; 0.5.17 has none."""
STREAM_INTERVAL_SINCE = (0, 5, 17)
"""A request can set its own stream interval, which a batch of requests needs; older releases were not looked at."""


def server_traits(
    name: str, arguments: Mapping[str, Any], *, release: str, environment: Mapping[str, str | None] | None = None
) -> ServerTraits:
    """`arguments` are ServerArgs by field, ours or those of /server_info."""
    speculates = bool(arguments.get("speculative_algorithm"))
    capabilities: set[Capability] = {"abort", "disk_weights", "named_weights", "sessions", "stop_strings"}
    if arguments.get("grammar_backend") != "none":
        capabilities.add("structured_output")
    if speculates:
        capabilities.add("speculation")
    else:
        capabilities.add("min_p")
        if arguments.get("disable_overlap_schedule"):
            capabilities.add("penalties")
    if arguments.get("enable_deterministic_inference") and not speculates:
        capabilities.add("seed")
    if arguments.get("enable_priority_scheduling"):
        capabilities.add("priority")
    if arguments.get("enable_lora"):
        capabilities |= {"lora", "adapter_weights"}
    if arguments.get("enable_memory_saver"):
        capabilities.add("sleep")
    number = release_number(release)
    return ServerTraits(
        name=name,
        release=release,
        logprob_space="raw" if (environment or {}).get("SGLANG_RETURN_ORIGINAL_LOGPROB") in _ON else "penalised",
        capabilities=frozenset(capabilities),
        reports_versions=number >= VERSION_SPANS_SINCE,
        # Requests go to the data-parallel copies in turn, and a session is known to the copies that saw it.
        native_sessions=(arguments.get("dp_size") or 1) == 1,
    )


def samples_greedily(arguments: Mapping[str, Any]) -> bool:
    """Whether every request is answered as if its temperature were 0."""
    return bool(arguments.get("speculative_algorithm")) and arguments.get("device") == "cpu"


_ON = ("1", "true", "True", "TRUE")
