"""OpenAI's response objects for the two endpoints, whole and as the pieces of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from skyrl_train.serving.answer import AnswerPiece
from skyrl_train.serving.detokenize import REPLACEMENT
from skyrl_train.types import Completion

Json = dict[str, Any]


class Shape(Protocol):
    """How one endpoint writes an answer."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def choice(self, index: int, answer: AnswerPiece) -> Json:
        """A whole answer."""
        ...

    def delta(self, index: int, piece: AnswerPiece, *, is_first: bool) -> Json:
        """What an answer gained."""
        ...


class CompletionShape:
    """/v1/completions: `text` and parallel lists of log-probabilities."""

    id_prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def choice(self, index: int, answer: AnswerPiece) -> Json:
        return {
            "index": index,
            "text": answer.text,
            "logprobs": self._logprobs(answer),
            "finish_reason": answer.finish_reason,
        }

    def delta(self, index: int, piece: AnswerPiece, *, is_first: bool) -> Json:
        return self.choice(index, piece)

    def _logprobs(self, piece: AnswerPiece) -> Json | None:
        if piece.logprobs is None:
            return None
        return {
            "tokens": [entry.token for entry in piece.logprobs],
            "token_logprobs": [entry.logprob for entry in piece.logprobs],
            "top_logprobs": None,
            "text_offset": [entry.text_offset for entry in piece.logprobs],
        }


class ChatShape:
    """/v1/chat/completions: a message, and an entry for each token's log-probability."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def choice(self, index: int, answer: AnswerPiece) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.text},
            "logprobs": self._logprobs(answer),
            "finish_reason": answer.finish_reason,
        }

    def delta(self, index: int, piece: AnswerPiece, *, is_first: bool) -> Json:
        delta: Json = {"role": "assistant"} if is_first else {}
        if piece.text or is_first:
            delta["content"] = piece.text
        return {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
        }

    def _logprobs(self, piece: AnswerPiece) -> Json | None:
        if piece.logprobs is None:
            return None
        return {
            "content": [
                {
                    "token": entry.token,
                    "logprob": entry.logprob,
                    # Null where a token is a part of a character: its text doesn't tell its bytes.
                    "bytes": None if REPLACEMENT in entry.token else list(entry.token.encode()),
                    "top_logprobs": [],
                }
                for entry in piece.logprobs
            ],
            "refusal": None,
        }


def token_details(piece: AnswerPiece, prompt_token_ids: Sequence[int] | None) -> Json:
    """The extension `return_token_ids`: what was sampled, under which versions of the policy, after which prompt."""
    details: Json = {"token_ids": list(piece.token_ids)}
    if prompt_token_ids is not None:
        details["prompt_token_ids"] = list(prompt_token_ids)
    if piece.completion is not None:
        details["policy_versions"] = [
            {"version": span.version, "start": span.start, "end": span.end} for span in piece.completion.versions
        ]
    return details


@dataclass(kw_only=True)
class Usage:
    """Tokens of one HTTP request. A prompt counts once, however many answers it gets."""

    num_prompt_tokens: int
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    versions: set[int] = field(default_factory=set)

    def add(self, completion: Completion, *, is_first_of_prompt: bool) -> None:
        self.num_generated_tokens += len(completion.token_ids)
        self.versions.update(span.version for span in completion.versions)
        if is_first_of_prompt:
            # Further answers to a prompt find it in the cache because of the first: that saved nothing before.
            self.num_cached_tokens += completion.num_cached_tokens

    def to_json(self) -> Json:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_generated_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_generated_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }

    def fingerprint(self) -> str | None:
        """`system_fingerprint`, what may change an answer of a seed: the weights. `policy-4`, or `policy-4-5`."""
        if not self.versions:
            return None
        ends = sorted({min(self.versions), max(self.versions)})
        return "-".join(["policy", *map(str, ends)])
