"""One attempt as the body of `POST /v1/completions`.

Every field that shapes the distribution is written out: what is left out is taken from the model's
generation_config.json, and some models ask there for a repetition penalty or a top-k.
"""

from __future__ import annotations

from typing import Any

from skyrl_train.engines.server.client import Attempt
from skyrl_train.errors import RequestRejected
from skyrl_train.types import Grammar, SamplingParams

LOWEST_TEMPERATURE = 0.01
"""Below it vLLM samples at 0.01 instead and only says so in its log."""

_GRAMMARS = {"json_schema": "json", "regex": "regex", "ebnf": "grammar"}
_SEED_RANGE = range(-(2**63), 2**63)


def engine_request_id(wire_id: str) -> str:
    """What the engine calls the first prompt of completion request `wire_id`; /abort_requests knows no other name."""
    return f"cmpl-{wire_id}-0"


def completion_body(
    attempt: Attempt,
    *,
    model: str,
    vocab_size: int | None,
    max_model_len: int | None,
    by_priority: bool,
    greedy_only: bool = False,
) -> dict[str, Any]:
    """Raises RequestRejected for what vLLM would cut, change or die of without a word.

    `model` is the served name of the base model; an adapter is a model of its own. `by_priority`: the server
    schedules by priority; elsewhere it refuses any but 0, and the field is left out. `greedy_only`: see
    traits.verifies_greedy_only.
    """
    sampling = attempt.sampling
    if greedy_only and sampling.temperature > 0:
        raise RequestRejected(
            f"request {attempt.wire_id}: temperature {sampling.temperature} with speculation on a CPU: vLLM verifies "
            "drafts there at a temperature that it never set, so the answer would be of no known distribution; use "
            "temperature 0, or turn generator.speculative_decoding.enabled off"
        )
    _check(attempt, vocab_size=vocab_size, max_model_len=max_model_len)
    return {
        "model": attempt.adapter or model,
        "prompt": list(attempt.token_ids),
        "request_id": attempt.wire_id,
        **_fields(sampling),
        # The sampled token's own log-probability and no other.
        "logprobs": 0,
        "return_token_ids": True,
        # Higher is first with us, lower is first there.
        **({"priority": -attempt.priority} if by_priority else {}),
    }


def _fields(sampling: SamplingParams) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": sampling.min_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": sampling.ignore_eos,
        # A stop string may be, or contain, a special token's text.
        "skip_special_tokens": False,
    }
    if sampling.seed is not None:
        fields["seed"] = sampling.seed
    if sampling.grammar is not None:
        fields["structured_outputs"] = _structured(sampling.grammar)
    return fields


def _structured(grammar: Grammar) -> dict[str, Any]:
    return {_GRAMMARS[grammar.kind]: grammar.text}


def _check(attempt: Attempt, *, vocab_size: int | None, max_model_len: int | None) -> None:
    sampling, name = attempt.sampling, f"request {attempt.wire_id}"
    if vocab_size is not None:
        outside = [token for token in attempt.token_ids if not 0 <= token < vocab_size]
        if outside:
            raise RequestRejected(
                f"{name}: token id {outside[0]} is outside the model's vocabulary of {vocab_size} "
                f"({len(outside)} such ids); were they encoded with another model's tokenizer?"
            )
    needed = len(attempt.token_ids) + sampling.max_new_tokens
    if max_model_len is not None and needed > max_model_len:
        raise RequestRejected(
            f"{name}: prompt and max_new_tokens need {len(attempt.token_ids)} + {sampling.max_new_tokens} = {needed} "
            f"tokens, the server has room for {max_model_len}; lower generator.sampling_params.max_generate_length "
            "or raise generator.max_model_len"
        )
    if 0 < sampling.temperature < LOWEST_TEMPERATURE:
        raise RequestRejected(
            f"{name}: temperature {sampling.temperature} is below {LOWEST_TEMPERATURE}, and vLLM would sample at "
            f"{LOWEST_TEMPERATURE}; use 0 (greedy) or at least {LOWEST_TEMPERATURE}"
        )
    if sampling.seed is not None and sampling.seed not in _SEED_RANGE:
        raise RequestRejected(f"{name}: seed {sampling.seed} is not in [-2**63, 2**63)")
