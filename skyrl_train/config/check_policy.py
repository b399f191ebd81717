"""Rules of the policy losses' options and of the off-policy corrections."""

from __future__ import annotations

from collections.abc import Iterator

from skyrl_train.config.check_training import POLICY_LOSSES
from skyrl_train.config.findings import Checked, Finding, Rule, error, warning
from skyrl_train.engines.logprob_space import reshaping

_ALGORITHM = "trainer.algorithm"

READERS: dict[str, tuple[str, ...]] = {
    "eps_clip_low": ("regular", "dual_clip", "gspo", "clip_cov"),
    "eps_clip_high": ("regular", "dual_clip", "gspo", "clip_cov"),
    "clip_ratio_c": ("dual_clip",),
    "sapo.tau_pos": ("sapo",),
    "sapo.tau_neg": ("sapo",),
    "cispo.cispo_eps_clip_low": ("cispo",),
    "cispo.cispo_eps_clip_high": ("cispo",),
    "clip_cov.clip_ratio": ("clip_cov",),
    "clip_cov.clip_cov_lb": ("clip_cov",),
    "clip_cov.clip_cov_ub": ("clip_cov",),
    "kl_cov.kl_cov_frac": ("kl_cov",),
    "kl_cov.ppo_kl_coef": ("kl_cov",),
}
"""Which of our losses read an option."""


def loss_options(checked: Checked) -> Iterator[Finding]:
    """An option of another loss than the one chosen. A function of the user's own may read all of them."""
    algorithm = checked.config.trainer.algorithm
    loss = algorithm.policy_loss_type
    if loss not in POLICY_LOSSES:
        return
    for name, readers in READERS.items():
        path = f"{_ALGORITHM}.{name}"
        if checked.is_set(path) and loss not in readers:
            yield error(
                f"{checked.show(path)} is read with {_ALGORITHM}.policy_loss_type={' or '.join(readers)} only, "
                f"found {loss}"
            )
    bounds = algorithm.clip_cov
    if loss == "clip_cov" and bounds.clip_cov_lb > bounds.clip_cov_ub:
        yield error(
            f"{checked.show(f'{_ALGORITHM}.clip_cov.clip_cov_lb')} is over {_ALGORITHM}.clip_cov.clip_cov_ub="
            f"{bounds.clip_cov_ub}: no token would ever be clipped"
        )


def sequence_loss(checked: Checked) -> Iterator[Finding]:
    algorithm = checked.config.trainer.algorithm
    if algorithm.policy_loss_type != "gspo":
        return
    if algorithm.loss_reduction != "sequence_mean":
        yield warning(
            f"{checked.show(f'{_ALGORITHM}.loss_reduction')}: gspo has one ratio a sample and is defined with "
            "sequence_mean; otherwise a sample weighs by its length"
        )
    if max(algorithm.eps_clip_low, algorithm.eps_clip_high) >= 0.1:
        yield warning(
            f"{_ALGORITHM}.eps_clip_low={algorithm.eps_clip_low} and eps_clip_high={algorithm.eps_clip_high} hardly "
            "ever clip the mean ratio of a whole sample; gspo's paper has 3e-4 and 4e-4"
        )


def off_policy(checked: Checked) -> Iterator[Finding]:
    algorithm, sampling = checked.config.trainer.algorithm, checked.config.generator.sampling_params
    keys, group = algorithm.off_policy, f"{_ALGORITHM}.off_policy"
    on = [f"{_ALGORITHM}.use_tis"] if algorithm.use_tis else []
    on += [f"{group}.sequence_mask"] if keys.sequence_mask is not None else []
    on += [f"{group}.token_veto_below"] if keys.token_veto_below is not None else []
    settings = [f"generator.sampling_params.{setting}" for setting in reshaping(sampling)]
    for path in on if settings else []:
        yield error(
            f"{checked.show(path)} can't correct for {', '.join(settings)}: tokens are then drawn from a part of the "
            "model's distribution, and the ratio to the whole of it is 1 in the mean no more; leave them off"
        )
    cap = f"{_ALGORITHM}.tis_imp_ratio_cap"
    if not algorithm.use_tis and checked.is_set(cap):
        yield error(f"{checked.show(cap)} is read with {_ALGORITHM}.use_tis=true only")
    if algorithm.use_tis and algorithm.tis_imp_ratio_cap < 1:
        yield error(
            f"{checked.show(cap)} is less than 1: the ratio of a token that engine and trainer agree on would be "
            "truncated too, and all gradients shrink"
        )
    if keys.sequence_mask is None:
        for path in (f"{group}.sequence_mask_low", f"{group}.sequence_mask_high"):
            if checked.is_set(path):
                yield error(f"{checked.show(path)} is read with {group}.sequence_mask=geometric or product only")
    asynchronous = checked.config.trainer.fully_async
    if keys.max_logprob_diff is not None and asynchronous.enabled and asynchronous.max_staleness_steps:
        yield warning(
            f"{checked.show(f'{group}.max_logprob_diff')} with trainer.fully_async.max_staleness_steps="
            f"{asynchronous.max_staleness_steps}: only tokens that the policy in training sampled itself are judged, "
            "and with stale samples those are few or none"
        )


def kl_estimator(checked: Checked) -> Iterator[Finding]:
    """What a KL estimator's gradient is as a loss: see algorithms/kl.py."""
    algorithm = checked.config.trainer.algorithm
    if algorithm.use_kl_loss and algorithm.kl_estimator_type == "k1":
        yield warning(
            f"{checked.show(f'{_ALGORITHM}.kl_estimator_type')} with {_ALGORITHM}.use_kl_loss=true: as a loss its "
            "gradient is 0 on average and pulls nowhere; k2 and k3 do, and k1 is right in the reward"
        )


POLICY_RULES: tuple[Rule, ...] = (loss_options, sequence_loss, off_policy, kl_estimator)
