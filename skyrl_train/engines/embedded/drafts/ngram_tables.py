"""Where `ngram` keeps what was said, in C and in plain Python: both guess the same while the table has room.

Shapes: n requests, S seats, C positions, W guesses a row.
"""

from __future__ import annotations

import ctypes
from typing import Protocol

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.intp]
Ints = npt.NDArray[np.int32]
UInt64s = npt.NDArray[np.uint64]

WAYS = 4
LONG = 8
"""Of native/ngram.c: words of the longer of the two contexts under which a continuation is kept."""


class Table(Protocol):
    def guess(
        self,
        text: Ints,
        seats: Indices,
        length: Ints,
        prompt_len: Ints,
        prompt: UInt64s,
        learned: Ints,
        room: Ints,
        width: int,
    ) -> tuple[Ints, Ints]:
        """Learn what the seats' answers gained since word `learned` [n], which is moved on; then guess.

        text [S, C], of which row `seats[i]` has `length[i]` words. Guesses [n, W] and how many of them [n], `room` [n]
        at most. Requests with one `prompt` [n] learn from each other.
        """
        ...


class _Table(ctypes.Structure):
    """`Table` of ngram.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "stamps", "next")),
        ("num_buckets", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("reach", "shortest", "longest")),
        ("clock", ctypes.c_uint32),
    )


class NativeTable:
    """In C: one call for all requests of a step."""

    def __init__(self, native: ctypes.CDLL, *, capacity: int, reach: int, shortest: int, longest: int) -> None:
        buckets = 1 << max(0, -(-capacity // WAYS) - 1).bit_length()
        self._keys = np.zeros((buckets, WAYS), dtype=np.uint64)
        self._stamps = np.zeros((buckets, WAYS), dtype=np.uint32)
        self._next = np.zeros((buckets, WAYS, reach), dtype=np.int32)
        self._table = _Table(
            keys=self._keys.ctypes.data,
            stamps=self._stamps.ctypes.data,
            next=self._next.ctypes.data,
            num_buckets=buckets,
            reach=reach,
            shortest=shortest,
            longest=longest,
        )
        pointer, int32 = ctypes.c_void_p, ctypes.c_int32
        self._guess = native.ngram_guess
        self._guess.restype = None
        self._guess.argtypes = (pointer, int32, pointer, ctypes.c_int64, *(pointer,) * 7, int32, pointer)

    def guess(
        self,
        text: Ints,
        seats: Indices,
        length: Ints,
        prompt_len: Ints,
        prompt: UInt64s,
        learned: Ints,
        room: Ints,
        width: int,
    ) -> tuple[Ints, Ints]:
        n = len(seats)
        tokens, counts = np.zeros((n, width), dtype=np.int32), np.empty(n, dtype=np.int32)
        rows = np.ascontiguousarray(seats, dtype=np.int64)
        kept = [np.ascontiguousarray(array) for array in (length, prompt_len, prompt)]
        room = np.ascontiguousarray(room, dtype=np.int32)
        assert learned.flags.c_contiguous and text.strides[1] == text.itemsize
        self._guess(
            ctypes.addressof(self._table),
            n,
            text.ctypes.data,
            text.strides[0] // text.itemsize,
            rows.ctypes.data,
            *(array.ctypes.data for array in kept),
            learned.ctypes.data,
            room.ctypes.data,
            tokens.ctypes.data,
            width,
            counts.ctypes.data,
        )
        return tokens, counts


class PlainTable:
    """In Python, slow, and without a bound: what the other one is judged by, and what there is without a C compiler."""

    def __init__(self, *, reach: int, shortest: int, longest: int) -> None:
        self._reach, self._shortest, self._longest = reach, shortest, longest
        self._orders = tuple(dict.fromkeys((shortest, min(longest, LONG))))
        self._next: dict[tuple[int, tuple[int, ...]], list[int]] = {}

    def guess(
        self,
        text: Ints,
        seats: Indices,
        length: Ints,
        prompt_len: Ints,
        prompt: UInt64s,
        learned: Ints,
        room: Ints,
        width: int,
    ) -> tuple[Ints, Ints]:
        tokens, counts = np.zeros((len(seats), width), dtype=np.int32), np.zeros(len(seats), dtype=np.int32)
        words = [text[seat, :n].tolist() for seat, n in zip(seats, length, strict=True)]
        for i, known in enumerate(words):
            for at in range(max(int(learned[i]) - self._reach, int(prompt_len[i])), len(known)):
                self._learn(int(prompt[i]), known, at)
            learned[i] = len(known)
        for i, known in enumerate(words):
            guesses = self._guesses(int(prompt[i]), known)[: room[i]]
            tokens[i, : len(guesses)] = guesses
            counts[i] = len(guesses)
        return tokens, counts

    def _learn(self, prompt: int, words: list[int], at: int) -> None:
        coming = words[at : at + self._reach]
        for order in self._orders:
            if at >= order:
                key = (prompt, tuple(words[at - order : at]))
                if self._next.get(key, [])[: len(coming)] != coming:
                    self._next[key] = coming

    def _guesses(self, prompt: int, words: list[int]) -> list[int]:
        place, agree = self._own_place(words)
        if agree < self._orders[-1]:
            found = self._next.get((prompt, tuple(words[-self._orders[-1] :])))
            if found is None and not agree:
                found = self._next.get((prompt, tuple(words[-self._orders[0] :])))
            if found is not None:
                return found
        if not agree:
            return []
        period = words[place:]
        return [period[j % len(period)] for j in range(self._reach)]

    def _own_place(self, words: list[int]) -> tuple[int, int]:
        """Where what followed begins, and how many words agree before it."""
        best, place = 0, 0
        for end in range(len(words) - 1, 0, -1):
            same = 0
            while same < min(self._longest, end) and words[end - 1 - same] == words[-1 - same]:
                same += 1
            if same >= self._shortest and same > best:
                best, place = same, end
        return place, best
