import torch

from skyrl_train.rollout.samples import make_sequences
from skyrl_train.types import Completion, Trajectory, TrajectoryId, Turn, VersionSpan


def turn(prompt: tuple[int, ...], answer: tuple[int, ...], logprob: float) -> Turn:
    completion = Completion(
        request_id="r",
        token_ids=answer,
        logprobs=(logprob,) * len(answer),
        finish_reason="stop",
        versions=(VersionSpan(version=1, start=0, end=len(answer)),),
    )
    return Turn(prompt_token_ids=prompt, completion=completion)


def trajectory(*turns: Turn) -> Trajectory:
    rewards = tuple(0.5 * (i + 1) for i in range(len(turns)))
    return Trajectory(id=TrajectoryId(prompt_id="7", sample=2), turns=turns, rewards=rewards, status="completed")


def test_one_turn_is_one_sequence_masked_over_the_answer() -> None:
    (sequence,) = make_sequences(trajectory(turn((1, 2, 3), (8, 9), -0.5)))
    assert sequence.token_ids.tolist() == [1, 2, 3, 8, 9]
    assert sequence.loss_mask.tolist() == [False, False, False, True, True]
    assert sequence.rollout_logprobs.tolist() == [0, 0, 0, -0.5, -0.5]
    assert sequence.rewards.tolist() == [0, 0, 0, 0, 0.5] and sequence.rewards.dtype == torch.float32
    assert sequence.num_prompt_tokens == 3 and str(sequence.trajectory_id) == "7/2/0"


def test_a_turn_that_continues_the_history_extends_the_sequence_and_masks_the_observation() -> None:
    (sequence,) = make_sequences(trajectory(turn((1, 2), (8,), -0.5), turn((1, 2, 8, 5, 6), (9,), -0.25)))
    assert sequence.token_ids.tolist() == [1, 2, 8, 5, 6, 9]
    assert sequence.loss_mask.tolist() == [False, False, True, False, False, True]
    assert sequence.rollout_logprobs.tolist() == [0, 0, -0.5, 0, 0, -0.25]
    assert sequence.rewards.tolist() == [0, 0, 0.5, 0, 0, 1.0]
    assert sequence.policy_versions is not None
    assert sequence.policy_versions.tolist() == [-1, -1, 1, -1, -1, 1]
    assert sequence.num_prompt_tokens == 2


def test_edited_history_opens_a_second_sequence() -> None:
    first, second = make_sequences(trajectory(turn((1, 2), (8,), -0.5), turn((1, 5, 6), (9,), -0.25)))
    assert first.token_ids.tolist() == [1, 2, 8] and first.rewards.tolist() == [0, 0, 0.5]
    assert second.token_ids.tolist() == [1, 5, 6, 9] and second.num_prompt_tokens == 3
    assert second.rewards.tolist() == [0, 0, 0, 1.0]


def test_step_wise_gives_each_turn_its_own_sequence_with_the_history_as_its_prompt() -> None:
    turns = (turn((1, 2), (8,), -0.5), turn((1, 2, 8, 5, 6), (9,), -0.25))
    first, second = make_sequences(trajectory(*turns), step_wise=True)
    assert first.token_ids.tolist() == [1, 2, 8] and second.token_ids.tolist() == [1, 2, 8, 5, 6, 9]
    assert second.loss_mask.tolist() == [False] * 5 + [True] and second.num_prompt_tokens == 5
