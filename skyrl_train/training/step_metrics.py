"""Metrics of one mini-batch from its micro-batches: means over all its tokens, not the last micro-batch's."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from skyrl_train.algorithms.off_policy import importance_ratio


class StepMetrics:
    """Collects per-token values, on their device, until `result`: the only host synchronisation."""

    def __init__(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._tokens: dict[str, list[torch.Tensor]] = {}

    def add(
        self,
        loss: torch.Tensor,
        token_metrics: Mapping[str, torch.Tensor],
        *,
        rollout_logprobs: torch.Tensor,
        trainer_logprobs: torch.Tensor,
    ) -> None:
        """One micro-batch: its share of the loss, and [N] values by name."""
        self._losses.append(loss)
        for name, values in token_metrics.items():
            self._tokens.setdefault(name, []).append(values)
        self._tokens.setdefault("rollout_logprob_abs_diff", []).append((trainer_logprobs - rollout_logprobs).abs())
        self._tokens.setdefault("importance_ratio", []).append(importance_ratio(trainer_logprobs, rollout_logprobs))

    def result(self) -> dict[str, float]:
        """`policy/loss`, `policy/<name>` as means over tokens, `policy/rollout_logprob_abs_diff_{mean,p99,max}` and
        `policy/importance_ratio_{mean,max}` of the trainer's probability over the engine's.

        On samples of the engine's own distribution that ratio is 1 in the mean. A mean hides an error in a few tokens,
        such as one tensor-parallel shard's; p99 and max show it.
        """
        metrics = {"loss": torch.stack(self._losses).sum()}
        for name, parts in self._tokens.items():
            values = torch.cat(parts)
            if name == "rollout_logprob_abs_diff":
                ordered = values.sort().values
                metrics[f"{name}_mean"] = values.mean()
                metrics[f"{name}_p99"] = ordered[min(int(0.99 * len(ordered)), len(ordered) - 1)]
                metrics[f"{name}_max"] = ordered[-1]
            elif name == "importance_ratio":
                metrics[f"{name}_mean"], metrics[f"{name}_max"] = values.mean(), values.max()
            else:
                metrics[name] = values.mean()
        return {f"policy/{name}": float(value) for name, value in metrics.items()}
