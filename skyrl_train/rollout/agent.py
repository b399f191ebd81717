"""One trajectory: prompt in, completion out, environment answers, and so on until it is over.

    init ──► prompt ──► generate ──► step ──► done, cut off, or too long ──► close
               ▲                      │
               └── + observations ◄───┘

Token-in, token-out: what is trained on are the ids that the engine sampled, and the next turn's prompt begins with
them; text is made only for the environment.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import math
import traceback
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from skyrl_train.data.chat import response_text
from skyrl_train.engines.base import GenerateFn
from skyrl_train.environments.base import EnvironmentFactory
from skyrl_train.errors import EngineError, EnvironmentsStuck
from skyrl_train.rollout.chat_turns import ChatHistory, ChatTurns
from skyrl_train.rollout.environment_pool import EnvironmentPool
from skyrl_train.rollout.hosted_environment import HostedEnvironment, numbers
from skyrl_train.rollout.sessions import Sessions
from skyrl_train.types import (
    GenerateRequest,
    Message,
    Prompt,
    SamplingParams,
    SessionRef,
    Trajectory,
    TrajectoryId,
    TrajectoryStatus,
    Turn,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Agent:
    """Runs trajectories of one policy: what all of them share.

    A trajectory has at most `max_turns` answers and no prompt of more than `max_input_length` tokens, history included;
    one that either bound ends, or the length of an answer, is "truncated". `pool` None runs environments on the event
    loop, with no deadline. With `sessions` each trajectory has one, and `generate` is, or leads to, theirs.
    `later_turns_first` gives a turn's request its number as priority: what is nearly done ends first, and its history
    is still in the cache.
    """

    generate: GenerateFn
    tokenizer: Any
    environments: Mapping[str, EnvironmentFactory]
    environment_config: Any = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    max_turns: int = 1
    max_input_length: int | None = None
    use_conversation_multi_turn: bool = True
    chat_history: ChatHistory = "exact"
    pool: EnvironmentPool | None = None
    sessions: Sessions | None = None
    later_turns_first: bool = False

    @functools.cached_property
    def chat(self) -> ChatTurns:
        """Messages to prompts, by the tokenizer's chat template."""
        return ChatTurns(
            tokenizer=self.tokenizer,
            template_kwargs=self.chat_template_kwargs or {},
            conversation=self.use_conversation_multi_turn,
            history=self.chat_history,
        )

    def render(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt's tokens; once for a group."""
        return self.chat.first(prompt.messages)

    async def run(
        self, trajectory_id: TrajectoryId, prompt: Prompt, prompt_token_ids: tuple[int, ...], sampling: SamplingParams
    ) -> Trajectory:
        """One trajectory. An environment that raises, or is late, fails this trajectory alone; what ends the run for
        all passes on: an engine's failure, and a pool with no worker left.
        """
        made = _Made()
        try:
            environment = HostedEnvironment(
                f"trajectory {trajectory_id}, environment {prompt.environment!r}",
                self.environments[prompt.environment],
                env_config=self.environment_config,
                # Under this name skyrl-gym's environments look for their bound; a row's own goes first.
                extras={"max_turns": self.max_turns, **prompt.extras},
                pool=self.pool,
            )
            try:
                async with nullcontext() if self.sessions is None else self.sessions.one() as session:
                    status = await self._converse(
                        trajectory_id, prompt, prompt_token_ids, sampling, environment, session, made
                    )
                made.metrics.update(await environment.finish())
            except BaseException:
                await environment.abandon()
                raise
        except (EngineError, EnvironmentsStuck, asyncio.CancelledError):
            raise
        except Exception as exc:  # one trajectory is the boundary: it is logged here and counted by the caller
            at = traceback.extract_tb(exc.__traceback__)[-1]
            error = f"{type(exc).__name__}: {exc} (at {at.filename}:{at.lineno})"
            logger.warning("trajectory %s failed in environment %r: %s", trajectory_id, prompt.environment, error)
            rewards = [*made.rewards, *[0.0] * (len(made.turns) - len(made.rewards))]
            return Trajectory(
                id=trajectory_id, turns=tuple(made.turns), rewards=tuple(rewards), status="failed", error=error
            )
        return Trajectory(
            id=trajectory_id,
            turns=tuple(made.turns),
            rewards=tuple(made.rewards),
            status=status,
            metrics=made.metrics,
        )

    async def _converse(
        self,
        trajectory_id: TrajectoryId,
        prompt: Prompt,
        prompt_token_ids: tuple[int, ...],
        sampling: SamplingParams,
        environment: HostedEnvironment,
        session: SessionRef | None,
        made: _Made,
    ) -> TrajectoryStatus:
        messages: list[Message] = list(await environment.init(prompt.messages))
        if tuple(messages) != prompt.messages:
            prompt_token_ids = self.chat.first(messages)
            if not self._fits(prompt_token_ids):
                raise ValueError(
                    f"init wrote a prompt of {len(prompt_token_ids)} tokens; generator.max_input_length is "
                    f"{self.max_input_length}"
                )
        while True:
            turn = len(made.turns)
            completion = await self.generate(
                GenerateRequest(
                    request_id=request_id(trajectory_id, turn),
                    prompt_token_ids=prompt_token_ids,
                    sampling=turn_sampling(sampling, turn),
                    session=session,
                    priority=turn if self.later_turns_first else 0,
                )
            )
            made.turns.append(Turn(prompt_token_ids=prompt_token_ids, completion=completion))
            answer = response_text(self.tokenizer, completion.token_ids)
            output = await environment.step(answer)
            made.rewards.append(finite(output["reward"]))
            made.metrics.update(numbers(output.get("metadata")))
            if completion.finish_reason != "stop":
                return "truncated" if completion.finish_reason == "length" else "aborted"
            if output["done"]:
                return "completed"
            if len(made.turns) == self.max_turns:
                return "truncated"
            observations = list(output["observations"])
            rewritten = output.get("postprocessed_action")
            edited = rewritten if isinstance(rewritten, str) and rewritten != answer else None
            messages += [{"role": "assistant", "content": answer if edited is None else edited}, *observations]
            prompt_token_ids = self.chat.following(
                prompt_token_ids, completion.token_ids, observations, messages=messages, edited=edited
            )
            if not self._fits(prompt_token_ids):
                return "truncated"

    def _fits(self, prompt_token_ids: tuple[int, ...]) -> bool:
        return self.max_input_length is None or len(prompt_token_ids) <= self.max_input_length


@dataclass
class _Made:
    """A trajectory on its way."""

    turns: list[Turn] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


def request_id(trajectory_id: TrajectoryId, turn: int) -> str:
    """The name of a turn's request, by which its completion can be found again: `7/2/0`, then `7/2/0/t1`."""
    return f"{trajectory_id}/t{turn}" if turn else str(trajectory_id)


def request_seed(run_seed: int, trajectory_id: TrajectoryId) -> int:
    """A sampling seed in [0, 2**63) that depends on the run's seed and the trajectory's name alone.

    So a resumed run samples what the uninterrupted one would have, with no generator state to save.
    """
    return _hashed(f"{run_seed}/{trajectory_id}")


def with_seed(sampling: SamplingParams, run_seed: int, trajectory_id: TrajectoryId) -> SamplingParams:
    """`sampling` for one trajectory; a greedy request needs no seed."""
    if sampling.temperature == 0:
        return sampling
    return replace(sampling, seed=request_seed(run_seed, trajectory_id))


def turn_sampling(sampling: SamplingParams, turn: int) -> SamplingParams:
    """`sampling` for a turn of the trajectory whose first turn it is for: later ones have seeds of their own."""
    if turn == 0 or sampling.seed is None:
        return sampling
    return replace(sampling, seed=_hashed(f"{sampling.seed}/t{turn}"))


def _hashed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def finite(reward: Any) -> float:
    """A reward that can be trained on. Raises ValueError."""
    number = float(reward)
    if not math.isfinite(number):
        raise ValueError(f"step returned reward {reward!r}; a finite number is wanted")
    return number
