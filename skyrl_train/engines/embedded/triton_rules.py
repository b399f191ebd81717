"""Penalties, early end tokens, top-k, top-p and min-p on a GPU, for the rows that ask for them.

    _mark          what a row's text says of each word: in the prompt, how often in the answer, forbidden so far
    _pick_by_rules one program a row: threshold of what stays, found by bisection; then the inverse of the cumulative
                   distribution over what stays
    _unmark        the marks are zero again

The definition is `sampler.Sampler.sample`'s: penalties on the logits, bans, then top-k, top-p and min-p of
softmax(logits / temperature) with ties ranked by id, then the first word in the order of ids whose cumulative
probability exceeds the uniform number; the log-probability is that before penalties, bans and truncation.

What stays is a set of the largest logits, so one number and, for its equals, a rank describe it. The number is found
on the floats' bits, whose order as integers is that of the floats: at most 32 passes over the row, each narrowing to
numbers that occur, about half as many in practice. Sums are float32 within a block and float64 over blocks.

Shapes: n rows, S seats, C positions, V words, K end tokens of a seat.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl

BLOCK = 4096
HISTORY_BLOCK = 1024
_BANNED = tl.constexpr(1 << 30)
_IN_PROMPT = tl.constexpr(1 << 29)
_COUNT = tl.constexpr((1 << 29) - 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class RowRules:
    """[n] each. top_k, prompt_len, min_len int64 (0: no top-k; lengths in tokens); the rest float64."""

    top_k: torch.Tensor
    prompt_len: torch.Tensor
    min_len: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor

    @classmethod
    def unpacked(cls, packed: torch.Tensor) -> RowRules:
        """packed [8, n] int64, in the order of the fields; numbers are float64's bits."""
        parts = [packed[i] if i < 3 else packed[i].view(torch.float64) for i in range(len(fields(cls)))]
        return cls(**{field.name: part for field, part in zip(fields(cls), parts, strict=True)})


NUM_RULES = 8


@triton.jit  # type: ignore[untyped-decorator]
def _mark(  # type: ignore[no-untyped-def]
    row_seats,
    row_positions,
    tokens,
    end_ids,
    prompt_len,
    min_len,
    repetition,
    presence,
    frequency,
    marks,
    tokens_stride,
    end_ids_stride,
    marks_stride,
    num_end_ids,
    BLOCK: tl.constexpr,
    END_BLOCK: tl.constexpr,
    CLEAR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    seat = tl.load(row_seats + row).to(tl.int64)
    known = tl.load(row_positions + row) + 1
    if (block == 0) & (known < tl.load(min_len + row)):
        k = tl.arange(0, END_BLOCK)
        word = tl.load(end_ids + seat * end_ids_stride + k, mask=k < num_end_ids, other=-1).to(tl.int64)
        if CLEAR:
            tl.store(marks + row * marks_stride + word, tl.zeros([END_BLOCK], tl.int32), mask=word >= 0)
        else:
            banned = tl.zeros([END_BLOCK], tl.int32) + _BANNED
            tl.atomic_or(marks + row * marks_stride + word, banned, mask=word >= 0)
    penalised = tl.load(repetition + row) != 1.0
    penalised = penalised | (tl.load(presence + row) != 0.0) | (tl.load(frequency + row) != 0.0)
    if penalised & (block * BLOCK < known):
        j = block * BLOCK + tl.arange(0, BLOCK)
        inside = j < known
        word = tl.load(tokens + seat * tokens_stride + j, mask=inside, other=0).to(tl.int64)
        target = marks + row * marks_stride + word
        if CLEAR:
            tl.store(target, tl.zeros([BLOCK], tl.int32), mask=inside)
        else:
            in_prompt = j < tl.load(prompt_len + row)
            tl.atomic_or(target, tl.zeros([BLOCK], tl.int32) + _IN_PROMPT, mask=inside & in_prompt)
            tl.atomic_add(target, tl.zeros([BLOCK], tl.int32) + 1, mask=inside & (in_prompt == 0))


@triton.jit
def _draw(logits, marks, word, present, num_marked, repetition, presence, frequency):  # type: ignore[no-untyped-def]
    """The row's logits at `word` after penalties and bans. `num_marked`: words with marks, 0 for a row without any."""
    x = tl.load(logits + word, mask=present, other=-float("inf")).to(tl.float32)
    mark = tl.load(marks + word, mask=word < num_marked, other=0)
    count = mark & _COUNT
    seen = (mark & (_COUNT | _IN_PROMPT)) != 0
    x = tl.where(seen, tl.where(x > 0, x / repetition, x * repetition), x)
    x = x - count.to(tl.float32) * frequency
    x = x - (count > 0).to(tl.float32) * presence
    x = tl.where((mark & _BANNED) != 0, -float("inf"), x)
    return tl.where(x == 0.0, 0.0, x)  # one zero: equal numbers must have equal bits


@triton.jit
def _key(x):  # type: ignore[no-untyped-def]
    """Integers in the order of the floats."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _unkey(key):  # type: ignore[no-untyped-def]
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _lowest_reaching(  # type: ignore[no-untyped-def]
    logits,
    marks,
    num_marked,
    repetition,
    presence,
    frequency,
    num_words,
    best,
    scale,
    low,
    high,
    wanted,
    BY_COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest key t that occurs, in [low, high], such that the words with a key >= t reach `wanted`.

    They are counted, or their weights exp((x - best) / scale) summed. `low` reaches it; `low` and `high` occur.
    """
    while low < high:
        middle = (low.to(tl.int64) + (high.to(tl.int64) - low.to(tl.int64) + 1) // 2).to(tl.int32)
        reached = wanted * 0
        above = high
        below = low
        for begin in range(0, num_words, BLOCK):
            word = begin + tl.arange(0, BLOCK)
            present = word < num_words
            x = _draw(logits, marks, word, present, num_marked, repetition, presence, frequency)
            key = _key(x)
            upper = present & (key >= middle)
            if BY_COUNT:  # noqa: SIM108
                part = tl.where(upper, 1.0, 0.0)
            else:
                part = tl.where(upper, tl.exp((x - best) / scale), 0.0)
            reached += tl.sum(part, 0).to(tl.float64)
            above = tl.minimum(above, tl.min(tl.where(upper, key, high), 0))
            below = tl.maximum(below, tl.max(tl.where(present & (key < middle), key, low), 0))
        if reached >= wanted:
            low = above
        else:
            high = below
    return low


@triton.jit  # type: ignore[untyped-decorator]
def _pick_by_rules(  # type: ignore[no-untyped-def]
    logits,
    marks,
    row_positions,
    temperature,
    uniform,
    top_k,
    min_len,
    top_p,
    min_p,
    repetition,
    presence,
    frequency,
    block_max,
    block_sum,
    tokens,
    logprobs,
    logits_stride,
    marks_stride,
    num_words,
    num_blocks,
    BLOCK: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    floor = tl.load(min_p + row)
    rep = tl.load(repetition + row).to(tl.float32)
    pres = tl.load(presence + row).to(tl.float32)
    freq = tl.load(frequency + row).to(tl.float32)
    heat = tl.load(temperature + row)
    greedy = heat == 0
    scale = tl.where(greedy, 1.0, heat)
    has_marks = (rep != 1.0) | (pres != 0.0) | (freq != 0.0)
    has_marks = has_marks | (tl.load(row_positions + row) + 1 < tl.load(min_len + row))
    truncates = ((k > 0) | (p < 1.0) | (floor > 0.0)) & (greedy == 0)
    if has_marks | truncates:
        num_marked = tl.where(has_marks, num_words, 0)
        logits += row * logits_stride
        marks += row * marks_stride
        # The largest, the first of its equals, and the smallest.
        best = -float("inf") + tl.zeros([1], tl.float32)
        least = float("inf") + tl.zeros([1], tl.float32)
        first = num_words + tl.zeros([1], tl.int32)
        for begin in range(0, num_words, BLOCK):
            word = begin + tl.arange(0, BLOCK)
            present = word < num_words
            x = _draw(logits, marks, word, present, num_marked, rep, pres, freq)
            here = tl.max(x, 0)
            where = tl.min(tl.where(present & (x == here), word, num_words), 0)
            first = tl.where(here > best, where, first)
            best = tl.maximum(best, here)
            least = tl.minimum(least, tl.min(tl.where(present, x, float("inf")), 0))
        best = tl.max(best, 0)
        least = tl.min(least, 0)
        first = tl.min(first, 0)
        token = first
        if greedy == 0:
            top = _key(best)
            bar = _key(least)  # words above it stay, and the first `rank` of its equals
            rank = num_words.to(tl.float64)
            if truncates:
                if (k > 0) & (k < num_words):
                    wanted = k.to(tl.float64)
                    bar = _lowest_reaching(
                        logits,
                        marks,
                        num_marked,
                        rep,
                        pres,
                        freq,
                        num_words,
                        best,
                        scale,
                        bar,
                        top,
                        wanted,
                        True,
                        BLOCK,
                    )
                over = tl.zeros([1], tl.float64)
                over_mass = tl.zeros([1], tl.float64)
                equal = tl.zeros([1], tl.float64)
                for begin in range(0, num_words, BLOCK):
                    word = begin + tl.arange(0, BLOCK)
                    present = word < num_words
                    x = _draw(logits, marks, word, present, num_marked, rep, pres, freq)
                    key = _key(x)
                    above = present & (key > bar)
                    over += tl.sum(tl.where(above, 1.0, 0.0), 0).to(tl.float64)
                    equal += tl.sum(tl.where(present & (key == bar), 1.0, 0.0), 0).to(tl.float64)
                    over_mass += tl.sum(tl.where(above, tl.exp((x - best) / scale), 0.0), 0).to(tl.float64)
                over_count = tl.sum(over, 0)
                rank = tl.sum(equal, 0)
                if (k > 0) & (k < num_words):
                    rank = tl.minimum(rank, k.to(tl.float64) - over_count)
                if p < 1.0:
                    weight = tl.exp((_unkey(bar) - best) / scale).to(tl.float64)
                    wanted = p * (tl.sum(over_mass, 0) + rank * weight)
                    reached_at = _lowest_reaching(
                        logits,
                        marks,
                        num_marked,
                        rep,
                        pres,
                        freq,
                        num_words,
                        best,
                        scale,
                        bar,
                        top,
                        wanted,
                        False,
                        BLOCK,
                    )
                    before = tl.zeros([1], tl.float64)
                    equal = tl.zeros([1], tl.float64)
                    for begin in range(0, num_words, BLOCK):
                        word = begin + tl.arange(0, BLOCK)
                        present = word < num_words
                        x = _draw(logits, marks, word, present, num_marked, rep, pres, freq)
                        key = _key(x)
                        above = present & (key > reached_at)
                        before += tl.sum(tl.where(above, tl.exp((x - best) / scale), 0.0), 0).to(tl.float64)
                        equal += tl.sum(tl.where(present & (key == reached_at), 1.0, 0.0), 0).to(tl.float64)
                    # The j-th of the equals stays while the mass before it, before + j * weight, is below `wanted`.
                    weight = tl.exp((_unkey(reached_at) - best) / scale).to(tl.float64)
                    room = tl.ceil((wanted - tl.sum(before, 0)) / tl.where(weight > 0, weight, 1.0))
                    room = tl.minimum(room, tl.sum(equal, 0))
                    rank = tl.where(reached_at == bar, tl.minimum(rank, room), room)
                    bar = reached_at
                rank = tl.maximum(rank, 1.0)
            # What stays, in the order of ids: first its mass, then where the uniform number falls.
            kept_mass = tl.zeros([1], tl.float64)
            before_equal = tl.zeros([1], tl.float64)
            for begin in range(0, num_words, BLOCK):
                word = begin + tl.arange(0, BLOCK)
                present = word < num_words
                x = _draw(logits, marks, word, present, num_marked, rep, pres, freq)
                key = _key(x)
                tie = present & (key == bar)
                order = tl.cumsum(tl.where(tie, 1.0, 0.0), 0).to(tl.float64) + before_equal
                weight = tl.exp((x - best) / scale)
                kept = (present & (key > bar)) | (tie & (order <= rank))
                kept = (kept & (weight.to(tl.float64) >= floor)) | (word == first)
                kept_mass += tl.sum(tl.where(kept, weight, 0.0), 0).to(tl.float64)
                before_equal += tl.sum(tl.where(tie, 1.0, 0.0), 0).to(tl.float64)
            target = tl.load(uniform + row) * tl.sum(kept_mass, 0)
            done = tl.zeros([1], tl.float64)
            before_equal = tl.zeros([1], tl.float64)
            chosen = num_words + tl.zeros([1], tl.int32)
            last = first + tl.zeros([1], tl.int32)
            for begin in range(0, num_words, BLOCK):
                word = begin + tl.arange(0, BLOCK)
                present = word < num_words
                x = _draw(logits, marks, word, present, num_marked, rep, pres, freq)
                key = _key(x)
                tie = present & (key == bar)
                order = tl.cumsum(tl.where(tie, 1.0, 0.0), 0).to(tl.float64) + before_equal
                weight = tl.exp((x - best) / scale)
                kept = (present & (key > bar)) | (tie & (order <= rank))
                kept = (kept & (weight.to(tl.float64) >= floor)) | (word == first)
                weight = tl.where(kept, weight, 0.0)
                inside = tl.cumsum(weight, 0)
                rest = (target - done).to(tl.float32)
                here = tl.min(tl.where((inside > rest) & (weight > 0), word, num_words), 0)
                chosen = tl.minimum(chosen, here)
                # Rounding at the very end falls back to the last word that has any mass.
                last = tl.maximum(last, tl.max(tl.where(weight > 0, word, 0), 0))
                done += tl.sum(weight, 0).to(tl.float64)
                before_equal += tl.sum(tl.where(tie, 1.0, 0.0), 0).to(tl.float64)
            token = tl.minimum(tl.min(chosen, 0), tl.max(last, 0))
        b = tl.arange(0, MAX_BLOCKS)
        known = b < num_blocks
        maxima = tl.load(block_max + row * num_blocks + b, mask=known, other=-float("inf"))
        sums = tl.load(block_sum + row * num_blocks + b, mask=known, other=0.0)
        highest = tl.max(maxima, 0)
        total = tl.sum((sums * tl.exp(maxima - highest)).to(tl.float64), 0)
        token = tl.minimum(token, num_words - 1)
        value = tl.load(logits + token).to(tl.float32) / scale
        tl.store(tokens + row, token.to(tl.int64))
        tl.store(logprobs + row, value - highest - tl.log(total.to(tl.float32)))


def apply_rules(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    uniform: torch.Tensor,
    rules: RowRules,
    *,
    row_seats: torch.Tensor,
    row_positions: torch.Tensor,
    seat_tokens: torch.Tensor,
    end_ids: torch.Tensor,
    marks: torch.Tensor,
    block_max: torch.Tensor,
    block_sum: torch.Tensor,
    tokens: torch.Tensor,
    logprobs: torch.Tensor,
) -> None:
    """Write tokens [n] int64 and logprobs [n] of the rows that have rules; other rows' stay.

    logits [n, V]; temperature [n] float32, uniform [n] float64; row_seats and row_positions [n] (the last known token's
    position); seat_tokens [S, C] int32: each seat's text; end_ids [S, K] int32, -1 where there is none; marks [>= n, V]
    int32, all zero before and after; block_max, block_sum: of `triton_sampler.summarise_rows`.
    """
    num_rows, num_words = logits.shape
    assert logits.stride(1) == marks.stride(1) == 1 and marks.shape[0] >= num_rows and marks.shape[1] >= num_words
    num_blocks = block_max.shape[1]
    history = (num_rows, triton.cdiv(seat_tokens.shape[1], HISTORY_BLOCK))
    for clear in (False, True):
        if clear:
            _pick_by_rules[(num_rows,)](
                logits,
                marks,
                row_positions,
                temperature,
                uniform,
                rules.top_k,
                rules.min_len,
                rules.top_p,
                rules.min_p,
                rules.repetition,
                rules.presence,
                rules.frequency,
                block_max,
                block_sum,
                tokens,
                logprobs,
                logits.stride(0),
                marks.stride(0),
                num_words,
                num_blocks,
                BLOCK=min(BLOCK, triton.next_power_of_2(num_words)),
                MAX_BLOCKS=triton.next_power_of_2(num_blocks),
                num_warps=16,
            )
        _mark[history](
            row_seats,
            row_positions,
            seat_tokens,
            end_ids,
            rules.prompt_len,
            rules.min_len,
            rules.repetition,
            rules.presence,
            rules.frequency,
            marks,
            seat_tokens.stride(0),
            end_ids.stride(0),
            marks.stride(0),
            end_ids.shape[1],
            BLOCK=HISTORY_BLOCK,
            END_BLOCK=triton.next_power_of_2(end_ids.shape[1]),
            CLEAR=clear,
            num_warps=4,
        )
