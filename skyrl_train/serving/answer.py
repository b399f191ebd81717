"""What a client reads of an answer: text up to the stop, each token's log-probability, why it ended.

The engine keeps stop strings and end tokens in ids and log-probabilities; the text ends before them, as OpenAI's
does. While an answer grows, text that may turn out to begin a stop string is held back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from skyrl_train.serving.detokenize import REPLACEMENT, Detokenizer, decode
from skyrl_train.serving.protocol import TokenPiece, WholeAnswer
from skyrl_train.types import Completion


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """One sampled token: its text alone, and where its text begins in the answer."""

    token: str
    logprob: float
    text_offset: int


@dataclass(frozen=True, kw_only=True)
class AnswerPiece:
    """What an answer gained: all of it where it isn't streamed. The last piece has the completion.

    `logprobs` has one entry for each of `token_ids`, or is None if nobody asked.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    completion: Completion | None

    @property
    def finish_reason(self) -> str | None:
        return self.completion.finish_reason if self.completion else None


class AnswerReader:
    """Turns the tokens of one answer into what a client reads."""

    def __init__(self, tokenizer: Any, *, stop: tuple[str, ...] = (), with_logprobs: bool = False) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._with_logprobs = with_logprobs
        self._detokenizer = Detokenizer(tokenizer)
        self._text = ""
        self._num_shown = 0

    def read(self, piece: TokenPiece) -> AnswerPiece:
        """The next piece, in order."""
        logprobs: list[TokenLogprob] = []
        for position, token_id in enumerate(piece.token_ids):
            if self._with_logprobs:
                token = decode_one(self._tokenizer, token_id)
                logprobs.append(
                    TokenLogprob(token=token, logprob=piece.logprobs[position], text_offset=len(self._text))
                )
            if piece.completion is None or position < len(piece.token_ids) - 1:
                self._text += self._detokenizer.push(token_id)
        if piece.completion is None:
            end = len(self._text) - num_held_back(self._text, self._stop)
        else:
            end = self._finish(piece.completion)
        shown, self._num_shown = self._text[self._num_shown : end], end
        return AnswerPiece(
            text=shown,
            token_ids=piece.token_ids,
            logprobs=tuple(logprobs) if self._with_logprobs else None,
            completion=piece.completion,
        )

    def _finish(self, completion: Completion) -> int:
        """Adds the last token; where the visible text ends."""
        num_before = len(self._text)
        if completion.token_ids and not ends_with_stop_token(completion):
            self._text += self._detokenizer.push(completion.token_ids[-1])
        self._text += self._detokenizer.flush()
        return visible_len(self._text, num_before, completion)


def read_whole(
    tokenizer: Any, completion: Completion, *, stop: tuple[str, ...] = (), with_logprobs: bool = False
) -> AnswerPiece:
    """The answer as one piece; its text is what the pieces of a stream add up to."""
    if not with_logprobs:
        # Decoded at once, which is some ten times cheaper. Where bytes are no character, how many replacements
        # stand for them depends on the window, so those few answers go the way that streams go.
        ids = completion.token_ids[:-1] if ends_with_stop_token(completion) else completion.token_ids
        text = decode(tokenizer, ids)
        if REPLACEMENT not in text:
            num_before = len(text)
            if ends_with_stop_string(completion):
                num_before = len(decode(tokenizer, ids[:-1]).rstrip(REPLACEMENT))
            text = text[: visible_len(text, num_before, completion)]
            return AnswerPiece(text=text, token_ids=completion.token_ids, logprobs=None, completion=completion)
    reader = AnswerReader(tokenizer, stop=stop, with_logprobs=with_logprobs)
    return reader.read(WholeAnswer(completion=completion))


def ends_with_stop_token(completion: Completion) -> bool:
    """Whether the last token is there only to say that the answer is over."""
    return completion.finish_reason == "stop" and not isinstance(completion.stop_reason, str)


def ends_with_stop_string(completion: Completion) -> bool:
    """An aborted answer's stop reason is a string too, and none of its text."""
    return completion.finish_reason == "stop" and isinstance(completion.stop_reason, str)


def visible_len(text: str, num_before: int, completion: Completion) -> int:
    """Characters before the stop string that the last token completed; `num_before` were there without that token.

    A stop string that came before `min_tokens` did not end the answer and stays.
    """
    if not ends_with_stop_string(completion):
        return len(text)
    assert isinstance(completion.stop_reason, str)
    at = text.find(completion.stop_reason, max(0, num_before - len(completion.stop_reason) + 1))
    return at if at >= 0 else len(text)


def num_held_back(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of `text` with which a stop string begins: "12 EN", stop "END" -> 2."""
    longest = 0
    for word in stop:
        for length in range(min(len(word) - 1, len(text)), longest, -1):
            if text.endswith(word[:length]):
                longest = length
                break
    return longest


def decode_one(tokenizer: Any, token_id: int) -> str:
    """A token's own text, special tokens by name."""
    text: str = tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
