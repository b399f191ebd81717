"""A policy loss: a quadratic penalty on the log-ratio in the place of a clip."""

from skyrl_train.algorithms.policy_losses import LossInputs, TokenLosses


def quadratic_trust_region(inputs: LossInputs, *, eps_clip_high: float = 0.2) -> TokenLosses:
    """-r A + (log r)^2 / (2 eps), one value a token, not reduced; eps is trainer.algorithm.eps_clip_high."""
    log_ratio = inputs.logprobs - inputs.old_logprobs
    penalty = log_ratio.square() / (2 * eps_clip_high)
    return TokenLosses(
        values=-log_ratio.exp() * inputs.advantages + penalty,
        metrics={"trust_penalty": penalty.detach()},  # policy/trust_penalty in the metrics
    )
