"""Run folders as a training run leaves them, made by the real writers from a seed: no training needed."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skyrl_train.observability.rollouts import RolloutLog
from skyrl_train.observability.trackers import JsonlTracker
from skyrl_train.types import Completion, Prompt, ScoredGroup, Trajectory, TrajectoryId, Turn, VersionSpan

CONFIG = """\
trainer:
  run_name: synthetic
  seed: 7
  train_batch_size: 16
  policy:
    model:
      path: builtin:arithmetic
    optimizer_config:
      lr: 0.001
  algorithm:
    advantage_estimator: grpo
    eps_clip_low: 0.2
generator:
  backend: embedded
  n_samples_per_prompt: 4
"""


def encode(text: str) -> tuple[int, ...]:
    """One token a byte: id = byte."""
    return tuple(text.encode())


def decode(token_ids: Sequence[int]) -> str:
    return bytes(token_ids).decode(errors="replace")


def make_completion(text: str, *, version: int = 0, logprob: float = -0.25, reason: Any = "stop") -> Completion:
    token_ids = encode(text)
    return Completion(
        request_id="r",
        token_ids=token_ids,
        logprobs=(logprob,) * len(token_ids),
        finish_reason=reason,
        versions=(VersionSpan(version=version, start=0, end=len(token_ids)),),
    )


def make_trajectory(
    prompt_id: str, sample: int, question: str, answer: str, reward: float, *, version: int = 0
) -> Trajectory:
    turn = Turn(prompt_token_ids=encode(question), completion=make_completion(answer, version=version))
    return Trajectory(
        id=TrajectoryId(prompt_id=prompt_id, sample=sample), turns=(turn,), rewards=(reward,), status="completed"
    )


def make_group(
    prompt_id: str, question: str, answers: Sequence[str], rewards: Sequence[float], *, target: Any = None
) -> ScoredGroup:
    prompt = Prompt(
        prompt_id=prompt_id,
        messages=({"role": "user", "content": question},),
        environment="arithmetic",
        target=target,
    )
    trajectories = tuple(
        make_trajectory(prompt_id, i, question, answer, reward)
        for i, (answer, reward) in enumerate(zip(answers, rewards, strict=True))
    )
    return ScoredGroup(prompt=prompt, trajectories=trajectories, rewards=tuple(rewards))


def arithmetic_groups(
    rng: random.Random, step: int, skill: float, *, groups: int = 4, size: int = 4
) -> list[ScoredGroup]:
    """`skill` is the chance of a right answer."""
    made = []
    for g in range(groups):
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        answers, rewards = [], []
        for _ in range(size):
            right = rng.random() < skill
            answers.append(str(a + b if right else a + b + rng.choice([-10, -1, 1, 10])))
            rewards.append(1.0 if right else 0.0)
        made.append(make_group(f"{step}-{g}", f"{a}+{b}=", answers, rewards, target=str(a + b)))
    return made


def step_metrics(rng: random.Random, step: int, total: int) -> dict[str, float]:
    """One step's metrics with the shapes of a run that learns."""
    skill = skill_at(step, total)
    metrics = {
        "reward/mean": skill + rng.gauss(0, 0.03),
        "reward/std": 0.4,
        "policy/loss": rng.gauss(0, 0.02),
        "policy/ref_kl": 0.001 + 0.01 * step / total,
        "policy/entropy": 0.9 - 0.7 * skill,
        "policy/grad_norm": 0.6 + abs(rng.gauss(0, 0.1)),
        "policy/clip_frac": 0.02,
        "rollout/num_tokens": 2000 + rng.randint(-200, 200),
        "rollout/response_len_mean": 4.1,
        "engine/cache_hit_frac": 0.75,
        "throughput/rollout_tokens_per_s": 4300 + rng.gauss(0, 250),
        "timing/rollout_s": 0.55 + abs(rng.gauss(0, 0.05)),
        "timing/reward_s": 0.01,
        "timing/train_s": 0.42 + abs(rng.gauss(0, 0.03)),
        "timing/weight_sync_s": 0.002,
        "memory/peak_rss_bytes": 900_000_000,
    }
    if step % 10 == 0 or step == total:
        metrics["eval/accuracy"] = min(skill + 0.02, 1.0)
        metrics["timing/eval_s"] = 0.3
    metrics["timing/step_s"] = sum(v for k, v in metrics.items() if k.startswith("timing/")) + 0.01
    return metrics


def skill_at(step: int, total: int) -> float:
    return 0.33 + 0.64 * (1 - math.exp(-4 * step / total))


def write_run(folder: Path, *, steps: int = 60, seed: int = 0, rollouts_every: int = 1) -> Path:
    """A whole run folder: config.yaml, metrics.jsonl (an evaluation at step 0 first) and rollouts/."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    tracker = JsonlTracker(folder / "metrics.jsonl")
    rollouts = RolloutLog(folder / "rollouts", decode, every_steps=rollouts_every, total_steps=steps)
    tracker.log(0, {"eval/accuracy": skill_at(0, steps), "timing/eval_s": 0.3, "timing/step_s": 0.31})
    for step in range(1, steps + 1):
        tracker.log(step, step_metrics(rng, step, steps))
        groups = arithmetic_groups(rng, step, skill_at(step, steps))
        rollouts.write(
            step,
            groups,
            advantages={t.id: r - 0.5 for g in groups for t, r in zip(g.trajectories, g.rewards, strict=True)},
        )
        if step % 10 == 0:
            rollouts.write(step, groups[:2], kind="eval")
    tracker.close()
    return folder
