"""Batches of prompts on their way: drawn in the stream's order, rolled out ahead of training, taken in the same order.

    stream ──► [batch t+2: running] [batch t+1: running] ──► batch t: taken, trained on
                └────── at most `num_ahead` ──────┘

Batches are taken in the order in which they were drawn, whatever finished first: no prompt is skipped, short answers
get no head start, and a batch that is taken was started at most `num_ahead` training steps ago. `state` at rest is all
of it, as tokens: finished trajectories, answers of unfinished ones, and the stream's position before the oldest batch.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skyrl_train.data.stream import PromptStream
from skyrl_train.engines.base import Engine, GenerateFn
from skyrl_train.errors import CheckpointError
from skyrl_train.rollout.agent import Agent
from skyrl_train.rollout.gate import Gate
from skyrl_train.rollout.groups import Rollouts, Run, group_runs, sort_out
from skyrl_train.rollout.journal import trajectory_from_json, trajectory_to_json
from skyrl_train.types import Prompt, SamplingParams, Trajectory, TrajectoryId

logger = logging.getLogger(__name__)

STATE_FILE = "rollouts.json"


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """What every trajectory of the run shares."""

    num_samples: int
    sampling: SamplingParams
    seed: int
    max_failed_frac: float
    greedy_baseline: bool = False


@dataclass(eq=False, kw_only=True)
class _Batch:
    prompts: list[Prompt]
    before: dict[str, Any]
    """The stream's state before this batch was drawn."""
    started_after: int
    """Training steps that were complete when it was drawn."""
    rows: list[list[asyncio.Task[Trajectory]]]
    num_unfinished: int


class RolloutPipeline:
    """Owns the batches in flight. Used between `advance` calls of one event loop; `close` cancels what runs.

    `max_in_flight` trajectories run at once, the oldest first. With `stop_at_batch` the gate shuts by itself once
    the batch in training and the next one are complete: a point that depends on tokens alone, never on the clock.
    """

    def __init__(
        self,
        make_agent: Callable[[Gate], Agent],
        engine: Engine,
        stream: PromptStream,
        settings: RolloutSettings,
        *,
        num_ahead: int,
        max_in_flight: int,
        stop_at_batch: bool,
        generate: GenerateFn | None = None,
    ) -> None:
        """`generate` None is the engine's own."""
        self._stream = stream
        self._settings = settings
        self._num_ahead = num_ahead
        self._max_in_flight = max_in_flight
        self._slots = asyncio.Semaphore(max_in_flight)
        self._stop_at_batch = stop_at_batch
        self._batches: deque[_Batch] = deque()
        self._taken: dict[str, _Batch] = {}
        self._num_started = 0
        self._num_unfinished = 0
        self._restored: dict[TrajectoryId, Trajectory] = {}
        self.gate = Gate(engine, num_expected=lambda: min(self._max_in_flight, self._num_unfinished), generate=generate)
        self._agent = make_agent(self.gate)

    @property
    def num_ahead(self) -> int:
        """Batches that are drawn and not taken."""
        return len(self._batches)

    async def advance(self, completed_steps: int, *, at_most: int | None = None) -> None:
        """Draw batches up to `num_ahead` + 1, the next one to be taken included, and open the gate.

        `at_most` bounds the batches: near the end of a run none is drawn that nobody will train on.
        """
        wanted = self._num_ahead + 1 if at_most is None else min(self._num_ahead + 1, at_most)
        while len(self._batches) < wanted:
            self._draw(completed_steps)
        await self.gate.rest()
        self.gate.open()

    def next_batch(self, completed_steps: int) -> list[Prompt]:
        """Take the oldest batch; a new one is drawn if none is there."""
        if not self._batches:
            self._draw(completed_steps)
        batch = self._batches.popleft()
        self._taken = {prompt.prompt_id: batch for prompt in batch.prompts}
        return list(batch.prompts)

    async def roll_out(self, prompts: Sequence[Prompt]) -> Rollouts:
        """The finished groups of prompts that `next_batch` gave last."""
        batch = self._taken[prompts[0].prompt_id]
        # Also for the batch that comes next: it may have been shut out when this one was not yet taken.
        following = self._batches[0].num_unfinished if self._batches else 0
        if (batch.num_unfinished or following) and not self.gate.is_open:
            await self.gate.rest()
            self.gate.open()
        wanted = {prompt.prompt_id for prompt in prompts}
        rows = [(p, row) for p, row in zip(batch.prompts, batch.rows, strict=True) if p.prompt_id in wanted]
        tasks = [task for _, row in rows for task in row]
        # Whoever fails first ends the wait: an engine's failure is everybody's.
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        await self._stop_if_due()
        return sort_out([(p, [task.result() for task in row]) for p, row in rows], self._settings.max_failed_frac)

    def staleness(self, prompts: Sequence[Prompt], completed_steps: int) -> int:
        """Training steps between the start of this batch and the one that takes it."""
        return completed_steps - self._taken[prompts[0].prompt_id].started_after

    async def next_is_complete(self) -> None:
        """Returns when the batch to be taken next is complete, at once if none is on its way."""
        if self._batches:
            await asyncio.wait([task for row in self._batches[0].rows for task in row])

    async def close(self) -> None:
        """Cancel what runs. What was sampled and not trained on is in the last checkpoint."""
        tasks = [task for batch in (*self._batches, *self._taken.values()) for row in batch.rows for task in row]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- state

    def stream_state(self) -> dict[str, Any]:
        """The data position: that before the oldest batch which was not taken."""
        return self._batches[0].before if self._batches else self._stream.state_dict()

    def save(self, folder: Path) -> None:
        """At rest only."""
        batches = [
            {
                "started_after": batch.started_after,
                "prompts": [self._fingerprint(prompt) for prompt in batch.prompts],
                "finished": [trajectory_to_json(t.result()) for row in batch.rows for t in row if _is_finished(t)],
            }
            for batch in self._batches
        ]
        (folder / STATE_FILE).write_text(json.dumps({"batches": batches, "gate": self.gate.state()}))

    def load(self, folder: Path, completed_steps: int) -> None:
        """Before the first `advance`; the stream stands where `stream_state` said.

        Batches that this run's bound would let become too stale are rolled out anew. Raises CheckpointError where the
        data is not what it was.
        """
        state: Mapping[str, Any] = json.loads((folder / STATE_FILE).read_text())
        fresh_enough = [
            saved
            for place, saved in enumerate(state["batches"])
            if place <= self._num_ahead and completed_steps + place - saved["started_after"] <= self._num_ahead
        ]
        if len(fresh_enough) < len(state["batches"]):
            fresh_enough = fresh_enough[: _num_leading(fresh_enough, state["batches"])]
            logger.warning(
                "%d of %d batches that were on their way are rolled out anew: trainer.fully_async.max_staleness_steps "
                "is %d now",
                len(state["batches"]) - len(fresh_enough),
                len(state["batches"]),
                self._num_ahead,
            )
        for saved in fresh_enough:
            trajectories = [trajectory_from_json(row) for row in saved["finished"]]
            self._restored = {trajectory.id: trajectory for trajectory in trajectories}
            prompts = self._draw(saved["started_after"], recorded=state["gate"]).prompts
            for prompt, was in zip(prompts, saved["prompts"], strict=False):
                if (now := self._fingerprint(prompt)) != was:
                    raise CheckpointError(
                        f"{folder} holds rollouts of prompt {was['id']} ({was['digest']}), the data gives {now['id']} "
                        f"({now['digest']}): the data or its chat template changed since; "
                        "trainer.resume_mode=none starts anew"
                    )
        self._restored = {}

    def _fingerprint(self, prompt: Prompt) -> dict[str, str]:
        """Tells another prompt, or the same row with other words or another answer to compare with."""
        return {
            "id": prompt.prompt_id,
            "digest": hashlib.blake2b(
                repr((self._agent.render(prompt), prompt.environment, prompt.target)).encode(), digest_size=8
            ).hexdigest(),
        }

    # -- trajectories

    def _draw(self, completed_steps: int, recorded: Sequence[Mapping[str, Any]] = ()) -> _Batch:
        """`recorded` is what the gate knew of this batch's trajectories in an earlier process."""
        before = self._stream.state_dict()
        batch = _Batch(
            prompts=self._stream.next_batch(),
            before=before,
            started_after=completed_steps,
            rows=[],
            num_unfinished=0,
        )
        keys = self._settings
        groups = [
            group_runs(
                self._agent,
                prompt,
                keys.num_samples,
                keys.sampling,
                keys.seed,
                greedy_baseline=keys.greedy_baseline,
            )
            for prompt in batch.prompts
        ]
        if recorded:
            self.gate.load(recorded, {str(trajectory_id) for runs in groups for trajectory_id, _ in runs})
        for runs in groups:
            batch.rows.append([self._start(batch, trajectory_id, run) for trajectory_id, run in runs])
        self._batches.append(batch)
        return batch

    def _start(self, batch: _Batch, trajectory_id: TrajectoryId, run: Run) -> asyncio.Task[Trajectory]:
        number = self._num_started
        self._num_started += 1
        loop = asyncio.get_running_loop()
        finished = self._restored.get(trajectory_id)
        if finished is not None:
            return loop.create_task(_answered(finished))
        batch.num_unfinished += 1
        self._num_unfinished += 1
        return loop.create_task(self._run(batch, number, trajectory_id, run), name=f"trajectory {trajectory_id}")

    async def _run(self, batch: _Batch, number: int, trajectory_id: TrajectoryId, run: Run) -> Trajectory:
        try:
            async with self._slots:
                with self.gate.trajectory(number, str(trajectory_id)):
                    trajectory = await run()
        finally:
            self._num_unfinished -= 1
            batch.num_unfinished -= 1
            self.gate.count_again()
        await self._stop_if_due()
        return trajectory

    async def _stop_if_due(self) -> None:
        """Both the batch in training and the next one are there: the next update lands here, however long it takes."""
        following = self._batches[0].num_unfinished if self._batches else 0
        if self._stop_at_batch and not following and not any(b.num_unfinished for b in self._taken.values()):
            await self.gate.shut()


def _num_leading(kept: Sequence[Any], all_of_them: Sequence[Any]) -> int:
    """How many of `kept` are the first of `all_of_them`: what comes after a gap is no longer in the stream's order."""
    return next((i for i, (a, b) in enumerate(zip(kept, all_of_them, strict=False)) if a is not b), len(kept))


def _is_finished(task: asyncio.Task[Trajectory]) -> bool:
    """What failed counts as unfinished: whoever takes the batch will meet the failure."""
    return task.done() and not task.cancelled() and task.exception() is None


async def _answered(trajectory: Trajectory) -> Trajectory:
    return trajectory
