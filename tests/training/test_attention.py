"""The block backend against the explicit mask: values and gradients, trees, sliding windows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_train.data.pack import MicroBatch
from skyrl_train.training.attention import ReferenceAttention, packed_attention
from skyrl_train.training.attention_blocks import BlockAttention
from skyrl_train.training.attention_varlen import varlen_is_available

CPU = torch.device("cpu")
HEADS, KV_HEADS, SIZE = 4, 2, 8


def tree(parents: Sequence[int | None], lengths: Sequence[int]) -> MicroBatch:
    """Segment s has `lengths[s]` rows and continues segment `parents[s]`, an earlier one, or nothing."""
    starts = [sum(lengths[:s]) for s in range(len(lengths))]
    paths: list[list[int]] = []
    for s, parent in enumerate(parents):
        before = [] if parent is None else paths[parent]
        paths.append([*before, *range(starts[s], starts[s] + lengths[s])])
    bounds = torch.tensor([0, *(len(path) for path in paths)]).cumsum(0)
    none = torch.zeros(0, dtype=torch.int64)
    return MicroBatch(
        token_ids=torch.zeros(sum(lengths), dtype=torch.int64),
        position_ids=torch.tensor([i for path, n in zip(paths, lengths, strict=True) for i in range(len(path))[-n:]]),
        cu_seqlens_q=torch.tensor([0, *lengths]).cumsum(0),
        kv_rows=torch.tensor([row for path in paths for row in path]),
        cu_seqlens_k=bounds,
        predict_rows=none,
        target_ids=none,
        sample_index=none,
        token_index=none,
        rollout_logprobs=torch.zeros(0),
        advantages=torch.zeros(0),
        trajectory_ids=(),
    )


@st.composite
def trees(draw: st.DrawFn) -> MicroBatch:
    lengths = draw(st.lists(st.one_of(st.integers(1, 4), st.integers(1, 50)), min_size=1, max_size=8))
    parents = [draw(st.one_of(st.none(), st.integers(0, s - 1))) if s else None for s in range(len(lengths))]
    return tree(parents, lengths)


def run(
    context: ReferenceAttention | BlockAttention, num_rows: int, window: int | None, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    """The output and the gradients of q, k and v, from seeded inputs."""
    generator = torch.Generator().manual_seed(num_rows)
    q, k, v, weight = (
        torch.randn(num_rows, heads, SIZE, generator=generator, dtype=torch.float64).to(dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = context.attend(0, *leaves, scaling=0.3, sliding_window=window)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


@settings(deadline=None, max_examples=60)
@given(trees(), st.one_of(st.none(), st.integers(1, 60)))
def test_blocks_equal_the_explicit_mask(micro_batch: MicroBatch, window: int | None) -> None:
    num_rows = len(micro_batch.token_ids)
    wanted = run(ReferenceAttention(micro_batch, device=CPU), num_rows, window)
    found = run(BlockAttention(micro_batch, device=CPU), num_rows, window)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_reference_sees_ancestors_and_its_own_past_only() -> None:
    """Values are one-hot rows and all scores are equal: the output is the mean over what a row may look at."""
    micro_batch = tree([None, 0, 0], [2, 2, 1])  # prompt rows 0 1, answer a rows 2 3, answer b row 4
    value = torch.eye(5)[:, None, :]
    zeros = torch.zeros(5, 1, 5)
    third = 1 / 3
    full = torch.tensor(
        [
            [1, 0, 0, 0, 0],
            [0.5, 0.5, 0, 0, 0],
            [third, third, third, 0, 0],
            [0.25, 0.25, 0.25, 0.25, 0],
            [third, third, 0, 0, third],
        ]
    )
    windowed = torch.tensor(
        [[1, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0], [0, 0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5, 0], [0, 0.5, 0, 0, 0.5]]
    )
    for context in (ReferenceAttention(micro_batch, device=CPU), BlockAttention(micro_batch, device=CPU)):
        for window, wanted in ((None, full), (2, windowed)):
            out = context.attend(0, zeros, zeros, value, scaling=1.0, sliding_window=window)
            torch.testing.assert_close(out[:, 0], wanted)


def test_many_short_answers_share_few_calls() -> None:
    """64 prompts of 12 rows with 16 answers of 4: 1088 segments, a handful of batches, little padding."""
    parents: list[int | None] = []
    lengths: list[int] = []
    for _ in range(64):
        prompt = len(parents)
        parents += [None, *[prompt] * 16]
        lengths += [12, *[4] * 16]
    context = BlockAttention(tree(parents, lengths), device=CPU)
    shapes = [(len(b.blocks), b.num_queries, b.num_keys) for b in context._batches]
    assert shapes == [(128, 32, 44), (64, 12, 12)]


def test_a_long_answer_is_not_padded_with_short_ones() -> None:
    context = BlockAttention(tree([None, None, None], [500, 3, 4]), device=CPU)
    assert [(len(b.blocks), b.num_queries) for b in context._batches] == [(1, 500), (2, 4)]


def test_low_precision_stays_near_the_reference() -> None:
    micro_batch = tree([None, 0, 0, None], [9, 5, 3, 7])
    wanted = run(ReferenceAttention(micro_batch, device=CPU), 24, None, torch.float64)
    found = run(BlockAttention(micro_batch, device=CPU), 24, None, torch.bfloat16)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0.1, atol=0.1)


def test_without_a_gpu_blocks_are_chosen() -> None:
    micro_batch = tree([None], [3])
    assert isinstance(packed_attention(micro_batch, device=CPU, dtype=torch.bfloat16), BlockAttention)
    assert isinstance(
        packed_attention(micro_batch, device=CPU, dtype=torch.float32, backend="reference"), ReferenceAttention
    )
    assert not varlen_is_available(torch.device("cuda"), torch.float32)
