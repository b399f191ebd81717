"""What the endpoint asks of an engine: `Engine`, and pieces of an answer where the engine can give them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from skyrl_train.engines.base import Engine
from skyrl_train.types import Completion, GenerateRequest


class TokenPiece(Protocol):
    """What a request gained since the last piece; only the last one has the whole completion."""

    @property
    def token_ids(self) -> tuple[int, ...]: ...

    @property
    def logprobs(self) -> tuple[float, ...]: ...

    @property
    def completion(self) -> Completion | None: ...


@runtime_checkable
class StreamingEngine(Engine, Protocol):
    """An engine that shows an answer while it grows."""

    def stream(self, request: GenerateRequest) -> AsyncGenerator[TokenPiece, None]:
        """As `generate`, in pieces. Closing the generator aborts the request and frees what it held."""
        ...


@dataclass(frozen=True, kw_only=True)
class WholeAnswer:
    """A completion as its own and only piece."""

    completion: Completion

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.completion.token_ids

    @property
    def logprobs(self) -> tuple[float, ...]:
        return self.completion.logprobs
