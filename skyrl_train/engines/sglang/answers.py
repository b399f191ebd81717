"""SGLang's answers to /generate as attempt results.

Ids and log-probabilities are the pairs of `output_token_logprobs`, `[log-probability, id, null]`: the end token, a
stop id and all tokens of a stop string are among them (seen in 0.5.23 and in the source of 0.5.17), whatever the
text shows. JSON has no infinity: such a log-probability comes as null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from skyrl_train.engines.server.client import AttemptResult, WireSpan
from skyrl_train.engines.sglang.errors import refusal
from skyrl_train.errors import EngineError, EngineUnavailable
from skyrl_train.types import FinishReason

NOT_A_NUMBER = "NaN happened"
"""How SGLang ends an answer whose logits were no numbers: as if a stop string of this text had been met."""


def attempt_result(
    answer: Mapping[str, Any],
    *,
    what: str,
    stop_token_ids: Sequence[int] = (),
    stop: Sequence[str] = (),
    cut_at: frozenset[int] = frozenset(),
    with_spans: bool = True,
) -> AttemptResult:
    """`cut_at`: ids at which the answer ends here. Raises EngineError for an answer that is none."""
    meta = answer["meta_info"]
    finish = meta["finish_reason"]
    kind: FinishReason = finish["type"]
    matched = finish.get("matched")
    if kind == "abort" and finish.get("status_code") is not None:
        raise refusal(int(finish["status_code"]), str(finish.get("message")), what=what)
    if matched == NOT_A_NUMBER and NOT_A_NUMBER not in stop:
        raise EngineUnavailable(f"{what}: SGLang's logits are no numbers (NaN); its weights or its kernels are broken")
    if kind not in ("stop", "length", "abort"):
        raise EngineError(f"{what}: SGLang ended it with {finish}; stop, length and abort are known")

    pairs = meta.get("output_token_logprobs")
    if pairs is None:
        raise EngineError(f"{what}: SGLang's answer has no output_token_logprobs")
    logprobs: tuple[float, ...]
    token_ids: tuple[int, ...]
    logprobs, token_ids, _ = zip(*pairs, strict=True) if pairs else ((), (), ())
    if len(answer["output_ids"]) != len(token_ids):
        raise EngineError(
            f"{what}: SGLang's answer has {len(answer['output_ids'])} ids and {len(token_ids)} log-probabilities"
        )
    if None in logprobs:
        raise EngineError(f"{what}: the log-probability of token {logprobs.index(None)} is not finite")

    stop_reason: str | int | None = None
    if kind == "stop" and (isinstance(matched, str) or matched in stop_token_ids):
        stop_reason = matched
    if cut_at and not cut_at.isdisjoint(token_ids):
        end = next(index for index, token in enumerate(token_ids) if token in cut_at) + 1
        logprobs, token_ids = logprobs[:end], token_ids[:end]
        kind, stop_reason = "stop", token_ids[-1]
    return AttemptResult(
        token_ids=token_ids,
        logprobs=logprobs,
        finish_reason=kind,
        stop_reason=stop_reason,
        num_cached_tokens=meta.get("cached_tokens") or 0,
        spans=_spans(meta.get("weight_versions"), len(token_ids)) if with_spans else None,
    )


def prompt_logprobs(answer: Mapping[str, Any], *, what: str) -> tuple[float, ...]:
    """[L - 1]: those of the prompt's tokens but the first, of an answer asked for with logprob_start_len 0."""
    pairs = answer["meta_info"].get("input_token_logprobs") or []
    values = tuple(pair[0] for pair in pairs[1:])
    if not pairs or None in values:
        raise EngineError(f"{what}: of {len(pairs)} log-probabilities of the prompt some are missing or no number")
    return values


def _spans(versions: Sequence[Mapping[str, Any]] | None, length: int) -> tuple[WireSpan, ...] | None:
    """Up to `length` tokens; None where the release has none."""
    if versions is None:
        return None
    return tuple(
        WireSpan(version=str(span["version"]), start=span["start"], end=min(span["end"], length))
        for span in versions
        if span["start"] < min(span["end"], length)
    )
