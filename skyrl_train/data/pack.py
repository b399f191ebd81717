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
from skyrl_train.types import TrainBatch, TrainingSample, TrajectoryId


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
    rollout_logprobs: torch.Tensor  # [N] float32
    advantages: torch.Tensor  # [N] float32
    trajectory_ids: tuple[TrajectoryId, ...]  # [B]


def pack(
    samples: Sequence[TrainingSample],
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
    spans = [_loss_span(sample) for sample in samples]
    num_loss_tokens = sum(span.num_loss_tokens for span in spans)
    if num_loss_tokens == 0:
        raise ValueError(f"none of {len(samples)} samples has a loss token: there is nothing to train on")

    families: dict[tuple[str, bytes], int] = {}
    answers: list[Answer] = []
    for i, (sample, span) in enumerate(zip(samples, spans, strict=True)):
        if not span.num_loss_tokens:
            continue
        shared = sample.num_prompt_tokens if share_prefix else 0
        if shared == 0:
            answers.append(Answer(sample=i, family=-1 - i, num_shared=0, num_own=span.num_rows))
            continue
        key = (sample.trajectory_id.prompt_id, sample.token_ids[:shared].numpy().tobytes())
        family = families.setdefault(key, len(families))
        own = max(span.num_rows - shared, 0)
        answers.append(Answer(sample=i, family=family, num_shared=shared, num_own=own))
    for answer in answers:
        if not limit.allows(answer.num_shared + answer.num_own, 1):
            raise ValueError(
                f"sample {samples[answer.sample].trajectory_id} needs {answer.num_shared + answer.num_own} rows, a "
                f"micro-batch holds {max_tokens_per_micro_batch}; raise max_tokens_per_micro_batch"
            )
    filler = samples[0].token_ids[:1]
    return TrainBatch(
        micro_batches=tuple(
            tuple(_build(samples, spans, b) if b else _empty(filler) for b in rank)
            for rank in spread(answers, limit, dp_size)
        ),
        num_loss_tokens=num_loss_tokens,
        num_samples=len(samples),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _LossSpan:
    """Where a sample's loss tokens are (`positions` [n]), and the rows that predicting them takes."""

    positions: np.ndarray[tuple[int], np.dtype[np.int64]]
    num_rows: int

    @property
    def num_loss_tokens(self) -> int:
        return len(self.positions)


def _loss_span(sample: TrainingSample) -> _LossSpan:
    positions = np.flatnonzero(sample.loss_mask.numpy())
    if len(positions) and positions[0] == 0:
        raise ValueError(f"sample {sample.trajectory_id}: token 0 is a loss token, but nothing predicts it")
    return _LossSpan(positions=positions, num_rows=int(positions[-1]) if len(positions) else 0)


def _build(samples: Sequence[TrainingSample], spans: Sequence[_LossSpan], micro_batch: Bin) -> MicroBatch:
    """Lay the families out one after the other: [shared prompt] [answer] [answer] ..."""
    token_ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    kv_rows: list[np.ndarray] = []
    q_lens: list[int] = []
    predict_rows: list[np.ndarray] = []
    order: list[int] = []
    row = 0

    def segment(sample: TrainingSample, start: int, end: int, ancestors: np.ndarray) -> None:
        nonlocal row
        token_ids.append(sample.token_ids[start:end].numpy())
        positions.append(np.arange(start, end))
        kv_rows.append(np.concatenate([ancestors, np.arange(row, row + end - start)]))
        q_lens.append(end - start)
        row += end - start

    for family in micro_batch.families():
        first = samples[family[0].sample]
        # A lone sample is one segment: two would compute the same with one more call.
        shared = family[0].num_shared if len(family) > 1 else 0
        start = row
        if shared:
            segment(first, 0, shared, np.arange(0))
        for answer in family:
            sample, span = samples[answer.sample], spans[answer.sample]
            own = row
            end = max(span.num_rows, 0)
            if end > shared:
                segment(sample, shared, end, np.arange(start, start + shared))
            predictor = span.positions - 1
            predict_rows.append(np.where(predictor < shared, start + predictor, own + predictor - shared))
            order.append(answer.sample)

    counts = [spans[i].num_loss_tokens for i in order]
    masks = [torch.from_numpy(spans[i].positions) for i in order]
    return MicroBatch(
        token_ids=torch.from_numpy(np.concatenate(token_ids)),
        position_ids=torch.from_numpy(np.concatenate(positions)),
        cu_seqlens_q=_cumulative(q_lens),
        kv_rows=torch.from_numpy(np.concatenate(kv_rows)),
        cu_seqlens_k=_cumulative([len(rows) for rows in kv_rows]),
        predict_rows=torch.from_numpy(np.concatenate(predict_rows)),
        target_ids=torch.cat([samples[i].token_ids[at] for i, at in zip(order, masks, strict=True)]),
        sample_index=torch.from_numpy(np.repeat(np.arange(len(order)), counts)),
        rollout_logprobs=torch.cat([samples[i].rollout_logprobs[at] for i, at in zip(order, masks, strict=True)]),
        advantages=torch.cat([samples[i].advantages[at] for i, at in zip(order, masks, strict=True)]),
        trajectory_ids=tuple(samples[i].trajectory_id for i in order),
    )


def _empty(filler: torch.Tensor) -> MicroBatch:
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
        rollout_logprobs=torch.zeros(0),
        advantages=torch.zeros(0),
        trajectory_ids=(),
    )


def _cumulative(lengths: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
