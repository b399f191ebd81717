"""Options of estimators and of data selection that make no sense together, refused by name."""

from __future__ import annotations

import pytest

from skyrl_train.config import ConfigError, load_config

ALGORITHM = "trainer.algorithm"


def refused(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(list(argv))
    return str(caught.value)


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce++", "reinforce++_baseline", "remax", "gae"])
def test_every_estimator_is_there(name: str) -> None:
    assert load_config([f"{ALGORITHM}.advantage_estimator={name}"]).warnings == ()


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce++_baseline"])
def test_a_comparison_needs_two_samples(name: str) -> None:
    message = refused(f"{ALGORITHM}.advantage_estimator={name}", "generator.n_samples_per_prompt=1")
    assert f"advantage_estimator {name} compares the samples of one prompt" in message


@pytest.mark.parametrize("name", ["reinforce++", "remax", "gae"])
def test_the_others_learn_from_one(name: str) -> None:
    load_config([f"{ALGORITHM}.advantage_estimator={name}", "generator.n_samples_per_prompt=1"])


def test_the_groups_deviation_is_grpos() -> None:
    message = refused(f"{ALGORITHM}.advantage_estimator=rloo", f"{ALGORITHM}.grpo_norm_by_std=false")
    assert "grpo_norm_by_std=false" in message and "is grpo's, and advantage_estimator is rloo" in message
    load_config([f"{ALGORITHM}.advantage_estimator=my.own.function", f"{ALGORITHM}.grpo_norm_by_std=false"])


def test_what_is_normalized_already_is_not_normalized_again() -> None:
    message = refused(f"{ALGORITHM}.advantage_estimator=reinforce++", f"{ALGORITHM}.advantage_batch_normalize=true")
    assert "reinforce++ normalizes over the batch itself" in message
    load_config([f"{ALGORITHM}.advantage_estimator=gae", f"{ALGORITHM}.advantage_batch_normalize=true"])


def test_options_of_another_kind_of_dynamic_sampling() -> None:
    prefix = f"{ALGORITHM}.dynamic_sampling"
    assert f"is read with {prefix}.type=filter or replace only" in refused(f"{prefix}.max_sample_batches=5")
    message = refused(f"{prefix}.type=filter", f"{prefix}.min_replace_ratio=0.5")
    assert f"is read with {prefix}.type=replace only" in message
    load_config([f"{prefix}.type=replace", f"{prefix}.min_replace_ratio=0.5", f"{prefix}.max_sample_batches=5"])


@pytest.mark.parametrize("override", ["dynamic_sampling.type=filter", "zero_variance_filter=true"])
def test_filters_of_groups_of_one_are_refused_and_those_of_other_estimators_warned_of(override: str) -> None:
    one = ("generator.n_samples_per_prompt=1", f"{ALGORITHM}.advantage_estimator=reinforce++")
    assert "every group would be dropped" in refused(f"{ALGORITHM}.{override}", *one)
    warnings = load_config([f"{ALGORITHM}.{override}", f"{ALGORITHM}.advantage_estimator=gae"]).warnings
    assert any("they teach something" in warning for warning in warnings)
    assert load_config([f"{ALGORITHM}.{override}", f"{ALGORITHM}.advantage_estimator=rloo"]).warnings == ()


def test_overlong_answers() -> None:
    prefix, length = f"{ALGORITHM}.overlong", "generator.sampling_params.max_generate_length=16"
    soft = f"{prefix}.soft_punishment=true"
    load_config([length, soft, f"{prefix}.filter=true"])
    load_config([length, soft, f"{prefix}.cache_tokens=15", f"{prefix}.penalty=0.5"])
    assert f"{prefix}.cache_tokens=16" in refused(length, soft, f"{prefix}.cache_tokens=16")
    assert f"is read with {prefix}.soft_punishment=true only" in refused(f"{prefix}.penalty=0.5")
    assert "2 tokens at least" in refused("generator.sampling_params.max_generate_length=1", soft)
    message = refused(f"{prefix}.filter=true", "generator.sampling_params.ignore_eos=true")
    assert "every answer is cut off by its length" in message


def test_the_greedy_baseline_is_not_shaped_by_length_and_the_user_is_told() -> None:
    argv = (f"{ALGORITHM}.overlong.soft_punishment=true", "generator.sampling_params.max_generate_length=16")
    (warning,) = load_config([*argv, f"{ALGORITHM}.advantage_estimator=remax"]).warnings
    assert "the greedy answer's score is not shaped" in warning
    assert load_config([*argv]).warnings == ()
