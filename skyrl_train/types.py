"""What travels along the path, each complete when made:

    Prompt -> Completion -> Trajectory -> ScoredGroup -> TrainingSample -> TrainBatch -> WeightUpdate
      data      engine       rollout       rollout         rollout          data/pack     weight_sync

Shapes: `L` tokens of one sequence, `G` samples of one prompt. Intervals are half open.
Ids and log-probabilities come from the engine and are never re-encoded from text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from skyrl_train.data.pack import MicroBatch

Message = Mapping[str, Any]
"""One chat message in OpenAI's form: at least `role` and `content`."""

FinishReason = Literal["stop", "length", "abort"]
DEADLINE = "deadline"
"""Stop reason of an answer that ended because its request's time was over."""
TrajectoryStatus = Literal["completed", "truncated", "aborted", "failed"]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One task for the policy.

    `prompt_id` is unique within a run: a row that comes again in the next epoch is another prompt.
    `target` is what the environment compares with; `extras` are the row's other columns, untouched.
    """

    prompt_id: str
    messages: tuple[Message, ...]
    environment: str
    target: Any = None
    extras: Mapping[str, Any] = field(default_factory=dict)


GrammarKind = Literal["json_schema", "regex", "ebnf"]


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """What a completion must follow: `text` is a JSON schema, a regular expression, or a grammar in EBNF."""

    kind: GrammarKind
    text: str


@dataclass(frozen=True, kw_only=True)
class LogitProcessor:
    """A function of the user's on the logits of each next token: its dotted path, and arguments that JSON can hold.

    It travels by name and is never pickled: who names one must be trusted to run code.
    """

    path: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            json.dumps(self.arguments)
        except (TypeError, ValueError) as exc:
            raise ValueError(f"logit processor {self.path}: its arguments must be what JSON can hold: {exc}") from exc


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample one completion. Off values: `top_p` 1, `top_k` 0, `min_p` 0, penalties 1 / 0 / 0.

    `temperature` 0 is greedy. Order: penalties on the logits, temperature, top-k, top-p, min-p; in the embedded engine,
    `logit_processor` and then `grammar` before them all.
    `stop` strings and `stop_token_ids` end the completion and are kept in ids and log-probabilities.
    `seed` makes the completion reproducible where the engine can ("seed" in its capabilities): token `i` depends on
    (seed, i) and the logits alone. An engine that can't leaves it unread, and the run says so once, at its start.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    grammar: Grammar | None = None
    logit_processor: LogitProcessor | None = None

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, "max_new_tokens", ">= 1", self.max_new_tokens)
        # Below this, logits / temperature overflows float32.
        _require(
            self.temperature == 0 or self.temperature >= 1e-4, "temperature", "0 or at least 1e-4", self.temperature
        )
        _require(0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p)
        _require(0 <= self.top_k < 2**31, "top_k", "in [0, 2**31) (0 is off)", self.top_k)
        _require(0 <= self.min_p <= 1, "min_p", "in [0, 1]", self.min_p)
        _require(self.repetition_penalty > 0, "repetition_penalty", "> 0", self.repetition_penalty)
        _require(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            "min_new_tokens",
            f"in [0, max_new_tokens={self.max_new_tokens}]",
            self.min_new_tokens,
        )
        _require(all(self.stop), "stop", "non-empty strings", self.stop)


@dataclass(frozen=True, kw_only=True)
class VersionSpan:
    """Tokens [start, end) of a completion were sampled under policy `version`.

    A completion holds one span for each version that it saw, in order and without gaps, so a text
    that outlives a weight update knows where the policy changed.
    """

    version: int
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class SessionRef:
    """Continue after request `parent_request_id` in a session; the request carries only new tokens.

    Two requests with one parent are branches. `parent_request_id` None starts at the root.
    """

    session_id: str
    parent_request_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What the engine made of one request: `token_ids` [L] and their `logprobs` [L].

    Example, "12+7=" answered by "19<end>" while the weights changed after the first token:
        token_ids (20, 28, 1), logprobs (-0.1, -0.3, -0.0), finish_reason "stop",
        versions (VersionSpan(version=4, start=0, end=1), VersionSpan(version=5, start=1, end=3))
    `stop_reason` is the string or the id that ended it, None when it was the model's end token; of an aborted one, why
    the engine itself ended it, None when somebody asked for that.
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    versions: tuple[VersionSpan, ...]
    num_cached_tokens: int = 0
    stop_reason: str | int | None = None

    def __post_init__(self) -> None:
        _same_length(f"completion {self.request_id}", token_ids=self.token_ids, logprobs=self.logprobs)
        _check_spans(f"completion {self.request_id}", self.versions, len(self.token_ids))


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """One completion to make. Higher `priority` is served first. `adapter` None is the policy.

    `partial` is what an earlier, aborted attempt at this request made: sampling goes on after its last token, within
    the same budget, and the completion holds both parts with the versions that each was sampled under.
    `deadline_s` seconds after it was submitted it ends with what it has: finish reason "abort", stop reason "deadline".
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    session: SessionRef | None = None
    adapter: str | None = None
    priority: int = 0
    partial: Completion | None = None
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise ValueError(f"request {self.request_id}: prompt_token_ids is empty; at least one token is needed")
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise ValueError(f"request {self.request_id}: deadline_s must be over 0, found {self.deadline_s}")
        if self.partial is not None and len(self.partial.token_ids) >= self.sampling.max_new_tokens:
            raise ValueError(
                f"request {self.request_id}: its partial answer has {len(self.partial.token_ids)} tokens already, "
                f"max_new_tokens is {self.sampling.max_new_tokens}; there is nothing left to sample"
            )


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One exchange: the whole prompt that went in (history included) and what came out."""

    prompt_token_ids: tuple[int, ...]
    completion: Completion


@dataclass(frozen=True, kw_only=True, order=True)
class TrajectoryId:
    """Prompt, sample and branch; written `7/2/0`: branch 0 of sample 2 of prompt 7."""

    prompt_id: str
    sample: int
    branch: int = 0

    def __str__(self) -> str:
        return f"{self.prompt_id}/{self.sample}/{self.branch}"


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One run of the policy through an environment; `rewards` has one entry a turn.

    `failed` means that the environment or the engine raised: `error` says what; such a trajectory
    is logged and counted, never trained on.

    A search tries more than one answer to a prompt: `branches` are then all that it sampled, each as a trajectory under
    an id of its own (`TrajectoryId.branch` over 0), and they are trained on in this one's place. This one is what came
    of it, the best path: it is scored, logged and evaluated.
    """

    id: TrajectoryId
    turns: tuple[Turn, ...]
    rewards: tuple[float, ...]
    status: TrajectoryStatus
    error: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    branches: tuple[Trajectory, ...] = ()

    def __post_init__(self) -> None:
        _same_length(f"trajectory {self.id}", turns=self.turns, rewards=self.rewards)
        ids = [self.id, *(branch.id for branch in self.branches)]
        if len(set(ids)) < len(ids):
            raise ValueError(f"trajectory {self.id}: its branches need ids of their own, found {ids}")

    @property
    def reward(self) -> float:
        """The trajectory's return: the sum over its turns."""
        return float(sum(self.rewards))


@dataclass(frozen=True, kw_only=True)
class ScoredGroup:
    """All samples of one prompt with their rewards [G]: what a group-relative advantage compares.

    `baseline` is the reward of the prompt's greedy answer, where one was made (remax).
    """

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]
    rewards: tuple[float, ...]
    baseline: float | None = None

    def __post_init__(self) -> None:
        name = f"group {self.prompt.prompt_id}"
        _same_length(name, trajectories=self.trajectories, rewards=self.rewards)


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSequence:
    """One token sequence as it was rolled out, before anything was compared. All tensors are [L], on the CPU.

    token_ids int64: prompt, completions and observations, in order.
    loss_mask bool: True where the policy sampled the token. Token 0 is never True: nothing predicts it.
    rollout_logprobs float32: the engine's, defined where loss_mask is True, 0 elsewhere.
    rewards float32: a turn's reward stands at the last token of its completion, 0 elsewhere.
    policy_versions int64: the version that each token was sampled under, -1 elsewhere; None where nobody noted it.
    `num_prompt_tokens` is the length of the first prompt; sequences of one group share that prefix.
    """

    trajectory_id: TrajectoryId
    token_ids: torch.Tensor
    loss_mask: torch.Tensor
    rollout_logprobs: torch.Tensor
    rewards: torch.Tensor
    num_prompt_tokens: int
    policy_versions: torch.Tensor | None = None

    def __post_init__(self) -> None:
        _same_length(f"sample {self.trajectory_id}", **self.tensors())

    def tensors(self) -> dict[str, torch.Tensor]:
        """All per-token tensors by name."""
        return {
            "token_ids": self.token_ids,
            "loss_mask": self.loss_mask,
            "rollout_logprobs": self.rollout_logprobs,
            "rewards": self.rewards,
            **({} if self.policy_versions is None else {"policy_versions": self.policy_versions}),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingSample(TokenSequence):
    """A sequence to train on: `advantages` [L] float32, defined where loss_mask is True, 0 elsewhere.

    With a critic: `returns` are its targets and `values` its predictions before the update, both [L] float32.
    """

    advantages: torch.Tensor
    returns: torch.Tensor | None = None
    values: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        own = {"advantages": self.advantages, "returns": self.returns, "values": self.values}
        return {**super().tensors(), **{name: tensor for name, tensor in own.items() if tensor is not None}}


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainBatch:
    """One optimizer step: micro_batches[dp_rank][k].

    `num_loss_tokens` and `num_samples` count the whole mini-batch, all ranks and micro-batches: they
    are the loss's one denominator, so the gradient does not depend on how the batch was cut.
    """

    micro_batches: tuple[tuple[MicroBatch, ...], ...]
    num_loss_tokens: int
    num_samples: int


@dataclass(frozen=True, kw_only=True)
class LocalWeights:
    """The engine runs the trainer's own tensors: nothing is moved."""


@dataclass(frozen=True, kw_only=True)
class DiskWeights:
    """A folder in HF format on a disk that both sides see; it stays as it is until the next update."""

    path: str


def _always() -> bool:
    return True


@dataclass(frozen=True, kw_only=True, eq=False)
class NamedWeights:
    """The trainer's tensors by their name in a Hugging Face checkpoint, to be copied into an engine's own.

    Tensors that the update does not name stay as they are (LoRA changes the adapted matrices only). A tied pair is
    named once. `still_valid` is False once the trainer began to change the tensors: who reads them later, to bring a
    restarted engine up to date, asks before and after, and what was read in between counts only if both say True.
    """

    tensors: Mapping[str, torch.Tensor]
    still_valid: Callable[[], bool] = _always


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterWeights:
    """The policy is the base model with this LoRA adapter: `tensors` by peft's names, `config` as adapter_config.json.

    Requests that name no adapter are answered with it from this update on.
    """

    tensors: Mapping[str, torch.Tensor]
    config: Mapping[str, Any]
    still_valid: Callable[[], bool] = _always


WeightSource = LocalWeights | NamedWeights | AdapterWeights | DiskWeights


@dataclass(frozen=True, kw_only=True)
class WeightUpdate:
    """The policy's weights after optimizer step `version`, and where the engine finds them."""

    version: int
    source: WeightSource


def _require(ok: bool, name: str, wanted: str, found: object) -> None:
    if not ok:
        raise ValueError(f"{name} must be {wanted}, found {found!r}")


def _same_length(owner: str, **sequences: Sequence[Any] | torch.Tensor) -> None:
    lengths = {name: len(value) for name, value in sequences.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{owner}: parallel sequences differ in length: {lengths}")


def _check_spans(owner: str, spans: tuple[VersionSpan, ...], length: int) -> None:
    end = 0
    for span in spans:
        if span.start != end or span.end <= span.start:
            raise ValueError(f"{owner}: version spans must cover [0, {length}) without gaps, found {spans}")
        end = span.end
    if end != length:
        raise ValueError(f"{owner}: version spans end at {end}, the completion has {length} tokens")
