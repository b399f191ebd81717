"""What a vLLM server that was started with these options can do, and what its log-probabilities are of.

Read in the samplers of 0.26 and 0.32 and measured against transformers with 0.32, under `processed_logprobs`: after
penalties, min_new_tokens and grammar, the temperature, top-k, top-p and min-p. Those of a greedy request are the
model's at temperature 1 (after penalties), also in a batch with others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skyrl_train.engines.base import Capability, LogprobSpace
from skyrl_train.engines.server.client import ServerTraits
from skyrl_train.engines.vllm.derived import PROCESSED_LOGPROBS


def server_traits(name: str, options: Mapping[str, Any], *, release: str, on_cpu: bool = False) -> ServerTraits:
    """`options` are those of `vllm serve` by name. Spans of versions exist in 0.32's engine but not in its answers."""
    speculation = options.get("speculative-config")
    capabilities: set[Capability] = {
        "abort",
        "disk_weights",
        "named_weights",
        "penalties",
        "sessions",
        "stop_strings",
        "structured_output",
    }
    if speculation:
        # min_p is refused then.
        capabilities.add("speculation")
    else:
        capabilities.add("min_p")
    if not loses_seeds(options, on_cpu=on_cpu):
        capabilities.add("seed")
    if options.get("scheduling-policy") == "priority":
        capabilities.add("priority")
    if options.get("enable-lora"):
        capabilities |= {"lora", "adapter_weights"}
    if options.get("enable-sleep-mode"):
        capabilities.add("sleep")
    space: LogprobSpace = "sampled" if options.get("logprobs-mode") == PROCESSED_LOGPROBS else "raw"
    return ServerTraits(name=name, release=release, logprob_space=space, capabilities=frozenset(capabilities))


def loses_seeds(options: Mapping[str, Any], *, on_cpu: bool) -> bool:
    """Whether a request must not have a seed. With a draft model, equal seeds give different samples. On a CPU, a
    seeded request whose prompt is computed in chunks ends the engine (0.26 and 0.32): it rewinds the generator after a
    chunk, which torch's CPU generators can't.
    """
    speculation = options.get("speculative-config") or {"method": "ngram"}
    drafted = speculation["method"] != "ngram"
    return drafted or (on_cpu and options.get("enable-chunked-prefill") is not False)


def verifies_greedy_only(options: Mapping[str, Any], *, on_cpu: bool) -> bool:
    """Whether sampled drafts can't be verified. In 0.32 the CPU's stand-in for the kernel that spreads temperatures
    over draft tokens writes into a copy, and the sampler reads memory that nobody set; greedy drafts don't need it.
    """
    return on_cpu and bool(options.get("speculative-config"))
