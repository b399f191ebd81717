"""The user's own functions, tried on a small example before a model is loaded.

A dotted path that doesn't lead anywhere, a function of another signature, a result of another shape: each is an error
that names the path, what was wanted and what was found. What passes here has met the very shapes of training.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from skyrl_train.algorithms.advantages import ADVANTAGE_ESTIMATORS, AdvantageInputs
from skyrl_train.algorithms.policy_losses import POLICY_LOSSES, LossInputs, TokenLosses
from skyrl_train.algorithms.registry import bind, flat_options, resolve
from skyrl_train.config.schema import Config
from skyrl_train.engines.embedded.rules.processor import find_processor
from skyrl_train.entrypoints.build_rollouts import sampling_params
from skyrl_train.environments.reward_function import reward_function
from skyrl_train.errors import ConfigError
from skyrl_train.rollout.own_agent import agent_factory

NUM_PROMPTS, TOKENS_EACH = 2, 3


def check_extensions(config: Config) -> None:
    """Raises ConfigError for the first of the configured functions that can't be used."""
    algorithm = config.trainer.algorithm
    options = flat_options(algorithm.model_dump())
    name = algorithm.advantage_estimator
    if name not in ADVANTAGE_ESTIMATORS:
        check_estimator(name, resolve("advantage estimator", ADVANTAGE_ESTIMATORS, name), options)
    name = algorithm.policy_loss_type
    if name not in POLICY_LOSSES:
        check_loss(name, resolve("policy loss", POLICY_LOSSES, name), options)
    if config.environment.reward is not None:
        reward_function(config.environment.reward, target_key=config.data.target_key)
    if config.generator.agent is not None:
        agent_factory(config.generator.agent)
    for group in ("sampling_params", "eval_sampling_params"):
        if (named := sampling_params(getattr(config.generator, group)).logit_processor) is not None:
            try:
                find_processor(named)
            except ConfigError as exc:
                raise ConfigError(f"generator.{group}.logit_processor: {exc}") from exc


def check_estimator(path: str, estimator: Callable[..., Any], options: dict[str, Any]) -> None:
    """`estimator(inputs, **options that it names)` must give one advantage for each loss token."""
    wanted = "f(inputs: AdvantageInputs, *, options of trainer.algorithm) -> advantages, a float tensor [T]"
    found = _try("advantage estimator", path, estimator, bind(estimator, options), advantage_example(), wanted)
    tokens = NUM_PROMPTS * 2 * TOKENS_EACH
    if not isinstance(found, torch.Tensor) or found.shape != (tokens,) or not found.is_floating_point():
        raise ConfigError(
            f"advantage estimator {path!r} returned {_shape(found)} for {tokens} loss tokens; wanted: {wanted}"
            " (inputs.spread makes one from a number for each trajectory)"
        )


def check_loss(path: str, loss: Callable[..., Any], options: dict[str, Any]) -> None:
    """`loss(inputs, **options that it names)` must give a value for each token that the gradient can go through."""
    wanted = "f(inputs: LossInputs, *, options of trainer.algorithm) -> TokenLosses with values [N] and metrics [N]"
    inputs = loss_example()
    tokens = len(inputs.logprobs)
    found = _try("policy loss", path, loss, bind(loss, options), inputs, wanted)
    if not isinstance(found, TokenLosses):
        raise ConfigError(f"policy loss {path!r} returned {_shape(found)}; wanted: {wanted}")
    for name, values in (("values", found.values), *found.metrics.items()):
        if not isinstance(values, torch.Tensor) or values.shape != (tokens,):
            raise ConfigError(
                f"policy loss {path!r}: {name} is {_shape(values)} for {tokens} loss tokens; wanted: {wanted}. "
                "Don't reduce: the one denominator of the mini-batch is applied afterwards"
            )
    if not found.values.requires_grad:
        raise ConfigError(f"policy loss {path!r}: its values carry no gradient; inputs.logprobs must go into them")


def advantage_example() -> AdvantageInputs:
    """Two prompts of two answers of three tokens; one of each pair is right."""
    num_trajectories = NUM_PROMPTS * 2
    scores = torch.tensor([1.0, 0.0] * NUM_PROMPTS)
    rewards = torch.zeros(num_trajectories, TOKENS_EACH)
    rewards[:, -1] = scores
    return AdvantageInputs(
        rewards=rewards.flatten(),
        scores=scores,
        trajectory_index=torch.arange(num_trajectories).repeat_interleave(TOKENS_EACH),
        group_index=torch.arange(NUM_PROMPTS).repeat_interleave(2),
        values=torch.full((num_trajectories * TOKENS_EACH,), 0.5),
        baselines=torch.zeros(num_trajectories),
        kl_costs=torch.zeros(num_trajectories * TOKENS_EACH),
    )


def loss_example() -> LossInputs:
    """Four samples of three tokens, a little off policy; the log-probabilities want gradients."""
    tokens = NUM_PROMPTS * 2 * TOKENS_EACH
    old = torch.linspace(-2.0, -0.1, tokens)
    return LossInputs(
        logprobs=(old + 0.01).requires_grad_(),
        entropy=torch.ones(tokens).requires_grad_(),
        old_logprobs=old,
        rollout_logprobs=old,
        ref_logprobs=old,
        advantages=torch.tensor([1.0, -1.0]).repeat_interleave(TOKENS_EACH).repeat(NUM_PROMPTS),
        sample_index=torch.arange(NUM_PROMPTS * 2).repeat_interleave(TOKENS_EACH),
    )


def _try(
    kind: str, path: str, function: Callable[..., Any], bound: Callable[..., Any], inputs: object, wanted: str
) -> Any:
    try:
        return bound(inputs)
    except Exception as exc:  # the user's code: whatever it raises, the run can't start
        raise ConfigError(
            f"{kind} {path!r} can't be used: called on a small example it raised {type(exc).__name__}: {exc}. "
            f"Found: f{inspect.signature(function)}; wanted: {wanted}"
        ) from exc


def _shape(found: object) -> str:
    if isinstance(found, torch.Tensor):
        return f"a tensor {list(found.shape)} of {found.dtype}"
    return f"{found!r:.60} ({type(found).__name__})"
