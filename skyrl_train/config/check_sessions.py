"""Rules of rollouts' sessions and priorities."""

from __future__ import annotations

from collections.abc import Iterator

from skyrl_train.config.findings import Checked, Finding, Rule, error, warning
from skyrl_train.config.keys import schema_keys

_SESSIONS = "generator.sessions"


def sessions(checked: Checked) -> Iterator[Finding]:
    generator = checked.config.generator
    keys = generator.sessions
    if not keys.enabled:
        for path in schema_keys():
            if path.startswith(f"{_SESSIONS}.") and checked.is_set(path):
                yield warning(f"{checked.show(path)} has no effect: {_SESSIONS}.enabled=false opens none")
        return
    if generator.max_turns == 1 and generator.agent is None:
        yield warning(
            f"{checked.show(f'{_SESSIONS}.enabled')} gains nothing: with generator.max_turns=1 there is no second turn "
            "that could send its new tokens only"
        )
    need = context_len(checked)
    if keys.default_capacity < need:
        yield error(
            f"{checked.show(f'{_SESSIONS}.default_capacity')} can't hold a whole trajectory: prompt and answer "
            f"together take up to {need} tokens (generator.max_model_len); set at least that"
        )
    if not keys.pool_sessions and checked.is_set(f"{_SESSIONS}.max_pool_size"):
        yield warning(f"{checked.show(f'{_SESSIONS}.max_pool_size')} has no effect: {_SESSIONS}.pool_sessions=false")


def priority(checked: Checked) -> Iterator[Finding]:
    generator = checked.config.generator
    if generator.scheduling.enable_priority and generator.max_turns == 1 and generator.agent is None:
        yield warning(
            f"{checked.show('generator.scheduling.enable_priority')}: a rollout's priority is the number of its turn, "
            "and with generator.max_turns=1 all have 0"
        )


def context_len(checked: Checked) -> int:
    """Tokens of prompt and answer together, as the engine will be told."""
    generator = checked.config.generator
    if generator.max_model_len is not None:
        return generator.max_model_len
    longest = max(generator.sampling_params.max_generate_length, generator.eval_sampling_params.max_generate_length)
    return generator.max_input_length + longest


SESSION_RULES: tuple[Rule, ...] = (sessions, priority)
