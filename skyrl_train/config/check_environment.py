"""Rules of environments and of trajectories with several turns."""

from __future__ import annotations

import re
from collections.abc import Iterator

from skyrl_train.config.findings import Checked, Finding, Rule, error, warning
from skyrl_train.config.schema import Config

TASKS = ("arithmetic", "calculator")
"""Environments with data of their own."""
WITHOUT_SETTINGS = (*TASKS, "gsm8k", "gsm8k_multi_turn", "llm_as_a_judge")
"""Environments of ours: what they read has keys of its own, not environment.env_config."""


def generated_prompts(config: Config) -> int | None:
    """Problems that the built-in task makes; None where the data comes from files."""
    if config.data.train_data or config.environment.env_class not in TASKS:
        return None
    keys = config.environment
    return (keys.arithmetic if keys.env_class == "arithmetic" else keys.calculator).num_train_prompts


def turns(checked: Checked) -> Iterator[Finding]:
    generator, environment = checked.config.generator, checked.config.environment
    several = generator.max_turns > 1
    if generator.chat_history == "template" and not generator.use_conversation_multi_turn:
        yield error(
            f"{checked.show('generator.chat_history')} renders messages, and "
            f"{checked.show('generator.use_conversation_multi_turn')} has none: observations are text within one "
            "answer; keep one of them"
        )
    if not several:
        for name in ("use_conversation_multi_turn", "chat_history", "step_wise_trajectories"):
            path = f"generator.{name}"
            if checked.is_set(path):
                yield warning(f"{checked.show(path)} has no effect: generator.max_turns is 1")
    if several and environment.reward is not None:
        yield error(
            f"{checked.show('environment.reward')} scores one answer and says nothing to the policy, so "
            f"{checked.show('generator.max_turns')} has no second turn; an environment (environment.env_class) has"
        )
    if environment.env_class == "calculator" and not several:
        yield error(
            f"{checked.show('environment.env_class')} needs a turn for the tool and one for the answer, found "
            f"{checked.show('generator.max_turns')}; set 3"
        )
    model = checked.config.trainer.policy.model.path
    if environment.env_class == "calculator" and model == "builtin:arithmetic":
        yield error(
            f"{checked.show('environment.env_class')}: {model} was never shown a tool, and random answers don't find "
            "one; set trainer.policy.model.path=builtin:calculator"
        )


def workers(checked: Checked) -> Iterator[Finding]:
    if checked.config.environment.num_workers == 0 and checked.is_set("environment.step_timeout_s"):
        yield warning(
            f"{checked.show('environment.step_timeout_s')} has no effect: environment.num_workers=0 runs environments "
            "on the event loop, where nothing can be cut off"
        )


def settings(checked: Checked) -> Iterator[Finding]:
    for name, found in checked.config.environment.env_config.items():
        path = f"environment.env_config.{name}"
        if name in WITHOUT_SETTINGS:
            yield error(f"{path}: {name} reads no such settings; what it has stands under environment.{name}, if any")
        elif not isinstance(found, dict):
            yield error(f"{path} must hold settings by name, found {found!r:.60}")


def judge(checked: Checked) -> Iterator[Finding]:
    environment = checked.config.environment
    keys, prefix = environment.llm_as_a_judge, "environment.llm_as_a_judge"
    if environment.env_class == "llm_as_a_judge":
        for name in ("base_url", "model"):
            if not getattr(keys, name):
                yield error(f"environment.env_class=llm_as_a_judge needs {prefix}.{name}")
        seconds = keys.request_timeout_s * (keys.max_retries + 1) + keys.retry_delay_s * (2**keys.max_retries - 1)
        if seconds > environment.step_timeout_s and environment.num_workers != 0:
            yield warning(
                f"a judge that doesn't answer takes up to {seconds:g} s ({prefix}.request_timeout_s, max_retries and "
                f"retry_delay_s), and environment.step_timeout_s={environment.step_timeout_s:g} ends the call before"
            )
    if "{answer}" not in keys.prompt_template:
        yield error(f"{prefix}.prompt_template has no {{answer}}: the judge would not see what it is to score")
    if keys.min_score >= keys.max_score:
        yield error(f"{prefix}.min_score={keys.min_score:g} must be less than {prefix}.max_score={keys.max_score:g}")
    try:
        groups = re.compile(keys.score_pattern).groups
    except re.error as exc:
        yield error(f"{prefix}.score_pattern is no regular expression: {exc}")
    else:
        if not groups:
            yield error(f"{prefix}.score_pattern has no group: put the score in parentheses")


ENVIRONMENT_RULES: tuple[Rule, ...] = (turns, workers, settings, judge)
