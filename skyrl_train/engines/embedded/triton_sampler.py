"""Sampling on a GPU that reads the logits once.

    _summarise   one program a (row, block of words): the block's maximum, where it is, its sum of exponentials
    _pick        one program a row: which block the uniform number falls into, then which word of that block

Same definition as `sampler.sample` without penalties, bans and truncation: the inverse of the cumulative
distribution of softmax(logits / temperature) at `uniform`, greedy for temperature 0, the log-probability of the token
under that softmax (temperature 1 when greedy). Sums are float32 within a block and float64 over blocks.

Shapes: n rows, V words, W blocks of BLOCK words.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096


@triton.jit  # type: ignore[untyped-decorator]
def _summarise(  # type: ignore[no-untyped-def]
    logits, temperature, block_max, block_arg, block_sum, row_stride, num_words, num_blocks, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    word = block * BLOCK + tl.arange(0, BLOCK)
    present = word < num_words
    x = tl.load(logits + row * row_stride + word, mask=present, other=-float("inf")).to(tl.float32)
    divisor = tl.load(temperature + row)
    x = x / tl.where(divisor == 0, 1.0, divisor)
    best = tl.max(x, 0)
    # The first of equal maxima, as argmax does; a block of -inf has no word to give.
    where = tl.min(tl.where((x == best) & present, word, num_words), 0)
    total = tl.sum(tl.where(present, tl.exp(x - tl.where(best == -float("inf"), 0.0, best)), 0.0), 0)
    index = row * num_blocks + block
    tl.store(block_max + index, best)
    tl.store(block_arg + index, where)
    tl.store(block_sum + index, total)


@triton.jit  # type: ignore[untyped-decorator]
def _pick(  # type: ignore[no-untyped-def]
    logits,
    temperature,
    uniform,
    block_max,
    block_arg,
    block_sum,
    tokens,
    logprobs,
    row_stride,
    num_words,
    num_blocks,
    BLOCK: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, MAX_BLOCKS)
    known = b < num_blocks
    maxima = tl.load(block_max + row * num_blocks + b, mask=known, other=-float("inf"))
    sums = tl.load(block_sum + row * num_blocks + b, mask=known, other=0.0)
    firsts = tl.load(block_arg + row * num_blocks + b, mask=known, other=num_words)
    best = tl.max(maxima, 0)
    mass = (sums * tl.exp(maxima - best)).to(tl.float64)
    mass = tl.where(known, mass, 0.0)
    cumulative = tl.cumsum(mass, 0)
    total = tl.sum(mass, 0)
    target = tl.load(uniform + row) * total
    # The first block whose cumulative mass exceeds the target; rounding at the very end falls back to the last one
    # that has any mass.
    over = known & (cumulative > target)
    last_massive = tl.max(tl.where(mass > 0, b, 0), 0)
    chosen = tl.minimum(tl.min(tl.where(over, b, MAX_BLOCKS), 0), last_massive)
    before = tl.sum(tl.where(b < chosen, mass, 0.0), 0)

    word = chosen * BLOCK + tl.arange(0, BLOCK)
    present = word < num_words
    divisor = tl.load(temperature + row)
    scale = tl.where(divisor == 0, 1.0, divisor)
    x = tl.load(logits + row * row_stride + word, mask=present, other=-float("inf")).to(tl.float32) / scale
    weight = tl.where(present, tl.exp(x - best), 0.0)
    inside = tl.cumsum(weight, 0)
    rest = (target - before).to(tl.float32)
    beyond = (inside > rest) & (weight > 0)
    last_word = tl.max(tl.where(weight > 0, word, 0), 0)
    sampled = tl.minimum(tl.min(tl.where(beyond, word, num_words), 0), last_word)
    greedy = tl.min(tl.where(known & (maxima == best), firsts, num_words), 0)
    token = tl.where(divisor == 0, greedy, sampled)
    value = tl.load(logits + row * row_stride + token).to(tl.float32) / scale
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, value - best - tl.log(total.to(tl.float32)))


def sample_rows(
    logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [n, V], temperature [n] float32, uniform [n] float64 -> tokens [n], their log-probabilities [n]."""
    tokens, logprobs, _, _ = sample_and_summarise(logits, temperature, uniform)
    return tokens, logprobs


def sample_and_summarise(
    logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `sample_rows`; then [n, W] float32 of each block: its largest logit / temperature, its sum of exponentials."""
    num_rows, num_words = logits.shape
    assert logits.stride(1) == 1, logits.stride()
    num_blocks = triton.cdiv(num_words, BLOCK)
    device = logits.device
    block_max = torch.empty(num_rows, num_blocks, dtype=torch.float32, device=device)
    block_sum = torch.empty_like(block_max)
    block_arg = torch.empty(num_rows, num_blocks, dtype=torch.int32, device=device)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=device)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=device)
    stride = logits.stride(0)
    _summarise[(num_rows, num_blocks)](
        logits, temperature, block_max, block_arg, block_sum, stride, num_words, num_blocks, BLOCK=BLOCK, num_warps=8
    )
    _pick[(num_rows,)](
        logits,
        temperature,
        uniform,
        block_max,
        block_arg,
        block_sum,
        tokens,
        logprobs,
        stride,
        num_words,
        num_blocks,
        BLOCK=BLOCK,
        MAX_BLOCKS=triton.next_power_of_2(num_blocks),
        num_warps=8,
    )
    return tokens, logprobs, block_max, block_sum
