"""When an answer ends: end tokens, stop ids, stop strings, length.

Ids and lengths are checked for all rows at once; strings only for the requests that have some.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from skyrl_train.types import SamplingParams

NO_ID = -1
HALF_CHARACTER = "\ufffd"
"""What decoders write for bytes that are no character, or not yet."""
MARGIN_CHARS = 8


def end_token_ids(model: torch.nn.Module, tokenizer: Any, extra: Sequence[int] = ()) -> tuple[int, ...]:
    """The ids that end an answer: of the generation config, of the model config, of the tokenizer, and `extra` ones."""
    sources = [getattr(getattr(model, "generation_config", None), "eos_token_id", None)]
    model_config: Any = model.config
    sources.append(getattr(model_config.get_text_config(), "eos_token_id", None))
    sources.append(getattr(tokenizer, "eos_token_id", None))
    ids = [i for source in sources if source is not None for i in (source if isinstance(source, list) else [source])]
    return tuple(dict.fromkeys([*ids, *extra]))


class StopTable:
    """`ids` [S, K]: the ids that end each seat's answer, filled up with NO_ID."""

    def __init__(self, num_seats: int, eos_ids: Sequence[int]) -> None:
        self._eos_ids = tuple(eos_ids)
        self.ids = np.full((num_seats, max(len(self._eos_ids), 1)), NO_ID, dtype=np.int32)
        self.strings: dict[int, tuple[str, ...]] = {}

    def set(self, seat: int, sampling: SamplingParams) -> None:
        ids = dict.fromkeys(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            ids |= dict.fromkeys(self._eos_ids)
        if len(ids) > self.ids.shape[1]:
            more = np.full((len(self.ids), len(ids) - self.ids.shape[1]), NO_ID, dtype=np.int32)
            self.ids = np.concatenate((self.ids, more), axis=1)
        self.ids[seat] = NO_ID
        self.ids[seat, : len(ids)] = list(ids)
        self.strings.pop(seat, None)
        if sampling.stop:
            self.strings[seat] = sampling.stop

    def hits(self, seats: npt.NDArray[np.intp], tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """[n]: whether each token is one that ends its request."""
        result: npt.NDArray[np.bool_] = (self.ids[seats] == tokens[:, None]).any(axis=1)
        return result


def completed_stop(tokenizer: Any, answer: Sequence[int], stops: tuple[str, ...]) -> str | None:
    """The stop string that the last token of `answer` completes, the earliest in the text if several; else None.

    Only the answer's end is decoded: enough tokens to hold the longest stop string. Text is compared with and
    without the last token, so a string counts once, at the token that completes it. A trailing half character is
    no text yet; at the window's start one costs at most a character, which the margin covers.
    """
    needed = max(len(stop) for stop in stops) + MARGIN_CHARS
    size = 2 * needed
    while True:
        window = list(answer[-size:])
        before = _decode(tokenizer, window[:-1])
        if len(before) >= needed or size >= len(answer):
            break
        size *= 2
    text = _decode(tokenizer, window)
    found: list[tuple[int, str]] = []
    for stop in stops:
        at = text.find(stop, max(0, len(before) - len(stop) + 1))
        if at >= 0:
            found.append((at, stop))
    return min(found)[1] if found else None


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text.rstrip(HALF_CHARACTER)
