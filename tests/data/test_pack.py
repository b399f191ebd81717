"""Packing keeps every loss token, its whole context, and the limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_train.data.pack import MicroBatch, pack
from skyrl_train.types import TrainBatch, TrainingSample, TrajectoryId


def make_sample(
    prompt: Sequence[int], rest: Sequence[int], mask: Sequence[bool] | None = None, *, name: str = "0", sample: int = 0
) -> TrainingSample:
    """`prompt` then `rest`, of which the policy wrote what `mask` says, by default all. Values tell places apart."""
    length = len(prompt) + len(rest)
    loss_mask = torch.tensor([False] * len(prompt) + list([True] * len(rest) if mask is None else mask))
    return TrainingSample(
        trajectory_id=TrajectoryId(prompt_id=name, sample=sample),
        token_ids=torch.tensor([*prompt, *rest]),
        loss_mask=loss_mask,
        rollout_logprobs=-torch.arange(1.0, length + 1) * loss_mask,
        rewards=torch.zeros(length),
        advantages=(torch.arange(length) + 100.0 * sample) * loss_mask,
        num_prompt_tokens=len(prompt),
    )


@st.composite
def groups(draw: st.DrawFn) -> list[TrainingSample]:
    """A few prompts, several answers each, some of many turns; some samples have no loss token."""
    samples = []
    for p in range(draw(st.integers(1, 4))):
        prompts = [draw(st.lists(st.integers(0, 9), min_size=1, max_size=6)) for _ in range(draw(st.integers(1, 2)))]
        for s in range(draw(st.integers(1, 5))):
            mask = draw(st.lists(st.booleans(), min_size=0, max_size=7))
            rest = draw(st.lists(st.integers(0, 9), min_size=len(mask), max_size=len(mask)))
            prompt = draw(st.sampled_from(prompts))
            samples.append(make_sample(prompt, rest, mask, name=str(p), sample=s))
    if not any(sample.loss_mask.any() for sample in samples):
        samples.append(make_sample([1], [2], name="last"))
    return draw(st.permutations(samples))


def contexts(micro_batch: MicroBatch) -> list[tuple[TrajectoryId, tuple[int, ...], tuple[int, ...], float, float]]:
    """Each prediction as (sample, tokens that its row can see, target, rollout log-probability, advantage)."""
    m = micro_batch
    q, k = m.cu_seqlens_q.tolist(), m.cu_seqlens_k.tolist()
    seen: dict[int, tuple[int, ...]] = {}
    for s in range(len(q) - 1):
        keys = m.kv_rows[k[s] : k[s + 1]].tolist()
        assert keys[len(keys) - (q[s + 1] - q[s]) :] == list(range(q[s], q[s + 1])), "a segment's last keys are its own"
        num_before = len(keys) - (q[s + 1] - q[s])
        assert m.position_ids[keys].tolist() == list(range(len(keys)))
        for offset, row in enumerate(range(q[s], q[s + 1])):
            seen[row] = tuple(m.token_ids[keys[: num_before + offset + 1]].tolist())
    assert sorted(seen) == list(range(len(m.token_ids))), "each row belongs to one segment"
    assert m.advantages is not None
    return [
        (m.trajectory_ids[i], seen[row], (target,), logprob, advantage)
        for i, row, target, logprob, advantage in zip(
            m.sample_index.tolist(),
            m.predict_rows.tolist(),
            m.target_ids.tolist(),
            m.rollout_logprobs.tolist(),
            m.advantages.tolist(),
            strict=True,
        )
    ]


def wanted(
    samples: Sequence[TrainingSample],
) -> list[tuple[TrajectoryId, tuple[int, ...], tuple[int, ...], float, float]]:
    """The same list read off the samples."""
    return [
        (
            sample.trajectory_id,
            tuple(sample.token_ids[:at].tolist()),
            (int(sample.token_ids[at]),),
            float(sample.rollout_logprobs[at]),
            float(sample.advantages[at]),
        )
        for sample in samples
        for at in sample.loss_mask.nonzero()[:, 0].tolist()
    ]


def every_micro_batch(batch: TrainBatch) -> list[MicroBatch]:
    return [m for rank in batch.micro_batches for m in rank]


@settings(deadline=None, max_examples=150)
@given(groups(), st.integers(1, 3), st.booleans(), st.one_of(st.integers(13, 60), st.just(None)), st.integers(1, 5))
def test_every_loss_token_is_predicted_once_from_its_whole_context(
    samples: list[TrainingSample], dp_size: int, share_prefix: bool, max_tokens: int | None, micro_batch_size: int
) -> None:
    batch = pack(
        samples,
        max_tokens_per_micro_batch=max_tokens,
        micro_batch_size=None if max_tokens else micro_batch_size,
        dp_size=dp_size,
        share_prefix=share_prefix,
    )
    assert sorted(c for m in every_micro_batch(batch) for c in contexts(m)) == sorted(wanted(samples))
    assert batch.num_loss_tokens == len(wanted(samples))
    assert batch.num_samples == len(samples)
    assert len(batch.micro_batches) == dp_size
    assert len({len(rank) for rank in batch.micro_batches}) == 1, "ranks run the same number of collectives"
    for m in every_micro_batch(batch):
        assert m.sample_index.tolist() == sorted(m.sample_index.tolist())
        assert set(m.sample_index.tolist()) == set(range(len(m.trajectory_ids)))
        if max_tokens:
            assert len(m.token_ids) <= max_tokens
        else:
            assert len(m.trajectory_ids) <= micro_batch_size
        for tensor in (m.token_ids, m.position_ids, m.kv_rows, m.predict_rows, m.target_ids, m.sample_index):
            assert tensor.dtype == torch.int64
    split = [i for m in every_micro_batch(batch) for i in m.trajectory_ids]
    trained = [s.trajectory_id for s in samples if s.loss_mask.any()]
    assert sorted(split) == sorted(trained), "no sample is cut in two"


@settings(deadline=None, max_examples=30)
@given(groups(), st.integers(1, 3))
def test_equal_arguments_give_equal_batches(samples: list[TrainingSample], dp_size: int) -> None:
    first, second = (every_micro_batch(pack(samples, max_tokens_per_micro_batch=20, dp_size=dp_size)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.trajectory_ids == b.trajectory_ids
        assert torch.equal(a.token_ids, b.token_ids) and torch.equal(a.kv_rows, b.kv_rows)
        assert torch.equal(a.predict_rows, b.predict_rows) and torch.equal(a.token_index, b.token_index)
        assert a.advantages is not None and b.advantages is not None and torch.equal(a.advantages, b.advantages)


@settings(deadline=None, max_examples=50)
@given(groups(), st.integers(1, 3))
def test_token_index_puts_every_cut_back_into_the_order_of_the_samples(
    samples: list[TrainingSample], dp_size: int
) -> None:
    batch = pack(samples, max_tokens_per_micro_batch=20, dp_size=dp_size)
    advantages = torch.full((batch.num_loss_tokens,), float("nan"))
    for m in every_micro_batch(batch):
        assert m.advantages is not None
        advantages[m.token_index] = m.advantages
    assert advantages.tolist() == [entry[4] for entry in wanted(samples)]


def test_two_answers_share_the_rows_of_their_prompt() -> None:
    x, y, z, a, b, c = 10, 11, 12, 0, 1, 2
    batch = pack(
        [make_sample([x, y, z], [a, b], sample=0), make_sample([x, y, z], [c], sample=1)], max_tokens_per_micro_batch=99
    )
    (m,) = every_micro_batch(batch)
    assert m.token_ids.tolist() == [x, y, z, a]  # b and c are predicted, nothing is predicted from them
    assert m.position_ids.tolist() == [0, 1, 2, 3]
    assert m.cu_seqlens_q.tolist() == [0, 3, 4]
    assert m.kv_rows.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert m.cu_seqlens_k.tolist() == [0, 3, 7]
    assert m.predict_rows.tolist() == [2, 3, 2]
    assert m.target_ids.tolist() == [a, b, c]
    assert m.sample_index.tolist() == [0, 0, 1]


def test_without_sharing_each_sample_is_one_segment() -> None:
    samples = [make_sample([7, 8, 9], [1, 2], sample=0), make_sample([7, 8, 9], [3], sample=1)]
    (m,) = every_micro_batch(pack(samples, max_tokens_per_micro_batch=99, share_prefix=False))
    assert m.token_ids.tolist() == [7, 8, 9, 1, 7, 8, 9]
    assert m.kv_rows.tolist() == list(range(7))


def test_only_equal_prompts_of_one_task_are_shared() -> None:
    same = [make_sample([7, 8], [1, 2], sample=0), make_sample([7, 9], [1, 2], sample=1)]
    (m,) = every_micro_batch(pack(same, max_tokens_per_micro_batch=99))
    assert len(m.token_ids) == 6
    other = [make_sample([7, 8], [1, 2], name="0"), make_sample([7, 8], [1, 2], name="1")]
    (m,) = every_micro_batch(pack(other, max_tokens_per_micro_batch=99))
    assert len(m.token_ids) == 6


def test_a_group_that_no_micro_batch_holds_repeats_its_prompt() -> None:
    samples = [make_sample([1, 2, 3, 4], [5, 6, 7], sample=i) for i in range(4)]  # 4 + 4 * 2 rows
    batch = pack(samples, max_tokens_per_micro_batch=8)
    assert [len(m.token_ids) for m in every_micro_batch(batch)] == [8, 8]


def test_a_group_stays_whole_where_it_fits() -> None:
    samples = [make_sample([p, 2, 3, 4], [5, 6, 7], name=str(p), sample=i) for i in range(2) for p in range(6)]
    batch = pack(samples, max_tokens_per_micro_batch=20)
    assert [len(m.token_ids) for m in every_micro_batch(batch)] == [16, 16, 16]


def test_ranks_get_nearly_equal_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = [
        make_sample(
            [p] * (4 + 3 * p), [1] * int(torch.randint(2, 60, (1,), generator=generator)), name=str(p), sample=i
        )
        for p in range(10)
        for i in range(8)
    ]
    for dp_size in (2, 3, 8):
        batch = pack(samples, max_tokens_per_micro_batch=200, dp_size=dp_size)
        rows = [sum(len(m.token_ids) for m in rank) for rank in batch.micro_batches]
        assert max(rows) <= 1.05 * sum(rows) / dp_size, rows


def test_one_group_is_cut_over_the_ranks() -> None:
    batch = pack([make_sample([1, 2], [3] * 9, sample=i) for i in range(8)], micro_batch_size=8, dp_size=4)
    assert [len(m.trajectory_ids) for m in every_micro_batch(batch)] == [2, 2, 2, 2]


def test_a_rank_short_of_samples_gets_a_row_that_predicts_nothing() -> None:
    batch = pack([make_sample([1, 2], [3, 4])], micro_batch_size=1, dp_size=2)
    full, empty = every_micro_batch(batch)
    assert len(full.target_ids) == 2
    assert (len(empty.token_ids), len(empty.target_ids), empty.trajectory_ids) == (1, 0, ())


def test_the_largest_micro_batch_comes_first() -> None:
    samples = [make_sample([p], [1] * n, name=str(p)) for p, n in enumerate([3, 9, 5])]
    batch = pack(samples, micro_batch_size=1)
    assert [len(m.token_ids) for m in every_micro_batch(batch)] == [9, 5, 3]


def test_a_sample_without_loss_tokens_takes_no_rows_and_still_counts() -> None:
    batch = pack([make_sample([1, 2], [3]), make_sample([1, 2], [4], [False], sample=1)], micro_batch_size=4)
    (m,) = every_micro_batch(batch)
    assert m.trajectory_ids == (TrajectoryId(prompt_id="0", sample=0),)
    assert (batch.num_samples, batch.num_loss_tokens) == (2, 1)


def test_what_cannot_be_packed_is_refused_by_name() -> None:
    good = make_sample([1], [2])
    with pytest.raises(ValueError, match=r"sample 0/0/0 needs 6 rows, a micro-batch holds 5"):
        pack([make_sample([1, 2, 3], [4] * 4)], max_tokens_per_micro_batch=5)
    with pytest.raises(ValueError, match=r"3/0/0: token 0 is a loss token"):
        pack([good, make_sample([], [1, 2], name="3")], micro_batch_size=2)
    with pytest.raises(ValueError, match="nothing to train on"):
        pack([make_sample([1, 2], [])], micro_batch_size=2)
    with pytest.raises(ValueError, match="no samples"):
        pack([], micro_batch_size=2)
    with pytest.raises(ValueError, match="give either"):
        pack([good])
    with pytest.raises(ValueError, match="give either"):
        pack([good], micro_batch_size=2, max_tokens_per_micro_batch=2)
    with pytest.raises(ValueError, match="dp_size"):
        pack([good], micro_batch_size=2, dp_size=0)


def test_loss_tokens_inside_a_shared_prompt_are_predicted_for_each_sample() -> None:
    """As in supervised training on whole texts: the rows are shared, the predictions are each sample's own."""
    samples = []
    for i, answer in enumerate(([5, 6], [7])):
        sample = make_sample([1, 2, 3], answer, sample=i)
        loss_mask = torch.tensor([False, True, False] + [True] * len(answer))
        samples.append(replace(sample, loss_mask=loss_mask))
    (m,) = every_micro_batch(pack(samples, micro_batch_size=2))
    assert m.token_ids.tolist() == [1, 2, 3, 5]
    assert list(zip(m.predict_rows.tolist(), m.target_ids.tolist(), m.sample_index.tolist(), strict=True)) == [
        (0, 2, 0),
        (2, 5, 0),
        (3, 6, 0),
        (0, 2, 1),
        (2, 7, 1),
    ]
