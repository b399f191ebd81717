"""What a contract test sees of a backend: its engine, the model that it serves, and how to give it another."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from skyrl_train.engines.base import Capability, Engine
from skyrl_train.errors import RequestRejected
from skyrl_train.types import Completion, GenerateRequest, NamedWeights, WeightUpdate
from skyrl_train.weight_sync.sync import sync_weights
from tests.contract.asking import LIMIT, reference_rows

SAYS_NO, NO_SERVER = "says it can't", "has no server"


@dataclass(kw_only=True)
class UnderTest:
    """One running engine. `reference` is transformers' own copy of what it serves when a test begins."""

    backend: str
    release: str
    setting: str
    engine: Engine
    reference: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    folder: Path
    server_pid: Callable[[], int] | None = None
    version: int = 0

    def update_to(self, model: PreTrainedModel) -> WeightUpdate:
        """All weights of `model`, as the next version."""
        self.version += 1
        return WeightUpdate(version=self.version, source=NamedWeights(tensors=model.state_dict()))

    @asynccontextmanager
    async def serving(self, model: PreTrainedModel) -> AsyncIterator[None]:
        """Another model for a while."""
        await sync_weights(self.engine, self.update_to(model))
        try:
            yield
        finally:
            await self.restore()

    async def restore(self) -> None:
        await sync_weights(self.engine, self.update_to(self.reference))

    async def check_at_rest(self) -> None:
        """What each test must leave behind."""
        stats = await self.engine.stats()
        assert not stats.paused
        assert stats.num_sessions == 0, "a session is still open"
        assert stats.num_running == stats.num_waiting == 0, "requests still run"


@dataclass(kw_only=True)
class Refused:
    """The backend can't be started so, and its configuration said why before anything started."""

    backend: str
    release: str
    setting: str
    message: str


@dataclass(kw_only=True)
class Case:
    """One test on one backend."""

    on: UnderTest | Refused
    node: pytest.Item

    @property
    def started(self) -> UnderTest:
        assert isinstance(self.on, UnderTest), f"{self.on.backend} was refused: {self.on.message}"
        return self.on

    @property
    def engine(self) -> Engine:
        return self.started.engine

    @property
    def reference(self) -> PreTrainedModel:
        return self.started.reference

    def is_refused(self) -> bool:
        """Whether the configuration refused this setting; such a test ends there."""
        if isinstance(self.on, Refused):
            self.says_no(NO_SERVER if self.on.message == NO_SERVER else SAYS_NO)
            return True
        return False

    def says_no(self, value: str = SAYS_NO) -> None:
        """The engine says that it has no such capability: that is what the table will show."""
        self.node.user_properties.append(("contract", value))

    async def can(self, capability: Capability, *refused: GenerateRequest) -> bool:
        """Whether the engine has it. One that hasn't must refuse these requests; the test ends there."""
        if capability in self.engine.info.capabilities:
            return True
        for request in refused:
            with pytest.raises(RequestRejected):
                await self.engine.generate(request)
        self.says_no()
        return False

    async def answers(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        import asyncio

        return list(await asyncio.gather(*(self.engine.generate(request) for request in requests)))


def same_numbers(model: PreTrainedModel, prompt: Sequence[int], answer: Completion) -> bool:
    """Whether the log-probabilities are this model's."""
    rows = reference_rows(model, prompt, answer.token_ids)
    return all(
        abs(rows[place, token].item() - logprob) < LIMIT
        for place, (token, logprob) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True))
    )
