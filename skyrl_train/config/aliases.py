"""Short names that people write, and the keys they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from skyrl_train.config.sources import Setting
from skyrl_train.errors import ConfigError

ALIASES = {
    "policy.learning_rate": "trainer.policy.optimizer_config.lr",
    "algorithm.adv_estimator": "trainer.algorithm.advantage_estimator",
    "algorithm.policy_loss": "trainer.algorithm.policy_loss_type",
    "algorithm.kl_coef": "trainer.algorithm.kl_loss_coef",
    "algorithm.entropy_coef": "trainer.algorithm.entropy",
    "rollout.n_samples_per_prompt": "generator.n_samples_per_prompt",
    "rollout.batch_size": "trainer.train_batch_size",
    "env.name": "environment.env_class",
    "env.max_turns": "generator.max_turns",
    "environment.name": "environment.env_class",
    "generator.enable_lora": "generator.lora.enabled",
}
"""One name for one key. Longer aliases of whole groups are in GROUP_ALIASES."""

GROUP_ALIASES = {
    "algorithm": "trainer.algorithm",
    "trainer.algorithm.adv_estimator": "trainer.algorithm.advantage_estimator",
    "trainer.algorithm.policy_loss": "trainer.algorithm.policy_loss_type",
    "trainer.algorithm.kl_coef": "trainer.algorithm.kl_loss_coef",
    "trainer.algorithm.entropy_coef": "trainer.algorithm.entropy",
}
"""`algorithm.x` is `trainer.algorithm.x`; the others are the short names written at their long place."""


def canonical_path(path: str) -> str:
    """The key that a written path stands for; the path itself when it is no alias."""
    for alias, key in (*ALIASES.items(), *GROUP_ALIASES.items()):
        if path == alias or path.startswith(f"{alias}."):
            return key + path[len(alias) :]
    return path


def resolve_aliases(settings: Sequence[Setting]) -> list[Setting]:
    """Every setting under its key. Raises ConfigError when a key and its alias are set to two values."""
    resolved: dict[str, Setting] = {}
    written: dict[str, Setting] = {}
    for setting in settings:
        path = canonical_path(setting.path)
        earlier = written.get(path)
        if earlier is not None and earlier.value != setting.value:
            raise ConfigError(
                f"{earlier.path} is {earlier.value!r} ({earlier.source}) and {setting.path} is {setting.value!r} "
                f"({setting.source}), but both set {path}; keep one of them"
            )
        written[path] = setting
        if path != setting.path:
            setting = replace(setting, path=path, source=replace(setting.source, alias=setting.path))
        # With equal values the key's own name is the better source to show.
        if path not in resolved or resolved[path].source.alias:
            resolved[path] = setting
    return list(resolved.values())
