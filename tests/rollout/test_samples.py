import torch

from skyrl_train.rollout.samples import make_samples
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
    return Trajectory(
        id=TrajectoryId(prompt_id="7", sample=2), turns=turns, rewards=(0.0,) * len(turns), status="completed"
    )


def test_one_turn_is_one_sample_masked_over_the_answer() -> None:
    (sample,) = make_samples(trajectory(turn((1, 2, 3), (8, 9), -0.5)), advantage=2.0)
    assert sample.token_ids.tolist() == [1, 2, 3, 8, 9]
    assert sample.loss_mask.tolist() == [False, False, False, True, True]
    assert sample.rollout_logprobs.tolist() == [0, 0, 0, -0.5, -0.5]
    assert sample.advantages.tolist() == [0, 0, 0, 2, 2] and sample.advantages.dtype == torch.float32
    assert sample.num_prompt_tokens == 3 and str(sample.trajectory_id) == "7/2/0"


def test_a_turn_that_continues_the_history_extends_the_sample_and_masks_the_observation() -> None:
    (sample,) = make_samples(trajectory(turn((1, 2), (8,), -0.5), turn((1, 2, 8, 5, 6), (9,), -0.25)), advantage=1.0)
    assert sample.token_ids.tolist() == [1, 2, 8, 5, 6, 9]
    assert sample.loss_mask.tolist() == [False, False, True, False, False, True]
    assert sample.rollout_logprobs.tolist() == [0, 0, -0.5, 0, 0, -0.25]
    assert sample.num_prompt_tokens == 2


def test_edited_history_opens_a_second_sample() -> None:
    first, second = make_samples(trajectory(turn((1, 2), (8,), -0.5), turn((1, 5, 6), (9,), -0.25)), advantage=1.0)
    assert first.token_ids.tolist() == [1, 2, 8]
    assert second.token_ids.tolist() == [1, 5, 6, 9] and second.num_prompt_tokens == 3
