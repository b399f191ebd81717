"""What SGLang's answers to a refused call mean in our errors: once, for all calls.

Seen in 0.5.17 and 0.5.23: 400 `{"error": {"message": …}}` for what can never be served, 503 `{"message": …}` for a full
queue or a request that gave way to one of higher priority, 500 for what the server could not do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from skyrl_train.engines.server.client import ServerBusy
from skyrl_train.errors import EngineError, EngineUnavailable, RequestRejected


class SessionLost(RequestRejected):
    """The server has no such session, or no ended request of that name in it. The whole prompt can be sent instead."""


_SESSION = ("session id", "Session request is appending")
_TOO_LONG = ("context length", "maximum context", "maximum allowed length")
_NO_ROOM = "Out of memory even after retracting"

_ADVICE: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        _TOO_LONG,
        "lower generator.max_input_length or generator.sampling_params.max_generate_length, or raise "
        "generator.max_model_len",
    ),
    ((_NO_ROOM,), "raise generator.scheduling.max_total_tokens or generator.gpu_memory_utilization"),
    (("never been loaded", "LoRA is not enabled"), "load the adapter first (generator.lora)"),
    (("grammar",), "correct the request's grammar"),
)


def message_of(text: str) -> str:
    """The server's own words, out of any of its envelopes."""
    try:
        body: Any = json.loads(text)
    except ValueError:
        return text.strip() or "no message"
    for key in ("error", "message", "error_message", "detail"):
        if isinstance(body, Mapping) and body.get(key):
            found = body[key]
            return str(found["message"] if isinstance(found, Mapping) and "message" in found else found).strip()
    return text.strip()


def refusal(status: int, message: str, *, what: str) -> EngineError:
    """The error for an answer `status` to `what` ("sglang-0: request 5/2/0")."""
    said = f"{what}: SGLang answered {status}: {message}"
    advice = next((way for marks, way in _ADVICE if any(mark in message for mark in marks)), None)
    if advice is not None:
        said = f"{said}; {advice}"
    if status == 503:
        return ServerBusy(said)
    if _NO_ROOM in message:
        return RequestRejected(said)
    if status >= 500:
        return EngineUnavailable(said)
    if any(mark in message for mark in _SESSION):
        return SessionLost(said)
    return RequestRejected(said)
