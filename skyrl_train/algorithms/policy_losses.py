"""Policy losses per token. Pure tensor functions; add one as a function and a line in `POLICY_LOSSES`.

A loss takes a `LossInputs` and the options that it names, and returns a `TokenLosses`: values to minimise, not yet
reduced. Shapes: N loss tokens of one micro-batch; a sample is never cut in two, so sequence losses see whole ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from skyrl_train.algorithms.kl import absolute
from skyrl_train.algorithms.reductions import mean_per_sample


@dataclass(frozen=True, kw_only=True, eq=False)
class LossInputs:
    """What is known of a micro-batch's loss tokens. `logprobs` and `entropy` carry gradients, the others don't.

    `old_logprobs` are the trainer's before the update, `rollout_logprobs` the engine's. `selected` is there for losses
    that treat some tokens of the whole mini-batch differently: see `selections.SELECTIONS`.
    """

    logprobs: torch.Tensor  # [N]
    entropy: torch.Tensor  # [N]
    old_logprobs: torch.Tensor  # [N]
    rollout_logprobs: torch.Tensor  # [N]
    ref_logprobs: torch.Tensor | None  # [N]
    advantages: torch.Tensor  # [N]
    sample_index: torch.Tensor  # [N] int64, rising
    selected: torch.Tensor | None = None  # [N] bool


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenLosses:
    """`values` [N] to minimise; `metrics`: name -> [N], averaged over the mini-batch's tokens."""

    values: torch.Tensor
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)


def ppo_clip(inputs: LossInputs, *, eps_clip_low: float = 0.2, eps_clip_high: float = 0.2) -> TokenLosses:
    """-min(r A, clip(r, 1 - low, 1 + high) A), r = exp(logprobs - old_logprobs).

    PPO (arXiv:1707.06347), equation 7; the two bounds of DAPO (arXiv:2503.14476), equation 10.
    """
    ratio = torch.exp(inputs.logprobs - inputs.old_logprobs)
    return _clipped(ratio, inputs.advantages, eps_clip_low, eps_clip_high)


def dual_clip(
    inputs: LossInputs, *, eps_clip_low: float = 0.2, eps_clip_high: float = 0.2, clip_ratio_c: float = 3.0
) -> TokenLosses:
    """PPO clip, and for A < 0 never more than -c A: one wild ratio can't own the gradient.

    Ye et al., "Mastering Complex Control in MOBA Games" (arXiv:1912.09729), equation 5.
    """
    clip = ppo_clip(inputs, eps_clip_low=eps_clip_low, eps_clip_high=eps_clip_high)
    bound = -clip_ratio_c * inputs.advantages
    bounded = (inputs.advantages < 0) & (clip.values > bound)
    return TokenLosses(
        values=torch.where(bounded, bound, clip.values),
        metrics={**clip.metrics, "dual_clip_frac": bounded.float()},
    )


def importance_sampling(inputs: LossInputs) -> TokenLosses:
    """-r A with r = exp(logprobs - old_logprobs), never clipped; its gradient is -r A grad log pi.

    REINFORCE on samples of the old policy, reweighted: the surrogate of PPO's paper (arXiv:1707.06347), equation 6.
    """
    ratio = torch.exp(inputs.logprobs - inputs.old_logprobs)
    return TokenLosses(values=-ratio * inputs.advantages, metrics={"ratio_mean": ratio.detach()})


def gspo(inputs: LossInputs, *, eps_clip_low: float = 0.2, eps_clip_high: float = 0.2) -> TokenLosses:
    """PPO's clip on one ratio for the whole sample, s = exp(mean of logprobs - old_logprobs over its tokens).

    GSPO (arXiv:2507.18071), equations 5 to 7, in the token form of equations 13 and 14: every token carries
    s_t = sg(s) pi_t / sg(pi_t), whose value is s and whose gradient is s grad log pi_t. With `sequence_mean` and one
    advantage a sample the gradient is that of equation 5; the form also takes advantages that differ by token.
    The paper's bounds are 3e-4 and 4e-4: a mean over tokens moves far less than one token does.
    """
    log_ratio = inputs.logprobs - inputs.old_logprobs
    sequence = mean_per_sample(log_ratio.detach(), inputs.sample_index)[inputs.sample_index]
    ratio = torch.exp(sequence + log_ratio - log_ratio.detach())
    return _clipped(ratio, inputs.advantages, eps_clip_low, eps_clip_high)


def cispo(inputs: LossInputs, *, cispo_eps_clip_low: float = 1.0, cispo_eps_clip_high: float = 5.0) -> TokenLosses:
    """-sg(clip(r, 1 - low, 1 + high)) A logprobs: the weight is clipped, no token loses its gradient.

    MiniMax-M1 (arXiv:2506.13585), equations 4 and 5. The paper has no lower bound: `low` 1 is none, and so is 0. Read
    by the formula, 0 would lift every weight below 1 to 1 and keep pushing down what has become unlikely already.
    """
    ratio = torch.exp(inputs.logprobs - inputs.old_logprobs).detach()
    bounded_below = 0 < cispo_eps_clip_low < 1
    weight = ratio.clamp(1 - cispo_eps_clip_low if bounded_below else 0.0, 1 + cispo_eps_clip_high)
    return TokenLosses(
        values=-weight * inputs.advantages * inputs.logprobs,
        metrics={"ratio_mean": ratio, "clip_frac": (weight != ratio).float()},
    )


def sapo(inputs: LossInputs, *, tau_pos: float = 1.0, tau_neg: float = 1.05) -> TokenLosses:
    """-f(r) A with the soft gate f(r) = 4 / tau sigmoid(tau (r - 1)); tau is `tau_pos` for A > 0, else `tau_neg`.

    Soft Adaptive Policy Optimization (arXiv:2511.20347), section 3. f'(1) = 1, so on policy it is REINFORCE; further
    out the gradient fades on both sides instead of ending at a bound, faster with a larger tau.
    """
    ratio = torch.exp(inputs.logprobs - inputs.old_logprobs)
    tau = torch.full_like(ratio, tau_neg).masked_fill(inputs.advantages > 0, tau_pos)
    gate = torch.sigmoid(tau * (ratio - 1))
    slope = (4 * gate * (1 - gate)).detach()
    return TokenLosses(
        values=-4 / tau * gate * inputs.advantages,
        metrics={"ratio_mean": ratio.detach(), "gate_slope": slope},
    )


def clip_cov(inputs: LossInputs, *, eps_clip_low: float = 0.2, eps_clip_high: float = 0.2) -> TokenLosses:
    """PPO clip without the selected tokens: `selections.clip_cov_tokens` draws some whose covariance is high.

    The Entropy Mechanism (arXiv:2505.22617), equations 11 and 12. The equations have no ratio clip, the code that the
    authors published has; so has this. A selected token's loss is 0, and it counts in the denominator.
    """
    selected = _selected(inputs, "clip_cov")
    clip = ppo_clip(inputs, eps_clip_low=eps_clip_low, eps_clip_high=eps_clip_high)
    return TokenLosses(
        values=torch.where(selected, 0.0, clip.values),
        metrics={**clip.metrics, "cov_selected_frac": selected.float()},
    )


def kl_cov(inputs: LossInputs, *, ppo_kl_coef: float = 1.0) -> TokenLosses:
    """-r A, plus `ppo_kl_coef` |log r| on the selected tokens: `selections.kl_cov_tokens` ranks by covariance.

    The Entropy Mechanism (arXiv:2505.22617), equations 13 and 14: the KL is that to the old policy, estimated by
    |log r| as in the authors' code. There is no ratio clip.
    """
    selected = _selected(inputs, "kl_cov")
    plain = importance_sampling(inputs)
    penalty = ppo_kl_coef * absolute(inputs.logprobs, inputs.old_logprobs)
    return TokenLosses(
        values=plain.values + torch.where(selected, penalty, 0.0),
        metrics={**plain.metrics, "cov_selected_frac": selected.float()},
    )


def _clipped(ratio: torch.Tensor, advantages: torch.Tensor, low: float, high: float) -> TokenLosses:
    free = -ratio * advantages
    clipped = -ratio.clamp(1 - low, 1 + high) * advantages
    return TokenLosses(
        values=torch.maximum(free, clipped),
        metrics={"ratio_mean": ratio.detach(), "clip_frac": (clipped > free).float()},
    )


def _selected(inputs: LossInputs, name: str) -> torch.Tensor:
    if inputs.selected is None:
        raise ValueError(f"{name} needs tokens selected over the whole mini-batch: give the objective a `select`")
    return inputs.selected


POLICY_LOSSES: dict[str, Callable[..., TokenLosses]] = {
    "regular": ppo_clip,
    "dual_clip": dual_clip,
    "gspo": gspo,
    "cispo": cispo,
    "sapo": sapo,
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
    "importance_sampling": importance_sampling,
}
"""A loss that looks at `selected` has a line in `selections.SELECTIONS` too."""
