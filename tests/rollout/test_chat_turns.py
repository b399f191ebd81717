"""Tokens of several turns: nothing sampled is lost, moved or encoded again, whatever the chat template."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_train.errors import ConfigError
from skyrl_train.rollout.chat_turns import ChatTurns
from skyrl_train.rollout.samples import make_sequences
from tests.rollout.conversing import ASKED, FORGETFUL, TEMPLATES, ScriptedPolicy, converse, says, tokenizer_with
from tests.tiny import EOS_ID, make_tokenizer

TOKENIZERS = {name: tokenizer_with(name) for name in TEMPLATES}
NEWLINE = 10

# What a template's `trim` would not change, and no special token in plain text.
texts = st.text(st.characters(codec="utf-8", exclude_characters="<["), max_size=12).map(str.strip)
turns = st.lists(
    st.tuples(
        st.sampled_from(["text", "ids", "stop"]),
        texts,
        st.lists(st.integers(0, 255), max_size=5),
        st.lists(st.tuples(st.sampled_from(["user", "tool"]), texts), min_size=1, max_size=2),
        st.floats(-1, 1, width=32),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(TEMPLATES)), turns=turns, conversation=st.booleans())
def test_every_sampled_token_is_a_loss_token_once_and_nothing_else_is(
    name: str, turns: list[Any], conversation: bool
) -> None:
    tokenizer = TOKENIZERS[name]
    # Nothing ends an answer before its first token.
    turns = [(kind, text or "!" if kind == "stop" else text, *more) for kind, text, *more in turns]
    answers = [
        (*(ids if kind == "ids" else tokenizer(text, add_special_tokens=False).input_ids),)
        + (() if kind == "stop" else (tokenizer.eos_token_id,))
        for kind, text, ids, _, _ in turns
    ]
    script = [
        {"observations": [{"role": role, "content": text} for role, text in observations], "reward": reward}
        for _, _, _, observations, reward in turns
    ]
    policy = ScriptedPolicy(answers)
    trajectory = asyncio.run(converse(policy, script, tokenizer=tokenizer, use_conversation_multi_turn=conversation))
    assert trajectory.status == "completed", trajectory.error

    (sequence,) = make_sequences(trajectory)
    sampled = [token for answer in answers for token in answer]
    assert sequence.token_ids[sequence.loss_mask].tolist() == sampled
    assert torch.equal(
        sequence.rollout_logprobs[sequence.loss_mask], torch.tensor([-k / 100 for k in range(len(sampled))])
    )
    assert not sequence.rollout_logprobs[~sequence.loss_mask].any() and not sequence.rewards[~sequence.loss_mask].any()
    ends = [len(turn.prompt_token_ids) + len(turn.completion.token_ids) for turn in trajectory.turns]
    assert [sequence.rewards[end - 1].item() for end in ends] == list(trajectory.rewards)
    assert sequence.num_prompt_tokens == len(trajectory.turns[0].prompt_token_ids)

    if conversation:  # an answer that is text, ended as the template ends it, is what the template would write
        spoken = [(text, observations) for kind, text, _, observations, _ in turns if kind != "ids"]
        if len(spoken) == len(turns):
            messages: list[dict[str, str]] = [dict(message) for message in ASKED]
            for number, (text, observations) in enumerate(spoken):
                messages.append({"role": "assistant", "content": text})
                if number < len(spoken) - 1:
                    messages += [{"role": role, "content": content} for role, content in observations]
            whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
            assert sequence.token_ids.tolist() == whole[: len(sequence.token_ids)]


def test_the_separator_behind_the_end_token_is_kept_and_not_trained_on() -> None:
    tokenizer = make_tokenizer()
    chat = ChatTurns(tokenizer=tokenizer)
    prompt = chat.first(ASKED)
    answer = (*b"2+3", EOS_ID)
    following = chat.following(prompt, answer, says("5")["observations"], messages=())
    assert following[: len(prompt) + len(answer)] == prompt + answer
    assert tokenizer.decode(following[len(prompt) + len(answer) :]) == (
        "\n<|im_start|>user\n5<|im_end|>\n<|im_start|>assistant\n"
    )
    assert following[len(prompt) + len(answer)] == NEWLINE


def test_an_answer_that_ended_without_its_end_token_gets_one() -> None:
    tokenizer = make_tokenizer()
    chat = ChatTurns(tokenizer=tokenizer)
    following = chat.following((1,), (*b"</calc>",), says("5")["observations"], messages=())
    assert tokenizer.decode(following[1:]).startswith("</calc><|im_end|>\n<|im_start|>user\n5<|im_end|>")
    # A newline of its own is no separator: the end token and the template's newline still follow.
    following = chat.following((1,), (*b"hm\n",), says("5")["observations"], messages=())
    assert tokenizer.decode(following[1:]).startswith("hm\n<|im_end|>\n<|im_start|>user")


def test_an_end_token_that_is_not_the_templates_stays_and_the_templates_follows() -> None:
    tokenizer = make_tokenizer()
    (other,) = tokenizer("<|endoftext|>").input_ids
    following = ChatTurns(tokenizer=tokenizer).following((1,), (65, other), says("5")["observations"], messages=())
    assert tokenizer.decode(following[1:]).startswith("A<|endoftext|><|im_end|>\n<|im_start|>user")


async def test_observations_within_one_answer_are_text_and_nothing_else() -> None:
    answers = [b"<search>x</search>", (*b"done", EOS_ID)]
    policy = ScriptedPolicy(answers)
    await converse(policy, [says("\n<info>y</info>\n"), {}], use_conversation_multi_turn=False)
    first, second = (request.prompt_token_ids for request in policy.requests)
    assert bytes(second[len(first) :]) == b"<search>x</search>\n<info>y</info>\n"


async def test_a_template_that_forgets_reasoning_opens_a_second_sequence_when_asked_to() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = FORGETFUL
    answers = [(*b"hm</think>4", EOS_ID), (*b"so</think>5", EOS_ID)]
    policy = ScriptedPolicy(answers)
    trajectory = await converse(policy, [says("no"), {}], tokenizer=tokenizer, chat_history="template")
    second = tokenizer.decode(policy.requests[1].prompt_token_ids)
    assert second.endswith("assistant\n4<|im_end|>\n<|im_start|>user\nno<|im_end|>\n<|im_start|>assistant\n")
    sequences = make_sequences(trajectory)
    assert [tuple(s.token_ids[s.loss_mask].tolist()) for s in sequences] == answers

    policy = ScriptedPolicy(answers)
    trajectory = await converse(policy, [says("no"), {}], tokenizer=tokenizer)
    assert "hm</think>4<|im_end|>" in tokenizer.decode(policy.requests[1].prompt_token_ids)
    assert len(make_sequences(trajectory)) == 1


async def test_a_template_that_keeps_history_gives_one_sequence_either_way() -> None:
    answers = [(*b"4", EOS_ID), (*b"5", EOS_ID)]
    found = []
    for history in ("exact", "template"):
        trajectory = await converse(ScriptedPolicy(answers), [says("no"), {}], chat_history=history)
        found.append([s.token_ids.tolist() for s in make_sequences(trajectory)])
    assert found[0] == found[1] and len(found[0]) == 1


async def test_an_answer_that_the_environment_rewrote_stands_in_the_history_and_both_are_right() -> None:
    answers = [(*b"<calc>1+1</calc> so 2", EOS_ID), (*b"2", EOS_ID)]
    script = [says("2", postprocessed_action="<calc>1+1</calc>", reward=0.25), {"reward": 1.0}]
    policy = ScriptedPolicy(answers)
    trajectory = await converse(policy, script)
    tokenizer = make_tokenizer()
    assert tokenizer.decode(policy.requests[1].prompt_token_ids).endswith(
        "assistant\n<calc>1+1</calc><|im_end|>\n<|im_start|>user\n2<|im_end|>\n<|im_start|>assistant\n"
    )
    sequences = make_sequences(trajectory)
    assert [tuple(s.token_ids[s.loss_mask].tolist()) for s in sequences] == answers
    assert [s.rewards.sum().item() for s in sequences] == [0.25, 1.0]


async def test_an_action_that_came_back_as_it_was_edits_nothing() -> None:
    policy = ScriptedPolicy([(*b"4", EOS_ID), (*b"5", EOS_ID)])
    trajectory = await converse(policy, [says("no", postprocessed_action="4"), {}])
    assert len(make_sequences(trajectory)) == 1


def test_a_template_that_can_not_go_on_is_refused_before_the_start() -> None:
    tokenizer = make_tokenizer()
    ChatTurns(tokenizer=tokenizer).check()
    tokenizer.chat_template = "{% if messages | length > 1 %}{{ raise_exception('one message only') }}{% endif %}x"
    with pytest.raises(ConfigError, match=r"chat template refuses .*one message only"):
        ChatTurns(tokenizer=tokenizer).check()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ConfigError, match="leaves out what the assistant said"):
        ChatTurns(tokenizer=tokenizer).check()
