"""Token ids to text, one token at a time, so that text once given out never changes.

A character may lie across tokens: "€" is the bytes e2 82 ac. Decoders write U+FFFD for a part of one:

    push(e2) -> ""      decoder says "\\ufffd": may become a character, held back
    push(82) -> ""
    push(ac) -> "€"

Only a window is decoded, not the whole answer: `context` (already given out; some decoders need the token before
to place a space) and `pending` after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"
MAX_HALF_LEN = 3
"""A part of a character is at most 3 bytes, for which decoders write 1 to 3 replacement characters."""
WINDOW_TOKENS = 8
MAX_WINDOW_TOKENS = 16


class Detokenizer:
    """The text of one answer. Special tokens have none.

    What the tokens up to here decide is given out at once, so the whole is a function of the ids alone, however
    they came. Bytes that are no character come out as U+FFFD.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []
        self._context_text = ""
        self._seen = ""
        """Text of context and of pending, as far as it was given out."""

    def push(self, token_id: int) -> str:
        """The text that this token settles."""
        self._pending.append(token_id)
        text = decode(self._tokenizer, self._context + self._pending)
        # Byte-fallback decoders turn whole characters into replacements again while another one is incomplete.
        withdrawn = not text.startswith(self._seen)
        settled = self._seen if withdrawn else _without_half(text, len(self._seen))
        new = settled[len(self._seen) :]
        self._seen = settled
        if len(self._pending) >= (WINDOW_TOKENS if settled == text else MAX_WINDOW_TOKENS):
            new += self._rest_of_pending() if withdrawn else ""
            self._context, self._pending = self._pending, []
            text = decode(self._tokenizer, self._context)
            self._context_text = self._seen = text if withdrawn else _without_half(text, 0)
        return new

    def flush(self) -> str:
        """What was held back: the answer is over."""
        text = decode(self._tokenizer, self._context + self._pending)
        if text.startswith(self._seen):
            return text[len(self._seen) :]
        return self._rest_of_pending()

    def _rest_of_pending(self) -> str:
        shown = self._seen[len(self._context_text) :]
        return decode(self._tokenizer, self._pending).removeprefix(shown)


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The text of ids as a reader wants it: without special tokens, spaces as they are."""
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def _without_half(text: str, min_len: int) -> str:
    """`text` without a character at its end that may be incomplete, but not shorter than `min_len`."""
    end = len(text)
    while end > max(min_len, len(text) - MAX_HALF_LEN) and text[end - 1] == REPLACEMENT:
        end -= 1
    return text[:end]
