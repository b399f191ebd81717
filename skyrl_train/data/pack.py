"""Sequence packing: many samples in one row, a shared prompt computed once, nothing padded.

samples            groups (one prompt)       ranks             micro-batches
p0/0 p0/1 p1/0 ->  p0: {0, 1}  p1: {0}   ->  rank 0: p0   ->   [p0 prompt | answer 0 | answer 1]
                                             rank 1: p1        [p1 prompt + answer]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from skyrl_train.data.balance import Answer, Bin, Limit, spread
from skyrl_train.types import TokenSequence, TrainBatch, TrainingSample, TrajectoryId

Index = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """One packed row of tokens and the predictions to train in it.

    T rows (packed tokens), S segments, K key rows, N loss tokens, B samples. Integers are int64.

    A segment is a run of rows [cu_seqlens_q[s], cu_seqlens_q[s + 1]) that attends to the rows
    kv_rows[cu_seqlens_k[s] : cu_seqlens_k[s + 1]]: its ancestors first, itself last, causal and aligned at
    the end. A prompt shared by a group is one segment; each answer is a segment whose keys are prompt + itself.

    Two answers "ab" and "c" to the prompt "xyz":
        token_ids      x y z a b c          position_ids   0 1 2 3 4 3
        cu_seqlens_q   0 3 5 6
        kv_rows        0 1 2 | 0 1 2 3 4 | 0 1 2 5         cu_seqlens_k   0 3 8 12
        predict_rows   2 3 2                target_ids     a b c          sample_index   0 0 1
        token_index    0 1 2                each prediction's place among the mini-batch's loss tokens, samples in order
    The row of z predicts both a and c: predictions are pairs of a row and a target, not a shift by one.
    Rows that predict nothing and that nothing attends to may be left out: `pack` drops those of b and c.
    """

    token_ids: torch.Tensor  # [T]
    position_ids: torch.Tensor  # [T]
    cu_seqlens_q: torch.Tensor  # [S + 1]
    kv_rows: torch.Tensor  # [K]
    cu_seqlens_k: torch.Tensor  # [S + 1]
    predict_rows: torch.Tensor  # [N] row in [0, T) whose logits predict the target
    target_ids: torch.Tensor  # [N]
    sample_index: torch.Tensor  # [N] sample in [0, B)
    token_index: torch.Tensor  # [N] loss token of the mini-batch in [0, num_loss_tokens), however it was cut
    rollout_logprobs: torch.Tensor  # [N] float32
    advantages: torch.Tensor | None  # [N] float32; None where the sequences have none yet
    returns: torch.Tensor | None = None  # [N] float32; with a critic
    values: torch.Tensor | None = None  # [N] float32; with a critic
    policy_versions: torch.Tensor | None = None  # [N] that each target was sampled under
    trajectory_ids: tuple[TrajectoryId, ...]  # [B]


def pack(
    samples: Sequence[TokenSequence],
    *,
    max_tokens_per_micro_batch: int | None = None,
    micro_batch_size: int | None = None,
    dp_size: int = 1,
    share_prefix: bool = True,
) -> TrainBatch:
    """Cut one mini-batch into micro-batches, the same number on each of `dp_size` ranks, balanced by rows.

    Give one limit: `max_tokens_per_micro_batch` rows, or `micro_batch_size` samples. With `share_prefix`, samples
    of one prompt whose first `num_prompt_tokens` tokens are equal share those rows. Each loss token is predicted
    once; rows after a sample's last prediction are dropped. Equal arguments give equal batches.

    A sample without a loss token takes no rows and still counts in `num_samples`. With fewer samples than ranks
    the others get a micro-batch of one row that predicts nothing, so that every rank runs the same collectives.
    Raises ValueError: nothing to train on, a loss token at position 0, or a sample over the limit.
    """
    limit = Limit.of(max_tokens_per_micro_batch, micro_batch_size)
    if not samples:
        raise ValueError("there are no samples to train on")
    flat = _Flat(samples)
    answers = _answers(samples, flat, share_prefix)
    for answer in answers:
        if not limit.allows(answer.num_shared + answer.num_own, 1):
            raise ValueError(
                f"sample {samples[answer.sample].trajectory_id} needs {answer.num_shared + answer.num_own} rows, a "
                f"micro-batch holds {max_tokens_per_micro_batch}; raise max_tokens_per_micro_batch"
            )
    return TrainBatch(
        micro_batches=tuple(
            tuple(_build(samples, flat, b) if b else _empty(samples[0].token_ids[:1], flat) for b in rank)
            for rank in spread(answers, limit, dp_size)
        ),
        num_loss_tokens=len(flat.loss_at),
        num_samples=len(samples),
    )


class _Flat:
    """All samples one after the other: sample i is [offsets[i], offsets[i + 1]), its loss tokens are
    loss_at[loss_bounds[i] : loss_bounds[i + 1]], and predicting them takes its first num_rows[i] tokens."""

    def __init__(self, samples: Sequence[TokenSequence]) -> None:
        self.token_ids = torch.cat([sample.token_ids for sample in samples])
        self.rollout_logprobs = torch.cat([sample.rollout_logprobs for sample in samples])
        trained_on = [sample for sample in samples if isinstance(sample, TrainingSample)]
        if trained_on and len(trained_on) < len(samples):
            raise ValueError(f"{len(trained_on)} of {len(samples)} samples have advantages; a batch has all or none")
        self.policy_versions = _joined([sample.policy_versions for sample in samples])
        self.advantages = _joined([sample.advantages for sample in trained_on])
        self.returns = _joined([sample.returns for sample in trained_on])
        self.values = _joined([sample.values for sample in trained_on])
        loss_mask = torch.cat([sample.loss_mask for sample in samples]).numpy()
        self.offsets = _bounds([len(sample.token_ids) for sample in samples])
        self.loss_at = np.flatnonzero(loss_mask)
        self.loss_bounds = np.searchsorted(self.loss_at, self.offsets)
        self.num_loss_tokens = np.diff(self.loss_bounds)
        if len(self.loss_at) == 0:
            raise ValueError(f"none of {len(samples)} samples has a loss token: there is nothing to train on")
        trained = np.flatnonzero(self.num_loss_tokens)
        first = self.loss_at[self.loss_bounds[trained]] == self.offsets[trained]
        if first.any():
            name = samples[trained[first.argmax()]].trajectory_id
            raise ValueError(f"sample {name}: token 0 is a loss token, but nothing predicts it")
        self.num_rows = np.zeros(len(samples), dtype=np.int64)
        self.num_rows[trained] = self.loss_at[self.loss_bounds[trained + 1] - 1] - self.offsets[trained]


def _answers(samples: Sequence[TokenSequence], flat: _Flat, share_prefix: bool) -> list[Answer]:
    """Samples with loss tokens. A family: one prompt_id and equal leading tokens."""
    tokens = flat.token_ids.numpy()
    families: dict[tuple[str, bytes], int] = {}
    answers = []
    for i, (sample, start, num_rows) in enumerate(
        zip(samples, flat.offsets.tolist(), flat.num_rows.tolist(), strict=False)  # offsets has one more
    ):
        if num_rows == 0:
            continue
        shared = sample.num_prompt_tokens if share_prefix else 0
        family = -1 - i
        if shared:
            key = (sample.trajectory_id.prompt_id, tokens[start : start + shared].tobytes())
            family = families.setdefault(key, len(families))
        answers.append(Answer(sample=i, family=family, num_shared=shared, num_own=max(num_rows - shared, 0)))
    return answers


def _build(samples: Sequence[TokenSequence], flat: _Flat, micro_batch: Bin) -> MicroBatch:
    """Lay the families out one after the other: [shared prompt] [answer] [answer] ..."""
    # A segment is tokens [start, start + length) of a sample, after the num_before rows from row before.
    sample_of: list[int] = []
    start_at: list[int] = []
    lengths: list[int] = []
    before: list[int] = []
    num_before: list[int] = []
    # A sample's token i is computed in row prompt_row + i if i < num_shared, else in row own_row + i - num_shared.
    order: list[int] = []
    prompt_row: list[int] = []
    own_row: list[int] = []
    num_shared: list[int] = []
    num_rows = flat.num_rows.tolist()
    row = 0
    for family in micro_batch.families():
        # A lone sample is one segment: two would compute the same with one more call.
        shared = family[0].num_shared if len(family) > 1 else 0
        first_row = row
        segments = [(family[0].sample, 0, shared)] if shared else []
        segments += [(answer.sample, shared, num_rows[answer.sample]) for answer in family]
        for i, (sample, start, end) in enumerate(segments):
            if not shared or i > 0:
                order.append(sample)
                prompt_row.append(first_row)
                own_row.append(row)
                num_shared.append(shared)
            if end > start:
                sample_of.append(sample)
                start_at.append(start)
                lengths.append(end - start)
                before.append(first_row)
                num_before.append(start)
                row += end - start

    lens, ancestors = np.array(lengths), np.array(num_before)
    cu_seqlens_q = _bounds(lens)
    own_and_before = np.stack([ancestors, lens], axis=1)
    kv_starts = np.stack([np.array(before), cu_seqlens_q[:-1]], axis=1)
    tokens = _ranges(flat.offsets[sample_of] + start_at, lens)
    counts = flat.num_loss_tokens[order]
    targets = flat.loss_at[_ranges(flat.loss_bounds[order], counts)]
    predictor = targets - np.repeat(flat.offsets[order], counts) - 1
    predict_rows = np.where(
        predictor < np.repeat(num_shared, counts),
        np.repeat(prompt_row, counts) + predictor,
        np.repeat(np.array(own_row) - num_shared, counts) + predictor,
    )
    at = torch.from_numpy(targets)
    return MicroBatch(
        token_ids=flat.token_ids[torch.from_numpy(tokens)],
        position_ids=torch.from_numpy(_ranges(np.array(start_at), lens)),
        cu_seqlens_q=torch.from_numpy(cu_seqlens_q),
        kv_rows=torch.from_numpy(_ranges(kv_starts.reshape(-1), own_and_before.reshape(-1))),
        cu_seqlens_k=torch.from_numpy(_bounds(lens + ancestors)),
        predict_rows=torch.from_numpy(predict_rows),
        target_ids=flat.token_ids[at],
        sample_index=torch.from_numpy(np.repeat(np.arange(len(order)), counts)),
        token_index=torch.from_numpy(_ranges(flat.loss_bounds[order], counts)),
        rollout_logprobs=flat.rollout_logprobs[at],
        advantages=_at(flat.advantages, at),
        returns=_at(flat.returns, at),
        values=_at(flat.values, at),
        policy_versions=_at(flat.policy_versions, at),
        trajectory_ids=tuple(samples[i].trajectory_id for i in order),
    )


def _empty(filler: torch.Tensor, flat: _Flat) -> MicroBatch:
    """One row that predicts nothing."""
    none = torch.zeros(0, dtype=torch.int64)
    return MicroBatch(
        token_ids=filler.clone(),
        position_ids=torch.zeros(1, dtype=torch.int64),
        cu_seqlens_q=torch.tensor([0, 1]),
        kv_rows=torch.zeros(1, dtype=torch.int64),
        cu_seqlens_k=torch.tensor([0, 1]),
        predict_rows=none,
        target_ids=none,
        sample_index=none,
        token_index=none,
        rollout_logprobs=torch.zeros(0),
        advantages=_at(flat.advantages, none),
        returns=_at(flat.returns, none),
        values=_at(flat.values, none),
        policy_versions=_at(flat.policy_versions, none),
        trajectory_ids=(),
    )


def _joined(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """One after the other; None where no sample has one."""
    present = [tensor for tensor in tensors if tensor is not None]
    if present and len(present) < len(tensors):
        raise ValueError(
            f"{len(present)} of {len(tensors)} samples have values, returns or versions; a batch has all or none"
        )
    return torch.cat(present) if present else None


def _at(tensor: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor | None:
    return None if tensor is None else tensor[index]


def _bounds(lengths: Sequence[int] | Index) -> Index:
    """[2, 0, 3] -> [0, 2, 2, 5]."""
    bounds = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=bounds[1:])
    return bounds


def _ranges(starts: Index, lengths: Index) -> Index:
    """starts [7, 1], lengths [2, 3] -> [7, 8, 1, 2, 3]."""
    bounds = _bounds(lengths)
    return np.repeat(starts - bounds[:-1], lengths) + np.arange(bounds[-1])
