"""Our sampling parameters as SGLang's: what it calls them, and what it can't do, refused before it is sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skyrl_train.engines.base import Capability
from skyrl_train.errors import RequestRejected
from skyrl_train.types import SamplingParams

ONLY_THE_END = 2**30
"""A stream interval that no answer reaches: a stream then carries a first token and the whole answer."""


def sampling_fields(sampling: SamplingParams, capabilities: frozenset[Capability], *, what: str) -> dict[str, Any]:
    """Fields of SGLang's SamplingParams; only those that are not at its own default.

    Differences: top_k is -1 when off. With `ignore_eos` it looks at no stop ids either (`cut_ids`), and its
    min_new_tokens forbids the end token all the same, so it is left out where nothing could end the answer. A stop
    string ends an answer before min_new_tokens. A seed is read with deterministic inference only. What the server does
    otherwise while it speculates is not in its capabilities (traits.py). Raises RequestRejected.
    """
    _refuse_unable(sampling, capabilities, what)
    fields: dict[str, Any] = {"max_new_tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
    if sampling.top_p != 1.0:
        fields["top_p"] = sampling.top_p
    if sampling.top_k:
        fields["top_k"] = sampling.top_k
    if sampling.min_p:
        fields["min_p"] = sampling.min_p
    if sampling.repetition_penalty != 1.0:
        fields["repetition_penalty"] = sampling.repetition_penalty
    if sampling.presence_penalty:
        fields["presence_penalty"] = sampling.presence_penalty
    if sampling.frequency_penalty:
        fields["frequency_penalty"] = sampling.frequency_penalty
    if sampling.ignore_eos:
        fields["ignore_eos"] = True
    if sampling.stop:
        fields["stop"] = list(sampling.stop)
    if sampling.stop_token_ids and not sampling.ignore_eos:
        fields["stop_token_ids"] = list(sampling.stop_token_ids)
    if sampling.min_new_tokens:
        fields |= _least(sampling, what)
    if sampling.seed is not None and "seed" in capabilities:
        fields["sampling_seed"] = sampling.seed
    if sampling.grammar is not None:
        fields[sampling.grammar.kind] = sampling.grammar.text
    return fields


def cut_ids(sampling: SamplingParams) -> frozenset[int]:
    """Ids at which the answer is cut here: SGLang goes on past them, and what is before them is the same."""
    return frozenset(sampling.stop_token_ids) if sampling.ignore_eos else frozenset()


def _refuse_unable(sampling: SamplingParams, capabilities: frozenset[Capability], what: str) -> None:
    if sampling.grammar is not None and "structured_output" not in capabilities:
        raise RequestRejected(f"{what}: this server has no grammar backend; it can't follow a grammar")
    if sampling.min_p and "min_p" not in capabilities:
        raise RequestRejected(f"{what}: min_p={sampling.min_p}: SGLang ignores it while it speculates; leave it out")
    if sampling.min_new_tokens and "speculation" in capabilities:
        raise RequestRejected(
            f"{what}: min_new_tokens={sampling.min_new_tokens}: SGLang counts steps, not tokens, while it speculates; "
            "leave it out, or turn generator.speculative_decoding.enabled off"
        )
    penalties = [
        f"{name}={getattr(sampling, name)}"
        for name, off in (("repetition_penalty", 1), ("presence_penalty", 0), ("frequency_penalty", 0))
        if getattr(sampling, name) != off
    ]
    if penalties and "penalties" not in capabilities:
        raise RequestRejected(
            f"{what}: {', '.join(penalties)}: SGLang penalises a token one step late unless its scheduler waits for "
            "the sampler; set generator.scheduling.disable_overlap=true, without speculative decoding"
        )
    if sampling.repetition_penalty != 1 and (sampling.presence_penalty or sampling.frequency_penalty):
        raise RequestRejected(
            f"{what}: {', '.join(penalties)}: SGLang divides before it subtracts or after, as it happens at each start "
            "of the server; leave the repetition penalty or the others out"
        )


def _least(sampling: SamplingParams, what: str) -> Mapping[str, int]:
    if sampling.stop:
        raise RequestRejected(
            f"{what}: min_new_tokens={sampling.min_new_tokens} with stop strings: SGLang ends an answer at a stop "
            "string before that; use stop_token_ids, or leave one of the two out"
        )
    if not sampling.ignore_eos:
        return {"min_new_tokens": sampling.min_new_tokens}
    if sampling.stop_token_ids:
        raise RequestRejected(
            f"{what}: min_new_tokens={sampling.min_new_tokens} with ignore_eos and stop_token_ids: SGLang would forbid "
            "the end token too; leave one of the three out"
        )
    return {}
