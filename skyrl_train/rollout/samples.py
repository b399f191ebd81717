"""Trajectories to token sequences: tokens as sampled, a mask over what the policy wrote, rewards where earned.

A turn whose prompt continues the tokens so far extends the sequence; one whose history was edited opens another:

    turn 1  prompt  a b c      completion  D E      reward 0.5
    turn 2  prompt  a b c D E f g          completion  H     reward 1   ->  one sequence   a b c D E  f g H
            loss_mask                                                          0 0 0 1 1  0 0 1
            rewards                                                            0 0 0 0 .5 0 0 1
    turn 2  prompt  a c f g                completion  H                ->  two sequences  a b c D E | a c f g H
    step-wise, either way                                               ->  a b c D E | (turn 2's prompt) H
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from skyrl_train.types import TokenSequence, Trajectory, Turn


def make_sequences(trajectory: Trajectory, *, step_wise: bool = False) -> list[TokenSequence]:
    """The trajectory's sequences. Every sampled token is a loss token of exactly one of them, in order.

    `step_wise` gives each turn a sequence of its own, with its whole history as the prompt: memory grows with the
    square of the turns, but a sequence is then one decision.
    """
    runs: list[list[int]] = []
    so_far: tuple[int, ...] = ()
    for number, turn in enumerate(trajectory.turns):
        if runs and not step_wise and turn.prompt_token_ids[: len(so_far)] == so_far:
            runs[-1].append(number)
        else:
            runs.append([number])
        so_far = turn.prompt_token_ids + turn.completion.token_ids
    return [
        _sequence(trajectory, [trajectory.turns[i] for i in run], [trajectory.rewards[i] for i in run]) for run in runs
    ]


def _sequence(trajectory: Trajectory, turns: Sequence[Turn], turn_rewards: Sequence[float]) -> TokenSequence:
    last = turns[-1]
    length = len(last.prompt_token_ids) + len(last.completion.token_ids)
    loss_mask = torch.zeros(length, dtype=torch.bool)
    rollout_logprobs = torch.zeros(length)
    rewards = torch.zeros(length)
    policy_versions = torch.full((length,), -1, dtype=torch.int64)
    for turn, reward in zip(turns, turn_rewards, strict=True):
        start = len(turn.prompt_token_ids)
        end = start + len(turn.completion.token_ids)
        loss_mask[start:end] = True
        rollout_logprobs[start:end] = torch.tensor(turn.completion.logprobs)
        for span in turn.completion.versions:
            policy_versions[start + span.start : start + span.end] = span.version
        # A turn that was aborted before its first token has no token of its own to stand at.
        rewards[end - 1] += reward
    return TokenSequence(
        trajectory_id=trajectory.id,
        token_ids=torch.tensor(last.prompt_token_ids + last.completion.token_ids),
        loss_mask=loss_mask,
        rollout_logprobs=rollout_logprobs,
        rewards=rewards * loss_mask,
        num_prompt_tokens=len(turns[0].prompt_token_ids),
        policy_versions=policy_versions,
    )
