"""The engine's log-probabilities against the trainer's: stop over a bound, and say where the two part.

    weights          the engine's tensors, one by one     ─┐
    tokens           the first token over the bound        ├─► LogprobMismatchError
    sampling space   what the engine's numbers are of      │
    layer            hidden states on that very sequence  ─┘

Weights and layers can be looked at where the engine's module lives in this process.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from skyrl_train.data.pack import MicroBatch
from skyrl_train.engines.base import LogprobSpace
from skyrl_train.engines.logprob_space import Sampling, comparable
from skyrl_train.errors import LogprobMismatchError
from skyrl_train.training.model import PolicyHead
from skyrl_train.training.trainer import PolicyTrainer
from skyrl_train.types import NamedWeights, TrainBatch, TrajectoryId

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4}
"""Of hidden states, relative to their largest; half precision has `HALF_TOLERANCE`."""

HALF_TOLERANCE = 3e-2


@dataclass(frozen=True, kw_only=True)
class FirstMismatch:
    """The first token of the mini-batch over the bound, samples in order.

    It is prediction `index` of micro-batch `micro_batch`. `position` counts from the start of the sequence;
    `turn_position` from the start of its turn, which is a run of tokens that the policy sampled. `version` is the
    policy's that sampled it, where that is known.
    """

    micro_batch: int
    index: int
    trajectory_id: TrajectoryId
    position: int
    turn: int
    turn_position: int
    token_id: int
    version: int | None
    rollout_logprob: float
    trainer_logprob: float
    num_over: int
    num_tokens: int
    bound: float

    def __str__(self) -> str:
        return (
            f"{self.num_over} of {self.num_tokens} tokens differ by more than {self.bound:g}; the first is token "
            f"{self.turn_position} of turn {self.turn} of trajectory {self.trajectory_id} (position {self.position}, "
            f"token id {self.token_id}{'' if self.version is None else f', sampled by version {self.version}'}): "
            f"engine {self.rollout_logprob:.6g}, trainer {self.trainer_logprob:.6g}"
        )


def first_mismatch(
    batch: TrainBatch, logprobs: Sequence[torch.Tensor], bound: float, *, version: int | None = None
) -> FirstMismatch | None:
    """None while |trainer - rollout| is at most `bound` at every token. `logprobs` are `PolicyTrainer.forward`'s.

    With the trainer's `version`, tokens that are known to come from another policy are not judged: of those a
    difference is no error. What is not a number is over any bound.
    """
    (micro_batches,) = batch.micro_batches
    found: tuple[int, int, int] | None = None
    num_over = 0
    for k, (micro_batch, now) in enumerate(zip(micro_batches, logprobs, strict=True)):
        over = ~((now.cpu() - micro_batch.rollout_logprobs).abs() <= bound)
        if version is not None and micro_batch.policy_versions is not None:
            over &= micro_batch.policy_versions == version
        num_over += int(over.sum())
        for index in over.nonzero()[:, 0].tolist():
            place = (int(micro_batch.token_index[index]), k, index)
            found = place if found is None else min(found, place)
    if found is None:
        return None
    _, k, index = found
    micro_batch = micro_batches[k]
    positions = micro_batch.position_ids[micro_batch.predict_rows] + 1
    own = micro_batch.sample_index == micro_batch.sample_index[index]
    turn, turn_position = _turn(positions[own], positions[index])
    return FirstMismatch(
        micro_batch=k,
        index=index,
        trajectory_id=micro_batch.trajectory_ids[int(micro_batch.sample_index[index])],
        position=int(positions[index]),
        turn=turn,
        turn_position=turn_position,
        token_id=int(micro_batch.target_ids[index]),
        version=None if micro_batch.policy_versions is None else int(micro_batch.policy_versions[index]),
        rollout_logprob=float(micro_batch.rollout_logprobs[index]),
        trainer_logprob=float(logprobs[k][index]),
        num_over=num_over,
        num_tokens=batch.num_loss_tokens,
        bound=bound,
    )


def _turn(positions: torch.Tensor, position: torch.Tensor) -> tuple[int, int]:
    """Which run of consecutive positions, and where in it: positions 4 5 8 9, position 9 -> (1, 1)."""
    starts = torch.cat([positions[:1], positions[1:][positions[1:] != positions[:-1] + 1]])
    turn = int((starts <= position).sum()) - 1
    return turn, int(position - starts[turn])


@dataclass(frozen=True, kw_only=True, eq=False)
class EngineView:
    """What of an engine can be looked at. `module` None: it is not in this process. `version` is what it serves now.

    `make_module` stands for a module that isn't there until somebody wants to look at it: an adapter, merged.
    """

    logprob_space: LogprobSpace
    sampling: Sampling
    version: Callable[[], int]
    module: torch.nn.Module | None = None
    make_module: Callable[[], torch.nn.Module] | None = None


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """`cause` is the first that was found: weights, sampling space, layer, or rollout when all of them agree.

    `tensor` and `layer` name the first that differs.
    """

    cause: str
    first: FirstMismatch
    weights: str
    space: str
    layer_report: str
    tensor: str | None = None
    layer: str | None = None

    def __str__(self) -> str:
        return "\n".join(
            [
                f"engine and trainer part ({self.cause}):",
                f"  weights: {self.weights}",
                f"  tokens: {self.first}",
                f"  sampling space: {self.space}",
                f"  layer: {self.layer_report}",
            ]
        )


@torch.no_grad()
def diagnose(
    first: FirstMismatch, batch: TrainBatch, trainer: PolicyTrainer, engine: EngineView | None = None
) -> Diagnosis:
    """Looks, in this order, at weights, tokens, sampling space and layers. The trainer must be as it was when `first`
    was found."""
    micro_batch = batch.micro_batches[0][first.micro_batch]
    weights, tensor = "the engine's tensors are not in this process", None
    space, unlike = "the engine is not known", None
    report, layer = "the engine's module is not in this process", None
    if engine is not None:
        unlike = comparable(engine.logprob_space, engine.sampling)
        space = unlike or f"comparable ({engine.logprob_space}, temperature {engine.sampling.temperature:g})"
    if engine is not None and engine.make_module is not None:
        engine = replace(engine, module=engine.make_module())
    if engine is not None and engine.module is trainer.model:
        weights = "the engine runs the trainer's own tensors"
        report = "the engine runs the trainer's own module"
    elif engine is not None and engine.module is not None:
        theirs = engine.module.state_dict()
        source = trainer.export_weights(trainer.version).source
        # Adapters: the update names the matrices that it merged into; the engine shares all others.
        ours = {**theirs, **source.tensors} if isinstance(source, NamedWeights) else trainer.model.state_dict()
        tensor, weights = compare_weights(ours, theirs)
        weights = f"engine at version {engine.version()}, trainer at {trainer.version}: {weights}"
        assert isinstance(engine.module, PreTrainedModel), type(engine.module)
        layer, report = _compare_layers(trainer, engine.module, micro_batch, first)
    causes = {"weights": tensor, "sampling space": unlike, "layer": layer}
    cause = next((name for name, found in causes.items() if found is not None), "rollout")
    if cause == "rollout" and engine is not None and engine.module is not None:
        report += "; it is not the model: look at the engine's attention and sampler, or at what was recorded"
    return Diagnosis(
        cause=cause, first=first, weights=weights, space=space, layer_report=report, tensor=tensor, layer=layer
    )


def compare_weights(trainer: Mapping[str, torch.Tensor], engine: Mapping[str, torch.Tensor]) -> tuple[str | None, str]:
    """The first name that differs, in the trainer's order, and what to say about it; None where all are equal."""
    unmatched = [*(name for name in trainer if name not in engine), *(name for name in engine if name not in trainer)]
    if unmatched:
        side = "the trainer" if unmatched[0] in trainer else "the engine"
        return unmatched[0], f"{len(unmatched)} tensors are on one side only; the first, {unmatched[0]}, is {side}'s"
    differing = [name for name, tensor in trainer.items() if not _equal(tensor, engine[name])]
    if not differing:
        return None, f"all {len(trainer)} tensors are equal (checksum {_checksum(trainer):08x})"
    name = differing[0]
    ours, theirs = trainer[name], engine[name]
    text = f"{len(differing)} of {len(trainer)} tensors differ (checksums {_checksum(trainer):08x}, "
    text += f"{_checksum(engine):08x} in the engine); the first is {name}"
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return name, f"{text}: {ours.dtype} {list(ours.shape)}, {theirs.dtype} {list(theirs.shape)} in the engine"
    return name, f"{text}, by {float((ours.double() - theirs.to(ours.device).double()).abs().max()):.3g} at most"


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b.to(a.device))


def _checksum(tensors: Mapping[str, torch.Tensor]) -> int:
    total = 0
    for name in sorted(tensors):
        content = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        total = zlib.crc32(content.numpy().tobytes(), zlib.crc32(name.encode(), total))
    return total


def _compare_layers(
    trainer: PolicyTrainer, engine: PreTrainedModel, micro_batch: MicroBatch, first: FirstMismatch
) -> tuple[str | None, str]:
    """Both modules under the trainer's attention, on the rows that the token's prediction looks at."""
    rows = rows_before(micro_batch, int(micro_batch.predict_rows[first.index]))
    ours, our_logprob = _run(trainer.head, micro_batch, rows, first.index)
    theirs, their_logprob = _run(trainer.head.over(engine), micro_batch, rows, first.index)
    for (name, a), (other, b) in zip(ours, theirs, strict=False):
        if name != other:
            return name, f"the trainer has {name} where the engine's module has {other}"
        difference, largest = float((a - b).abs().max()), float(a.abs().max())
        if not difference <= TOLERANCE.get(trainer.model.dtype, HALF_TOLERANCE) * largest:
            return name, f"{name} is the first whose outputs differ, by {difference:.3g} of {largest:.3g}"
    text = f"all {len(ours)} outputs agree; under the trainer's attention the engine's module gives that token "
    return None, f"{text}{their_logprob:.6g}, the trainer's {our_logprob:.6g}"


def _run(
    head: PolicyHead, micro_batch: MicroBatch, rows: torch.Tensor, index: int
) -> tuple[list[tuple[str, torch.Tensor]], float]:
    """Outputs [R, H] of embedding, layers and final norm, in the order in which they were made; the logprob."""
    model, device = head.model, head.model.device
    with _recording(model, rows) as outputs:
        result = head(
            micro_batch.token_ids.to(device),
            micro_batch.position_ids.to(device),
            micro_batch.predict_rows.to(device),
            micro_batch.target_ids.to(device),
            head.attention(micro_batch),
        )
    return outputs, float(result.logprobs[index])


@contextmanager
def _recording(model: PreTrainedModel, rows: torch.Tensor) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """While open, what embedding, decoder layers and body return goes to the list, as float64 on the CPU."""
    outputs: list[tuple[str, torch.Tensor]] = []
    # An engine may step this module at the same time, in a thread of its own.
    thread = threading.get_ident()
    body = model.base_model

    def hook(name: str) -> Callable[..., None]:
        def record(_: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if threading.get_ident() == thread:
                hidden = getattr(output, "last_hidden_state", None)
                hidden = hidden if hidden is not None else output[0] if isinstance(output, tuple) else output
                outputs.append((name, hidden[0].detach()[rows.to(hidden.device)].double().cpu()))

        return record

    watched = {"embedding": model.get_input_embeddings(), **_decoder_layers(body), "final norm": body}
    handles = [module.register_forward_hook(hook(name)) for name, module in watched.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _decoder_layers(body: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """`layers.0`, `layers.1`, ...: the list of modules that is as long as the configuration says."""
    config: Any = body.config
    count = config.get_text_config().num_hidden_layers
    for name, module in body.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return {f"{name}.{i}": layer for i, layer in enumerate(module)}
    return {}


def rows_before(micro_batch: MicroBatch, row: int) -> torch.Tensor:
    """The rows that `row` attends to, itself last: its own sequence up to there."""
    segment = int(torch.searchsorted(micro_batch.cu_seqlens_q, torch.tensor(row), right=True)) - 1
    keys = micro_batch.kv_rows[int(micro_batch.cu_seqlens_k[segment]) : int(micro_batch.cu_seqlens_k[segment + 1])]
    num_after = int(micro_batch.cu_seqlens_q[segment + 1]) - 1 - row
    return keys[: len(keys) - num_after]


class MismatchWatch:
    """Holds the bound of a run and, once it is built, its engine."""

    def __init__(self, max_diff: float) -> None:
        self.max_diff = max_diff
        self.engine: EngineView | None = None

    def check(self, trainer: PolicyTrainer, batch: TrainBatch, logprobs: Sequence[torch.Tensor]) -> None:
        """Raises LogprobMismatchError with the diagnosis when a token is over the bound."""
        first = first_mismatch(batch, logprobs, self.max_diff, version=trainer.version)
        if first is not None:
            raise LogprobMismatchError(str(diagnose(first, batch, trainer, self.engine)))
