"""From one turn's prompt to the next one's, in tokens: what was sampled is never encoded again.

    prompt        <user> 2+3? <end> <assistant>
    completion                                  <calc>2+3 <end>
    next prompt   <user> 2+3? <end> <assistant> <calc>2+3 <end> \\n <user> 5 <end> \\n <assistant>
                  └──────── as it went in ────┘ └─ sampled ──┘ └───── new: from the template ────┘

The new tokens come from the chat template itself: a short conversation with a marker for the assistant's answer is
rendered with the observations behind it, and what stands after the marker is what closes the assistant's turn, the
observations, and what opens the next answer. A separator that the template writes after the end token is in it, and
what the completion ends with already (its end token, as a rule) is not repeated. An answer that ended by a stop string
has no end token: the template's is added, and nobody is trained on it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from skyrl_train.data.chat import render_prompt
from skyrl_train.errors import ConfigError
from skyrl_train.types import Message

ChatHistory = Literal["exact", "template"]

_ASKED: Message = {"role": "user", "content": "question"}
_MARKER = "THE-ANSWER-STANDS-HERE"
_ANSWERED: Message = {"role": "assistant", "content": _MARKER}

Ids = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ChatTurns:
    """How a trajectory's conversation becomes tokens.

    `conversation`: each observation is a chat message; False appends their text to one long assistant message.
    `history` "template" renders all messages anew before each turn, for templates that rewrite earlier turns (drop
    their reasoning, say): what the model then sees differs from what it sampled, and each turn is trained on its own.
    """

    tokenizer: Any
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    conversation: bool = True
    history: ChatHistory = "exact"

    def first(self, messages: Sequence[Message]) -> Ids:
        """The first turn's prompt."""
        return render_prompt(self.tokenizer, messages, template_kwargs=dict(self.template_kwargs))

    def following(
        self,
        prompt: Ids,
        completion: Ids,
        observations: Sequence[Message],
        *,
        messages: Sequence[Message],
        edited: str | None = None,
    ) -> Ids:
        """The next turn's prompt. `messages` is the whole conversation, the answer and `observations` included.

        `edited` is what the environment wants to stand in the history in the completion's place.
        """
        if self.history == "template":
            return self.first(messages)
        if edited is not None:
            completion = self._encode(edited)
        if not self.conversation:
            return prompt + completion + self._encode("".join(str(message["content"]) for message in observations))
        new = self.after_answer(observations)
        return prompt + completion + new[_overlap(completion, new[: len(self._closing)]) :]

    def after_answer(self, observations: Sequence[Message]) -> Ids:
        """What follows an answer's text: the end of its message, the observations, the start of the next answer."""
        return self._encode(self._after_marker(observations, add_generation_prompt=True))

    def check(self) -> None:
        """Raises ConfigError for a template that can't carry a conversation on."""
        try:
            self.following((), (), [_ASKED], messages=[_ASKED, _ANSWERED, _ASKED])
        except ConfigError:
            raise
        except Exception as exc:  # whatever a template raises
            raise ConfigError(
                f"generator.max_turns > 1: the chat template refuses a user message after an assistant's: "
                f"{type(exc).__name__}: {exc}"
            ) from exc

    @functools.cached_property
    def _closing(self) -> Ids:
        return self._encode(self._after_marker((), add_generation_prompt=False))

    def _after_marker(self, observations: Sequence[Message], *, add_generation_prompt: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(
            [_ASKED, _ANSWERED, *(dict(message) for message in observations)],
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **self.template_kwargs,
        )
        _, found, after = text.partition(_MARKER)
        if not found:
            raise ConfigError("generator.max_turns > 1: the chat template leaves out what the assistant said")
        return after

    def _encode(self, text: str) -> Ids:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids) if text else ()


def _overlap(sampled: Ids, closing: Ids) -> int:
    """How many tokens of `closing` the sampled ones end with: (7, 8, END) and (END, NEWLINE) share 1."""
    for size in range(min(len(sampled), len(closing)), 0, -1):
        if sampled[-size:] == closing[:size]:
            return size
    return 0
