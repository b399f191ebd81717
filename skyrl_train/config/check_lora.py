"""Rules of the adapters that policy and critic train. Module names are checked against the model when it is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from skyrl_train.config.findings import Checked, Finding, Rule, error, warning
from skyrl_train.config.keys import schema_keys

_GROUPS = ("trainer.policy.model.lora", "trainer.critic.model.lora")


def without_rank(checked: Checked) -> Iterator[Finding]:
    """Keys of adapters that nobody asked for."""
    for group in _GROUPS:
        if checked.value(f"{group}.rank"):
            continue
        for path in schema_keys():
            if path.startswith(f"{group}.") and checked.is_set(path):
                yield warning(f"{checked.show(path)} has no effect: {group}.rank=0 trains all weights")


def shape(checked: Checked) -> Iterator[Finding]:
    for group in _GROUPS:
        rank, targets = checked.value(f"{group}.rank"), checked.value(f"{group}.target_modules")
        if rank and not targets:
            yield error(f"{group}.target_modules is empty: no module would get an adapter; name some, or all-linear")
        if rank % 2 and checked.value(f"{group}.init_method") == "orthogonal":
            yield error(
                f"{checked.show(f'{group}.init_method')} needs an even rank, found {group}.rank={rank}: half of the "
                "directions go to each of an adapter's two matrices"
            )


def dropout(checked: Checked) -> Iterator[Finding]:
    """It is in the gradient pass only, so a ratio between that pass and another one has its noise."""
    trainer = checked.config.trainer
    path = "trainer.policy.model.lora.dropout"
    if not (trainer.policy.model.lora.rank and trainer.policy.model.lora.dropout):
        return
    off_policy = trainer.algorithm.off_policy
    if off_policy.max_logprob_diff is not None:
        yield error(
            f"{checked.show(path)} with {checked.show('trainer.algorithm.off_policy.max_logprob_diff')}: the trainer's "
            "log-probabilities of a gradient pass have dropout's noise, the engine's have none; leave one of them out"
        )
    updates = trainer.update_epochs_per_batch * (
        trainer.train_batch_size // (trainer.policy_mini_batch_size or trainer.train_batch_size)
    )
    corrected = trainer.algorithm.use_tis or off_policy.sequence_mask or off_policy.token_veto_below
    if updates > 1 or corrected or trainer.fully_async.enabled:
        yield warning(
            f"{checked.show(path)}: a token's ratio is between a pass with dropout and one without it, so clipping and "
            "corrections see its noise; one update a batch, on the policy, has none"
        )


def in_the_embedded_engine(checked: Checked) -> Iterator[Finding]:
    config = checked.config
    keys, trained = config.generator.lora, config.trainer.policy.model.lora
    if config.generator.backend != "embedded":
        return
    if not keys.enabled:
        for path in schema_keys():
            if path.startswith("generator.lora.") and path != "generator.lora.enabled" and checked.is_set(path):
                yield warning(f"{checked.show(path)} has no effect: {checked.show('generator.lora.enabled')}")
        return
    enabled = checked.show("generator.lora.enabled")
    merged = "a policy that trains an adapter is served merged without it"
    if config.trainer.placement.policy_num_gpus_per_node:
        yield error(
            f"{enabled} with {checked.show('trainer.placement.policy_num_gpus_per_node')}: the embedded engine serves "
            f"adapters on the CPU, its steps on a GPU are captured; leave it out ({merged})"
        )
    if config.generator.deterministic_inference.enabled:
        yield error(
            f"{enabled} with {checked.show('generator.deterministic_inference.enabled')}: what an adapter adds is "
            f"computed in a way that depends on the batch; leave one of them out ({merged})"
        )
    if keys.paths and trained.rank and trained.init_method == "pissa":
        yield error(
            f"{checked.show('generator.lora.paths')} with {checked.show('trainer.policy.model.lora.init_method')}: the "
            "engine shares the trained model, which pissa has taken its start out of, and other adapters are for the "
            "untouched one; use another init_method or leave paths out"
        )


LORA_RULES: tuple[Rule, ...] = (without_rank, shape, dropout, in_the_embedded_engine)
