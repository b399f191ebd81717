"""A completion's JSON as an AttemptResult, and a refusal as one of our errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from skyrl_train.engines.server.client import AttemptResult, ServerBusy
from skyrl_train.errors import EngineError, EngineUnavailable, RequestRejected
from skyrl_train.types import FinishReason

Decode = Callable[[Sequence[int]], str]

_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}
_BUSY = (429, 503)


def attempt_result(body: Mapping[str, Any], *, wire_id: str, decode: Decode | None) -> AttemptResult:
    """What one completion made. With `decode`, tokens after the one that completed a stop string are cut off: with
    speculation, vLLM 0.26 leaves them in the ids. Raises EngineUnavailable when the answer isn't one.
    """
    try:
        (choice,) = body["choices"]
        token_ids, finish = list(choice["token_ids"]), choice["finish_reason"]
        logprobs = list(choice["logprobs"]["token_logprobs"]) if token_ids else []
        details = (body.get("usage") or {}).get("prompt_tokens_details") or {}
    except (KeyError, TypeError, ValueError) as exc:
        raise EngineUnavailable(f"request {wire_id}: vLLM's answer lacks a field ({exc!r})") from exc
    if finish not in _FINISH or len(logprobs) != len(token_ids) or any(value is None for value in logprobs):
        raise EngineUnavailable(
            f"request {wire_id}: vLLM answered with finish_reason {finish!r}, {len(token_ids)} tokens and "
            f"{len(logprobs)} log-probabilities"
        )
    stop_reason = choice.get("stop_reason")
    if isinstance(stop_reason, str) and decode is not None:
        kept = completed_at(token_ids, stop_reason, decode)
        token_ids, logprobs = token_ids[:kept], logprobs[:kept]
    return AttemptResult(
        token_ids=tuple(token_ids),
        logprobs=tuple(logprobs),
        finish_reason=_FINISH[finish],
        stop_reason=stop_reason,
        num_cached_tokens=int(details.get("cached_tokens") or 0),
    )


def completed_at(token_ids: Sequence[int], stop: str, decode: Decode) -> int:
    """How many tokens it takes until the text holds `stop`; all of them where it can't be found.

    Example: ids of "a", "b END", " c", stop "END": 2.
    """
    kept = len(token_ids)
    while kept > 1 and stop in decode(token_ids[: kept - 1]):
        kept -= 1
    return kept


def refusal(status: int, text: str, *, what: str) -> EngineError:
    """The error for an answer that isn't 200: 4xx is the request's fault, the rest the server's."""
    message = f"{what}: vLLM answered {status}: {_message(text)}"
    if status in _BUSY:
        return ServerBusy(message)
    if 400 <= status < 500:
        return RequestRejected(message)
    return EngineUnavailable(message)


def _message(text: str) -> str:
    """The message of {"error": {"message": ...}}, {"error": ...} or {"detail": ...}; else the text's first line."""
    try:
        body = json.loads(text)
    except ValueError:
        return (text.strip().splitlines() or ["no text"])[0][:500]
    found: Any = body
    if isinstance(body, dict):
        found = body.get("error", body.get("detail", body))
    if isinstance(found, dict):
        found = found.get("message", found)
    return str(found)[:500]
