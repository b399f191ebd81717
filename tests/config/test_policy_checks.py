"""Options of policy losses and corrections that contradict each other are refused by name."""

from __future__ import annotations

import pytest

from skyrl_train.config.check_policy import READERS
from skyrl_train.config.check_training import POLICY_LOSSES
from skyrl_train.config.keys import schema_keys
from tests.config.test_checks import refused, warned

GROUP = "trainer.algorithm"


@pytest.mark.parametrize("loss", POLICY_LOSSES)
def test_every_loss_is_built(loss: str) -> None:
    assert "not built" not in warned(f"{GROUP}.policy_loss_type={loss}")


@pytest.mark.parametrize(
    ("option", "loss", "reader"),
    [
        ("cispo.cispo_eps_clip_high=3", "regular", "cispo"),
        ("sapo.tau_pos=2", "gspo", "sapo"),
        ("clip_cov.clip_ratio=0.1", "kl_cov", "clip_cov"),
        ("kl_cov.ppo_kl_coef=0.5", "clip_cov", "kl_cov"),
        ("clip_ratio_c=2", "regular", "dual_clip"),
        ("eps_clip_high=0.3", "sapo", "regular or dual_clip or gspo or clip_cov"),
    ],
)
def test_an_option_of_another_loss_is_refused(option: str, loss: str, reader: str) -> None:
    message = refused(f"{GROUP}.policy_loss_type={loss}", f"{GROUP}.{option}")
    assert f"{GROUP}.{option}" in message
    assert f"is read with {GROUP}.policy_loss_type={reader} only, found {loss}" in message


def test_a_loss_of_ones_own_may_read_every_option() -> None:
    warned(f"{GROUP}.policy_loss_type=my.loss", f"{GROUP}.sapo.tau_pos=2", f"{GROUP}.eps_clip_high=0.3")


def test_the_table_of_readers_has_every_option_of_the_groups() -> None:
    groups = ("sapo", "cispo", "clip_cov", "kl_cov")
    wanted = {
        key.removeprefix(f"{GROUP}.")
        for key in schema_keys()
        if key.startswith(tuple(f"{GROUP}.{group}." for group in groups))
    }
    assert wanted == {key for key in READERS if "." in key}


def test_bounds_that_no_token_is_between_are_refused() -> None:
    message = refused(f"{GROUP}.policy_loss_type=clip_cov", f"{GROUP}.clip_cov.clip_cov_lb=9")
    assert f"{GROUP}.clip_cov.clip_cov_lb=9.0" in message and "clip_cov_ub=5.0" in message


def test_gspo_wants_its_own_mean_and_bounds() -> None:
    message = warned(f"{GROUP}.policy_loss_type=gspo")
    assert f"{GROUP}.loss_reduction=token_mean" in message and "defined with sequence_mean" in message
    assert "paper has 3e-4 and 4e-4" in message
    as_in_the_paper = (
        f"{GROUP}.policy_loss_type=gspo",
        f"{GROUP}.loss_reduction=sequence_mean",
        f"{GROUP}.eps_clip_low=3e-4",
        f"{GROUP}.eps_clip_high=4e-4",
    )
    assert "gspo" not in warned(*as_in_the_paper)


@pytest.mark.parametrize(
    "correction", ["use_tis=true", "off_policy.sequence_mask=geometric", "off_policy.token_veto_below=0.01"]
)
def test_truncated_sampling_cannot_be_corrected(correction: str) -> None:
    message = refused(
        f"{GROUP}.{correction}", "generator.sampling_params.top_p=0.8", "generator.sampling_params.min_new_tokens=2"
    )
    assert f"{GROUP}.{correction}" in message
    assert (
        "can't correct for generator.sampling_params.top_p=0.8, generator.sampling_params.min_new_tokens=2" in message
    )


def test_a_cap_needs_its_correction_and_leaves_ratios_of_1() -> None:
    assert f"is read with {GROUP}.use_tis=true only" in refused(f"{GROUP}.tis_imp_ratio_cap=3")
    assert "is less than 1" in refused(f"{GROUP}.use_tis=true", f"{GROUP}.tis_imp_ratio_cap=0.5")


def test_bounds_of_a_mask_need_the_mask() -> None:
    message = refused(f"{GROUP}.off_policy.sequence_mask_low=0.9")
    assert f"is read with {GROUP}.off_policy.sequence_mask=geometric or product only" in message


def test_the_bound_judges_no_stale_tokens() -> None:
    options = (f"{GROUP}.off_policy.max_logprob_diff=1.0", "trainer.fully_async.enabled=true")
    assert "are few or none" in warned(*options)
    assert "are few or none" not in warned(*options, "trainer.fully_async.max_staleness_steps=0")


def test_tis_goes_with_every_loss() -> None:
    """importance_sampling included: its ratio is new / old, the correction's old / rollout."""
    for loss in POLICY_LOSSES:
        warned(f"{GROUP}.policy_loss_type={loss}", f"{GROUP}.use_tis=true")


def test_k1_as_a_loss_is_warned_of() -> None:
    k1 = f"{GROUP}.kl_estimator_type=k1"
    assert "gradient is 0 on average" in warned(k1, f"{GROUP}.use_kl_loss=true")
    assert "gradient is 0 on average" not in warned(k1, f"{GROUP}.use_kl_in_reward=true")
