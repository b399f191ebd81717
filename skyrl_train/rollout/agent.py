"""One trajectory: prompt in, completion out, environment scores it.

Token-in, token-out: what is trained on are the ids that the engine sampled; text is made only for the environment.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from skyrl_train.data.chat import render_prompt, response_text
from skyrl_train.engines.base import GenerateFn
from skyrl_train.environments.base import EnvironmentFactory
from skyrl_train.errors import EngineError
from skyrl_train.types import (
    GenerateRequest,
    Prompt,
    SamplingParams,
    Trajectory,
    TrajectoryId,
    TrajectoryStatus,
    Turn,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Agent:
    """Runs trajectories of one policy: what all of them share.

    Single turn: the trajectory is over after the first step, whatever the environment says.
    """

    generate: GenerateFn
    tokenizer: Any
    environments: Mapping[str, EnvironmentFactory]
    environment_config: Any = None
    chat_template_kwargs: Mapping[str, Any] | None = None

    def render(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt's tokens; once for a group."""
        return render_prompt(self.tokenizer, prompt.messages, template_kwargs=dict(self.chat_template_kwargs or {}))

    async def run(
        self, trajectory_id: TrajectoryId, prompt: Prompt, prompt_token_ids: tuple[int, ...], sampling: SamplingParams
    ) -> Trajectory:
        """One trajectory. An environment that raises fails this trajectory alone; an engine's failure passes on."""
        turns: list[Turn] = []
        rewards: list[float] = []
        try:
            factory = self.environments[prompt.environment]
            environment = factory(env_config=self.environment_config, extras=dict(prompt.extras))
            try:
                messages, _ = environment.init(list(prompt.messages))
                if tuple(messages) != prompt.messages:
                    prompt_token_ids = render_prompt(
                        self.tokenizer, messages, template_kwargs=dict(self.chat_template_kwargs or {})
                    )
                completion = await self.generate(
                    GenerateRequest(request_id=str(trajectory_id), prompt_token_ids=prompt_token_ids, sampling=sampling)
                )
                turns.append(Turn(prompt_token_ids=prompt_token_ids, completion=completion))
                output = environment.step(response_text(self.tokenizer, completion.token_ids))
                rewards.append(float(output["reward"]))
            finally:
                environment.close()
        except (EngineError, asyncio.CancelledError):
            raise
        except Exception as exc:  # one trajectory is the boundary: it is logged here and counted by the caller
            at = traceback.extract_tb(exc.__traceback__)[-1]
            error = f"{type(exc).__name__}: {exc} (at {at.filename}:{at.lineno})"
            logger.warning("trajectory %s failed in environment %r: %s", trajectory_id, prompt.environment, error)
            rewards += [0.0] * (len(turns) - len(rewards))
            return Trajectory(
                id=trajectory_id,
                turns=tuple(turns),
                rewards=tuple(rewards),
                status="failed",
                error=error,
            )
        return Trajectory(id=trajectory_id, turns=tuple(turns), rewards=tuple(rewards), status=_status(turns[-1]))


def request_seed(run_seed: int, trajectory_id: TrajectoryId) -> int:
    """A sampling seed in [0, 2**63) that depends on the run's seed and the trajectory's name alone.

    So a resumed run samples what the uninterrupted one would have, with no generator state to save.
    """
    digest = hashlib.blake2b(f"{run_seed}/{trajectory_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def with_seed(sampling: SamplingParams, run_seed: int, trajectory_id: TrajectoryId) -> SamplingParams:
    """`sampling` for one trajectory; a greedy request needs no seed."""
    if sampling.temperature == 0:
        return sampling
    return replace(sampling, seed=request_seed(run_seed, trajectory_id))


def _status(turn: Turn) -> TrajectoryStatus:
    reason = turn.completion.finish_reason
    return {"stop": "completed", "length": "truncated", "abort": "aborted"}[reason]  # type: ignore[return-value]
