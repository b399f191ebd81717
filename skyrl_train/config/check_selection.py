"""Rules of the estimators' options and of data selection."""

from __future__ import annotations

from collections.abc import Iterator

from skyrl_train.config.check_training import ESTIMATORS
from skyrl_train.config.findings import Checked, Finding, Rule, error, warning

COMPARING = ("grpo", "rloo", "reinforce++_baseline")
"""Estimators for which a group of equal rewards has advantage 0."""

_ALGORITHM = "trainer.algorithm"


def estimator_options(checked: Checked) -> Iterator[Finding]:
    """An option of another estimator than the one chosen. A function of the user's own may read all of them."""
    estimator = checked.config.trainer.algorithm.advantage_estimator
    if estimator not in ESTIMATORS:
        return
    if estimator != "grpo" and checked.is_set(f"{_ALGORITHM}.grpo_norm_by_std"):
        yield error(
            f"{checked.show(f'{_ALGORITHM}.grpo_norm_by_std')} is grpo's, and advantage_estimator is {estimator}, "
            "which divides by no group's deviation; set it to true"
        )
    if estimator.startswith("reinforce++") and checked.is_set(f"{_ALGORITHM}.advantage_batch_normalize"):
        yield error(
            f"{checked.show(f'{_ALGORITHM}.advantage_batch_normalize')}: {estimator} normalizes over the batch itself; "
            "set it to false"
        )


def dynamic_sampling(checked: Checked) -> Iterator[Finding]:
    config = checked.config
    algorithm, kind = config.trainer.algorithm, config.trainer.algorithm.dynamic_sampling.type
    prefix = f"{_ALGORITHM}.dynamic_sampling"
    if kind is None and checked.is_set(f"{prefix}.max_sample_batches"):
        yield error(f"{checked.show(f'{prefix}.max_sample_batches')} is read with {prefix}.type=filter or replace only")
    if kind != "replace" and checked.is_set(f"{prefix}.min_replace_ratio"):
        yield error(f"{checked.show(f'{prefix}.min_replace_ratio')} is read with {prefix}.type=replace only")
    on = [f"{prefix}.type"] if kind is not None else []
    on += [f"{_ALGORITHM}.zero_variance_filter"] if algorithm.zero_variance_filter else []
    for path in on:
        if config.generator.n_samples_per_prompt == 1:
            yield error(
                f"{checked.show(path)} with generator.n_samples_per_prompt=1: the rewards of one sample never differ, "
                "every group would be dropped; set 2 or more"
            )
        elif algorithm.advantage_estimator in ESTIMATORS and algorithm.advantage_estimator not in COMPARING:
            yield warning(
                f"{checked.show(path)} drops groups whose rewards are all equal, but with advantage_estimator "
                f"{algorithm.advantage_estimator} they teach something; it is meant for {', '.join(COMPARING)}"
            )


def overlong(checked: Checked) -> Iterator[Finding]:
    keys, sampling = checked.config.trainer.algorithm.overlong, checked.config.generator.sampling_params
    prefix = f"{_ALGORITHM}.overlong"
    if keys.filter and sampling.ignore_eos:
        yield error(
            f"{checked.show(f'{prefix}.filter')} with generator.sampling_params.ignore_eos=true: every answer is cut "
            "off by its length and left out; nothing would be learned"
        )
    longest = f"generator.sampling_params.max_generate_length={sampling.max_generate_length}"
    if keys.soft_punishment and checked.config.trainer.algorithm.advantage_estimator == "remax":
        yield warning(
            f"{checked.show(f'{prefix}.soft_punishment')} with advantage_estimator remax: the greedy answer's score is "
            "not shaped, so long answers push all advantages of a batch down: correct on average, with more noise"
        )
    if not keys.soft_punishment:
        for path in (f"{prefix}.cache_tokens", f"{prefix}.penalty"):
            if checked.is_set(path):
                yield error(f"{checked.show(path)} is read with {prefix}.soft_punishment=true only")
    elif keys.cache_tokens is not None and keys.cache_tokens >= sampling.max_generate_length:
        yield error(
            f"{checked.show(f'{prefix}.cache_tokens')} must be less than {longest}: every answer would be punished"
        )
    elif sampling.max_generate_length < 2:
        yield error(f"{checked.show(f'{prefix}.soft_punishment')} needs answers of 2 tokens at least, found {longest}")


SELECTION_RULES: tuple[Rule, ...] = (estimator_options, dynamic_sampling, overlong)
