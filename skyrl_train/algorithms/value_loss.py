"""The critic's loss per token. Shapes: N loss tokens of one micro-batch."""

from __future__ import annotations

import torch

from skyrl_train.algorithms.policy_losses import TokenLosses


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, *, value_clip: float = 0.2
) -> TokenLosses:
    """max((v - R)^2, (clip(v, v_old - eps, v_old + eps) - R)^2) / 2, to be reduced.

    A prediction that has moved further than `value_clip` towards its target has no gradient any more; one that has
    moved away from it keeps its own. Not in PPO's paper (arXiv:1707.06347) but in the code beside it; written out by
    Engstrom et al., "Implementation Matters in Deep Policy Gradients" (arXiv:2005.12729), section 3. The half is that
    code's as well.

        v 0.5 -0.5    v_old 0 0    R 1 1    eps 0.2    clipped 0.2 -0.2    loss 0.32 1.125    (0.2 is the one clipped)
    """
    # Not old + clamp(v - old): inside the bounds that is v but for rounding, which would count as clipped.
    clipped = values.clamp(old_values - value_clip, old_values + value_clip)
    free_loss, clipped_loss = (values - returns).square(), (clipped - returns).square()
    return TokenLosses(
        values=0.5 * torch.maximum(free_loss, clipped_loss),
        metrics={"clip_frac": (clipped_loss > free_loss).float()},
    )
