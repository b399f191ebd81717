"""Rules of environments and of several turns."""

from __future__ import annotations

import pytest

from skyrl_train.config.load import load_config
from skyrl_train.errors import ConfigError

CALCULATOR = (
    "environment.env_class=calculator",
    "trainer.policy.model.path=builtin:calculator",
    "generator.max_turns=3",
)
JUDGE = (
    "environment.env_class=llm_as_a_judge",
    "environment.llm_as_a_judge.base_url=http://127.0.0.1:1/v1",
    "environment.llm_as_a_judge.model=judge",
    "data.train_data=[rows.jsonl]",
)


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(list(overrides))
    return str(caught.value)


def warned(*overrides: str) -> str:
    return "\n".join(load_config(list(overrides)).warnings)


def test_the_calculator_wants_turns_and_a_model_that_was_shown_the_tool() -> None:
    load_config(list(CALCULATOR))
    assert "needs a turn for the tool and one for the answer" in refused(*CALCULATOR[:2])
    assert "builtin:arithmetic was never shown a tool" in refused(CALCULATOR[0], CALCULATOR[2])


def test_the_calculators_own_numbers_are_checked_and_arithmetics_have_no_effect() -> None:
    message = refused(*CALCULATOR, "environment.calculator.num_train_prompts=8", "trainer.train_batch_size=16")
    assert "environment.calculator.num_train_prompts=8 is less than trainer.train_batch_size=16" in message
    assert "read with environment.env_class=arithmetic only" in warned(
        *CALCULATOR, "environment.arithmetic.num_eval_prompts=8"
    )


def test_what_only_several_turns_read_is_said_to_have_no_effect() -> None:
    assert "generator.max_turns is 1" in warned("generator.use_conversation_multi_turn=false")
    assert "generator.max_turns is 1" in warned("generator.chat_history=template")
    assert "generator.max_turns is 1" not in warned(*CALCULATOR, "generator.chat_history=template")


def test_one_long_answer_has_no_messages_to_render_anew() -> None:
    message = refused(*CALCULATOR, "generator.chat_history=template", "generator.use_conversation_multi_turn=false")
    assert "keep one of them" in message


def test_a_reward_function_has_no_second_turn() -> None:
    assert "scores one answer" in refused("environment.reward=m.f", "generator.max_turns=2")


def test_deadlines_need_threads() -> None:
    assert "has no effect: environment.num_workers=0" in warned(
        "environment.num_workers=0", "environment.step_timeout_s=5"
    )


def test_settings_go_to_environments_that_read_them() -> None:
    assert "calculator reads no such settings" in refused("environment.env_config={calculator: {call_reward: 1}}")
    assert "must hold settings by name, found 3" in refused("environment.env_config={search: 3}")
    load_config(["environment.env_config={search: {topk: 3}}"])


def test_a_judge_needs_an_endpoint_a_prompt_with_the_answer_and_a_scale() -> None:
    load_config(list(JUDGE))
    message = refused(JUDGE[0], JUDGE[3])
    assert "needs environment.llm_as_a_judge.base_url" in message
    assert "needs environment.llm_as_a_judge.model" in message
    assert "has no {answer}" in refused(*JUDGE, "environment.llm_as_a_judge.prompt_template=good?")
    assert "no regular expression" in refused(*JUDGE, "environment.llm_as_a_judge.score_pattern='Score: ('")
    assert "has no group" in refused(*JUDGE, "environment.llm_as_a_judge.score_pattern='Score'")
    assert "min_score=10 must be less" in refused(*JUDGE, "environment.llm_as_a_judge.min_score=10")


def test_a_judge_that_may_take_longer_than_a_step_is_told() -> None:
    assert "takes up to 243.5 s" in warned(*JUDGE, "environment.llm_as_a_judge.request_timeout_s=60")
