"""Whole conversations to learn from: every assistant message is what the policy should have sampled.

    user "2+3=" assistant "5" user "and 1 more?" assistant "6"

    <user> 2+3= <end> <assistant> 5 <end> <user> and 1 more? <end> <assistant> 6 <end>
    loss                          1   1                                        1   1

The tokens in the loss are those that rollouts are made of: an answer and the token that ends it, after the very prompt
that `render_prompt` gives the engine. What the template adds after the end token belongs to the next prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from skyrl_train.data.chat import render_prompt
from skyrl_train.errors import ConfigError, DataError
from skyrl_train.rollout.samples import make_sequences
from skyrl_train.types import (
    Completion,
    Message,
    TokenSequence,
    TrainingSample,
    Trajectory,
    TrajectoryId,
    Turn,
    VersionSpan,
)


def check_conversation(messages: Sequence[Message]) -> None:
    """Raises DataError unless an assistant answers something."""
    roles = [message["role"] for message in messages]
    if "assistant" not in roles[1:]:
        raise DataError(f"a conversation needs an assistant message after the first one, found roles {roles}")
    for message in messages:
        if message["role"] == "assistant" and not isinstance(message["content"], str):
            raise DataError(f"an assistant message's content must be text, found {message['content']!r:.80}")


def encode_conversation(
    tokenizer: Any, messages: Sequence[Message], *, name: str, template_kwargs: Mapping[str, Any] | None = None
) -> list[TrainingSample]:
    """Its sequences, with advantage 1 on every token that the assistant wrote.

    One sequence, or more where the template edits the history (drops earlier reasoning, say): then each is what a
    rollout would have seen. Raises ConfigError when the template's text of a conversation doesn't begin with that
    of its prompt: an answer's tokens can't be told then.
    """
    turns = []
    options = dict(template_kwargs or {})
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or number == 0:
            continue
        before = _text(tokenizer, messages[:number], add_generation_prompt=True, options=options)
        after = _text(tokenizer, messages[: number + 1], add_generation_prompt=False, options=options)
        if not after.startswith(before):
            raise ConfigError(
                f"the tokenizer's chat template writes {after[len(before) - 20 :]!r:.80} where a prompt would end with "
                f"{before[-20:]!r}: what the assistant is to answer can't be told from the rest (message {number} of "
                f"{name}); set generator.chat_template_kwargs so that both begin alike"
            )
        turns.append(
            _turn(
                render_prompt(tokenizer, messages[:number], template_kwargs=options),
                _up_to_end(tokenizer, after[len(before) :]),
                f"{name}/{number}",
            )
        )
    trajectory = Trajectory(
        id=TrajectoryId(prompt_id=name, sample=0),
        turns=tuple(turns),
        rewards=(0.0,) * len(turns),
        status="completed",
    )
    return [
        TrainingSample(
            **{field.name: getattr(sequence, field.name) for field in fields(TokenSequence)},
            advantages=sequence.loss_mask.float(),
        )
        for sequence in make_sequences(trajectory)
    ]


def _text(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool, options: dict[str, Any]) -> str:
    text: str = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        add_generation_prompt=add_generation_prompt,
        tokenize=False,
        **options,
    )
    return text


def _up_to_end(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The answer's ids, the end token last. A template that ends answers with another token keeps all that it wrote."""
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    end = tokenizer.eos_token_id
    return tuple(ids[: ids.index(end) + 1] if end in ids else ids)


def _turn(prompt: tuple[int, ...], answer: tuple[int, ...], name: str) -> Turn:
    """As if it had been sampled. No engine did: its log-probabilities are 0, and nothing here reads them."""
    return Turn(
        prompt_token_ids=prompt,
        completion=Completion(
            request_id=name,
            token_ids=answer,
            logprobs=(0.0,) * len(answer),
            finish_reason="stop",
            versions=(VersionSpan(version=0, start=0, end=len(answer)),) if answer else (),
        ),
    )
