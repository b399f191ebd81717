"""Off-policy corrections from the configuration, and whether the engine that was built allows them."""

from __future__ import annotations

import logging

from skyrl_train.algorithms.off_policy import Corrections
from skyrl_train.config.schema_algorithm import Algorithm
from skyrl_train.engines.base import EngineInfo
from skyrl_train.engines.logprob_space import comparable, correctable
from skyrl_train.errors import ConfigError
from skyrl_train.training.mismatch import EngineView, MismatchWatch
from skyrl_train.types import SamplingParams

logger = logging.getLogger(__name__)


def corrections(algorithm: Algorithm) -> Corrections:
    keys = algorithm.off_policy
    return Corrections(
        tis_cap=algorithm.tis_imp_ratio_cap if algorithm.use_tis else None,
        sequence_mask=keys.sequence_mask,
        sequence_mask_low=keys.sequence_mask_low,
        sequence_mask_high=keys.sequence_mask_high,
        token_veto_below=keys.token_veto_below,
    )


def mismatch_watch(algorithm: Algorithm) -> MismatchWatch | None:
    bound = algorithm.off_policy.max_logprob_diff
    return None if bound is None else MismatchWatch(bound)


def respect_logprob_space(algorithm: Algorithm, engine: EngineInfo, sampling: SamplingParams) -> None:
    """Raises ConfigError where something asks for numbers that this engine doesn't give; warns where metrics do."""
    unlike, uncorrectable = (judge(engine.logprob_space, sampling) for judge in (comparable, correctable))
    bound = algorithm.off_policy.max_logprob_diff
    if corrections(algorithm).any and uncorrectable is not None:
        raise ConfigError(
            f"engine {engine.name} (log-probabilities: {engine.logprob_space}): trainer.algorithm.use_tis and the "
            f"masks of trainer.algorithm.off_policy can't correct: {uncorrectable}"
        )
    if bound is not None and unlike is not None:
        raise ConfigError(
            f"engine {engine.name} (log-probabilities: {engine.logprob_space}): "
            f"trainer.algorithm.off_policy.max_logprob_diff={bound:g} would stop every run: {unlike}"
        )
    if unlike is not None:
        logger.warning(
            "engine %s (log-probabilities: %s): policy/rollout_logprob_abs_diff_* and policy/importance_ratio_* "
            "compare unlike numbers: %s",
            engine.name,
            engine.logprob_space,
            unlike,
        )


def watch_engine(watch: MismatchWatch | None, view: EngineView) -> None:
    """A diagnosis may look into this engine."""
    if watch is not None:
        watch.engine = view
