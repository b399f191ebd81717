"""Trajectories to training samples: tokens as sampled, a mask over what the policy wrote.

A turn whose prompt continues the tokens so far extends the sample; one whose history was edited opens another:

    turn 1  prompt  a b c      completion  D E
    turn 2  prompt  a b c D E f g          completion  H     ->  one sample   a b c D E f g H
            loss_mask                                                         0 0 0 1 1 0 0 1
    turn 2  prompt  a c f g                completion  H     ->  two samples  a b c D E | a c f g H
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from skyrl_train.types import TrainingSample, Trajectory, Turn


def make_samples(trajectory: Trajectory, advantage: float) -> list[TrainingSample]:
    """The trajectory's samples; every sampled token carries the trajectory's advantage."""
    runs: list[list[Turn]] = []
    so_far: tuple[int, ...] = ()
    for turn in trajectory.turns:
        if runs and turn.prompt_token_ids[: len(so_far)] == so_far:
            runs[-1].append(turn)
        else:
            runs.append([turn])
        so_far = turn.prompt_token_ids + turn.completion.token_ids
    return [_sample(trajectory, run, advantage) for run in runs]


def _sample(trajectory: Trajectory, turns: Sequence[Turn], advantage: float) -> TrainingSample:
    last = turns[-1]
    length = len(last.prompt_token_ids) + len(last.completion.token_ids)
    loss_mask = torch.zeros(length, dtype=torch.bool)
    rollout_logprobs = torch.zeros(length)
    for turn in turns:
        start = len(turn.prompt_token_ids)
        end = start + len(turn.completion.token_ids)
        loss_mask[start:end] = True
        rollout_logprobs[start:end] = torch.tensor(turn.completion.logprobs)
    return TrainingSample(
        trajectory_id=trajectory.id,
        token_ids=torch.tensor(last.prompt_token_ids + last.completion.token_ids),
        loss_mask=loss_mask,
        rollout_logprobs=rollout_logprobs,
        advantages=loss_mask * float(advantage),
        num_prompt_tokens=len(turns[0].prompt_token_ids),
        versions=tuple(span for turn in turns for span in turn.completion.versions),
    )
