"""Rollouts on disk, for people to read: `rollouts/step_000010.jsonl`, one trajectory a line.

    {"step": 10, "kind": "train", "trajectory_id": "7/2/0", "environment": "arithmetic", "target": "19",
     "prompt": [{"role": "user", "content": "12+7="}], "response": "19", "reward": 1.0, "advantage": 0.5,
     "status": "completed", "error": null, "finish_reason": "stop", "num_response_tokens": 3,
     "versions": [{"version": 9, "start": 0, "end": 3}],
     "turns": [{"observation": null, "response": "19", "reward": 1.0, "finish_reason": "stop",
                "num_cached_tokens": 0, "versions": [...],
                "tokens": ["1", "9", "<end>"], "token_ids": [20, 28, 1], "logprobs": [-0.1, -0.3, 0.0]}]}

`response` is the model's text over all turns; `observation` is what stood between the previous turn and this
one, null where nothing did. `versions` count tokens over all turns. Evaluations go to `eval_000010.jsonl`.

What is kept: every `every_steps`-th step, the first step and the last; of each, whole groups in the batch's order
until `max_trajectories` are reached (at least one group), and every failed trajectory (its `prompt` is null).
Nothing is drawn at random: the same run writes the same files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from skyrl_train.observability.files import replace_file
from skyrl_train.observability.live_view import Sample
from skyrl_train.types import Prompt, ScoredGroup, Trajectory, TrajectoryId, Turn, VersionSpan

Decode = Callable[[Sequence[int]], str]
RolloutKind = Literal["train", "eval"]
_PREFIX: Mapping[RolloutKind, str] = {"train": "step", "eval": "eval"}
_NAME = re.compile(r"(step|eval)_(\d{6,})\.jsonl")


class RolloutLog:
    """Writes the rollouts of a step into `folder`; a file appears whole or not at all.

    `decode` turns token ids into text, special tokens included. `resume_step` is the last step to keep of an
    earlier run in this folder: later files are removed (all of them when it is None).
    """

    def __init__(
        self,
        folder: Path | str,
        decode: Decode,
        *,
        resume_step: int | None = None,
        total_steps: int | None = None,
        every_steps: int = 1,
        max_trajectories: int = 64,
        tokens: bool = True,
    ) -> None:
        if every_steps < 1 or max_trajectories < 1:
            raise ValueError(f"every_steps and max_trajectories must be >= 1, found {every_steps}, {max_trajectories}")
        self.folder = Path(folder)
        self._decode = decode
        self._total_steps = total_steps
        self._every_steps = every_steps
        self._max_trajectories = max_trajectories
        self._tokens = tokens
        self._token_text: dict[int, str] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        for _, step, path in rollout_files(self.folder):
            if resume_step is None or step > resume_step:
                path.unlink()

    def keeps(self, step: int) -> bool:
        """Whether training rollouts of this step are written."""
        return step % self._every_steps == 0 or step in {1, self._total_steps}

    def write(
        self,
        step: int,
        groups: Sequence[ScoredGroup],
        *,
        failed: Sequence[Trajectory] = (),
        advantages: Mapping[TrajectoryId, float] | None = None,
        kind: RolloutKind = "train",
    ) -> Path | None:
        """The file written, or None where the rule above skips this step.

        `failed` trajectories stand in no group: they come last, with their turns so far and their error.
        `advantages` has one number a trajectory.
        """
        if kind == "train" and not self.keeps(step):
            return None
        lines = []
        kept: list[tuple[Prompt | None, Trajectory, float | None]] = [*_kept(groups, self._max_trajectories)]
        kept += [(None, trajectory, None) for trajectory in failed]
        for prompt, trajectory, reward in kept:
            advantage = None if advantages is None else advantages.get(trajectory.id)
            record = self.record(step, prompt, trajectory, reward=reward, advantage=advantage, kind=kind)
            lines.append(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        path = self.folder / f"{_PREFIX[kind]}_{step:06d}.jsonl"
        # Half of an emoji, as byte-level tokens can leave it, is no UTF-8: written as an escape, not an error.
        replace_file(path, "".join(lines).encode("utf-8", errors="backslashreplace"))
        return path

    def record(
        self,
        step: int,
        prompt: Prompt | None,
        trajectory: Trajectory,
        *,
        reward: float | None,
        advantage: float | None = None,
        kind: RolloutKind = "train",
    ) -> dict[str, Any]:
        """One line, as the module's text shows it."""
        turns = []
        before: tuple[int, ...] | None = None
        for turn, turn_reward in zip(trajectory.turns, trajectory.rewards, strict=True):
            turns.append(self._turn(turn, turn_reward, before))
            before = turn.prompt_token_ids + turn.completion.token_ids
        return {
            "step": step,
            "kind": kind,
            "trajectory_id": str(trajectory.id),
            "environment": prompt.environment if prompt else None,
            "target": _jsonable(prompt.target) if prompt else None,
            "prompt": [_jsonable(message) for message in prompt.messages] if prompt else None,
            "response": "".join(turn["response"] for turn in turns),
            "reward": finite(reward),
            "advantage": finite(advantage),
            "status": trajectory.status,
            "error": trajectory.error,
            "finish_reason": turns[-1]["finish_reason"] if turns else None,
            "num_response_tokens": sum(len(turn.completion.token_ids) for turn in trajectory.turns),
            "versions": _joined_versions(trajectory),
            "turns": turns,
        }

    def _turn(self, turn: Turn, reward: float, before: tuple[int, ...] | None) -> dict[str, Any]:
        completion = turn.completion
        record: dict[str, Any] = {
            "observation": self._observation(turn.prompt_token_ids, before),
            "response": self._decode(completion.token_ids),
            "reward": finite(reward),
            "finish_reason": completion.finish_reason,
            "num_cached_tokens": completion.num_cached_tokens,
            "versions": [_span(span) for span in completion.versions],
        }
        if self._tokens:
            record["tokens"] = [self._text(token_id) for token_id in completion.token_ids]
            record["token_ids"] = list(completion.token_ids)
            record["logprobs"] = [finite(round(logprob, 5)) for logprob in completion.logprobs]
        return record

    def _text(self, token_id: int) -> str:
        # A tokenizer takes some 20 us for one token; a vocabulary is met once.
        if token_id not in self._token_text:
            self._token_text[token_id] = self._decode([token_id])
        return self._token_text[token_id]

    def _observation(self, prompt_token_ids: tuple[int, ...], before: tuple[int, ...] | None) -> str | None:
        if before is None:
            return None
        if prompt_token_ids[: len(before)] == before:
            return self._decode(prompt_token_ids[len(before) :]) or None
        # The history was edited between turns: the whole prompt is what the model saw.
        return self._decode(prompt_token_ids)


def rollout_files(folder: Path | str) -> list[tuple[RolloutKind, int, Path]]:
    """(kind, step, path) of each file that a RolloutLog wrote, by step, training before evaluation."""
    found: list[tuple[RolloutKind, int, Path]] = []
    for path in Path(folder).glob("*.jsonl"):
        match = _NAME.fullmatch(path.name)
        if match:
            found.append(("train" if match[1] == "step" else "eval", int(match[2]), path))
    return sorted(found, key=lambda item: (item[1], item[0] == "eval"))


def shown_samples(groups: Sequence[ScoredGroup], decode: Decode, *, limit: int = 4) -> tuple[Sample, ...]:
    """One trajectory of each of `limit` groups spread over the batch, for the live view."""
    count = min(limit, len(groups))
    samples = []
    for group in (groups[i * len(groups) // count] for i in range(count)):
        for trajectory, reward in zip(group.trajectories[:1], group.rewards[:1], strict=True):
            content = group.prompt.messages[-1].get("content", "") if group.prompt.messages else ""
            response = "".join(decode(turn.completion.token_ids) for turn in trajectory.turns)
            samples.append(Sample(prompt=str(content), response=response or (trajectory.error or ""), reward=reward))
    return tuple(samples)


def finite(value: float | None) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if value is not None and math.isfinite(value) else None


def _jsonable(value: Any) -> Any:
    """What a data row may hold, as JSON: numbers without a JSON form and foreign objects become text."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    return value if isinstance(value, float) and math.isfinite(value) else str(value)


def _kept(groups: Sequence[ScoredGroup], limit: int) -> Iterator[tuple[Prompt, Trajectory, float]]:
    count = 0
    for group in groups:
        count += len(group.trajectories)
        if count > limit and group is not groups[0]:
            return
        for trajectory, reward in zip(group.trajectories, group.rewards, strict=True):
            yield group.prompt, trajectory, reward


def _joined_versions(trajectory: Trajectory) -> list[dict[str, int]]:
    joined = []
    offset = 0
    for turn in trajectory.turns:
        for span in turn.completion.versions:
            joined.append({"version": span.version, "start": span.start + offset, "end": span.end + offset})
        offset += len(turn.completion.token_ids)
    return joined


def _span(span: VersionSpan) -> dict[str, int]:
    return {"version": span.version, "start": span.start, "end": span.end}
