"""Every estimator and every policy loss as a run of the main job: what its command line says beside its name."""

from __future__ import annotations

from dataclasses import dataclass

from skyrl_train.algorithms.advantages import ADVANTAGE_ESTIMATORS
from skyrl_train.algorithms.policy_losses import POLICY_LOSSES

ALGORITHM = "trainer.algorithm"
BASELINE = "grpo"
ESTIMATOR_OVERRIDES: dict[str, tuple[str, ...]] = {
    # The critic is the policy's own size and learns from nothing: it needs a rate of the policy's order.
    "gae": (
        "trainer.critic.optimizer_config.lr=1e-3",
        "trainer.critic.optimizer_config.num_warmup_steps=20",
        "trainer.critic.optimizer_config.adam_betas=[0.9,0.95]",
    ),
}
LOSS_OVERRIDES: dict[str, tuple[str, ...]] = {
    # The paper's bounds, 3e-4 and 4e-4, are for answers of thousands of tokens: a mean over three moves more.
    "gspo": (
        f"{ALGORITHM}.loss_reduction=sequence_mean",
        f"{ALGORITHM}.eps_clip_low=0.03",
        f"{ALGORITHM}.eps_clip_high=0.04",
    ),
}
"""By name; a name that is not here needs nothing more."""


@dataclass(frozen=True, kw_only=True)
class CurveRow:
    """`name` is unique and names files; `estimator` and `loss` as in the configuration."""

    name: str
    estimator: str
    loss: str
    overrides: tuple[str, ...] = ()

    @property
    def settings(self) -> tuple[str, ...]:
        """The command line's part that is this row's own."""
        return (
            f"{ALGORITHM}.advantage_estimator={self.estimator}",
            f"{ALGORITHM}.policy_loss_type={self.loss}",
            *self.overrides,
        )


def curve_rows() -> list[CurveRow]:
    """Estimators with the regular loss, then losses with grpo, then Dr. GRPO, which is two options of grpo's."""
    estimators = [
        CurveRow(name=file_name(name), estimator=name, loss="regular", overrides=ESTIMATOR_OVERRIDES.get(name, ()))
        for name in ADVANTAGE_ESTIMATORS
    ]
    losses = [
        CurveRow(name=file_name(name), estimator=BASELINE, loss=name, overrides=LOSS_OVERRIDES.get(name, ()))
        for name in POLICY_LOSSES
        if name != "regular"  # grpo's own row above
    ]
    dr_grpo = CurveRow(
        name="dr_grpo",
        estimator=BASELINE,
        loss="regular",
        overrides=(f"{ALGORITHM}.grpo_norm_by_std=false", f"{ALGORITHM}.loss_reduction=seq_mean_token_sum_norm"),
    )
    return [*estimators, *losses, dr_grpo]


def file_name(name: str) -> str:
    """ "reinforce++_baseline" is "reinforcepp_baseline"."""
    return name.replace("+", "p")
