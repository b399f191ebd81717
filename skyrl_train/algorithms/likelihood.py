"""The loss of supervised fine-tuning, as a LossFn: shown tokens become likelier."""

from __future__ import annotations

from skyrl_train.algorithms.objective import MicroBatchLoss
from skyrl_train.algorithms.policy_losses import LossInputs
from skyrl_train.algorithms.reductions import Denominators, token_mean


def negative_log_likelihood(inputs: LossInputs, denominators: Denominators) -> MicroBatchLoss:
    """-sum over t of w_t log p_t, over the mini-batch's tokens; w_t is the token's advantage: 1 where it was shown.

    It is REINFORCE's loss with an advantage that nobody had to estimate: all tokens of the mini-batch weigh the same,
    whatever micro-batch or conversation they stand in.
    """
    values = -inputs.logprobs
    return MicroBatchLoss(
        loss=token_mean(inputs.advantages * values, inputs.sample_index, denominators),
        token_metrics={"nll": values.detach(), "entropy": inputs.entropy.detach()},
    )
