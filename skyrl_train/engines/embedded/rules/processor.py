"""The user's own function on the logits, named by its dotted path.

    def name(logits, prompt, answer, **arguments) -> None

`logits` [V] float32 on the CPU, of the answer's next token: to be changed in place. `prompt` and `answer` are the
token ids so far. It is called once a token and keeps nothing: what it knows is what it is given, so a request that was
retracted or goes on from an earlier part is nothing special to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from skyrl_train.errors import ConfigError
from skyrl_train.extension import load_object
from skyrl_train.types import LogitProcessor

_WANTED = "logit processor"


class LogitProcessorFailed(RuntimeError):
    """The user's function raised, or left no token; which request and token, and the function's own error as cause."""


def find_processor(named: LogitProcessor) -> Callable[..., Any]:
    """The function. Raises ConfigError where it can't be imported, or called with these arguments."""
    function = load_object(named.path, wanted=_WANTED)
    if not callable(function):
        raise ConfigError(f"{_WANTED} {named.path!r} is {type(function).__name__}, not a function")
    wanted = "write it as def name(logits, prompt, answer, **arguments)"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"{_WANTED} {named.path!r} shows no parameters; {wanted}") from exc
    try:
        signature.bind(None, (), (), **named.arguments)
    except TypeError as exc:
        raise ConfigError(
            f"{_WANTED} {named.path!r} takes {signature}, which does not go with the arguments "
            f"{dict(named.arguments)}: {exc}; {wanted}"
        ) from exc
    result: Callable[..., Any] = function
    return result


class Processor:
    """One request's use of it. `answer` grows with the tokens that are taken."""

    def __init__(self, request_id: str, named: LogitProcessor, prompt: Sequence[int]) -> None:
        self.answer: list[int] = []
        self._request_id = request_id
        self._named = named
        self._prompt = tuple(prompt)
        self._function = find_processor(named)

    def change(self, logits: torch.Tensor) -> None:
        """The logits [V] of the next token, in place. Raises LogitProcessorFailed."""
        where = self._where()
        try:
            result = self._function(logits, self._prompt, tuple(self.answer), **self._named.arguments)
        except Exception as exc:  # whatever the user's function raises
            raise LogitProcessorFailed(f"{where}: {type(exc).__name__}: {exc}") from exc
        if result is not None and result is not logits:
            raise LogitProcessorFailed(
                f"{where} returned {type(result).__name__}: change the logits in place, and return nothing"
            )
        best = logits.max()
        if not torch.isfinite(best):
            raise LogitProcessorFailed(
                f"{where} left {best.item()} as the greatest logit: one token at least must stay possible, and none "
                "be infinite or not a number"
            )

    def left_nothing_of_the_grammar(self) -> LogitProcessorFailed:
        return LogitProcessorFailed(f"{self._where()} left no token of those that the grammar allows")

    def _where(self) -> str:
        return f"{_WANTED} {self._named.path!r} at token {len(self.answer)} of the answer to request {self._request_id}"
