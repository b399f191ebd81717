"""Messages to tokens and back, always through the tokenizer's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from skyrl_train.types import Message


def render_prompt(
    tokenizer: Any, messages: Sequence[Message], *, template_kwargs: dict[str, Any] | None = None
) -> tuple[int, ...]:
    """The token ids of a conversation, ending where the assistant's answer begins."""
    ids = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        **(template_kwargs or {}),
    )
    return tuple(ids)


def response_text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """What an environment reads: the text without special tokens (the end token among them)."""
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=True)
    return text
