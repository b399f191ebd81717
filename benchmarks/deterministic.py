"""What exactness costs on a CPU: rollouts and updates in plain, deterministic and on-policy mode, in turn.

    python -m benchmarks.deterministic                 # the built-in task's model and the tiny shape, about 4 minutes
    python -m benchmarks.deterministic --cases tiny --rounds 9 --threads 2

plain            the engine and trainer as they are by default
deterministic    generator.deterministic_inference.enabled: the engine's bits don't depend on the batch; plain trainer
on policy        and rl_on_policy_target: the trainer's log-probabilities are the engine's to the bit

A round is one rollout and one update of each mode, each on its own copy of the same model. Answers have given lengths,
so all modes make and train on the same number of tokens. The largest |trainer - engine| log-probability of all rounds
is printed beside: of the on-policy mode it must be 0, or the run fails.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks import machine
from benchmarks.check import WrongOutput
from benchmarks.grpo.work import LEARNING_RATE, MAX_GRAD_NORM, StepWork
from benchmarks.measure import Timing, summarize, time_once
from benchmarks.models import SHAPES, build_model
from benchmarks.report import RESULTS, Report, rate
from benchmarks.workload import LengthRange
from skyrl_train.algorithms.objective import PolicyObjective
from skyrl_train.algorithms.policy_losses import ppo_clip
from skyrl_train.algorithms.reductions import token_mean
from skyrl_train.attention import ATTENTION_NAME
from skyrl_train.data.pack import pack
from skyrl_train.engines.embedded.config import EmbeddedConfig
from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.training.builtin_model import prepare_builtin
from skyrl_train.training.model import load_model
from skyrl_train.training.optimizer import OptimizerSettings
from skyrl_train.training.trainer import PolicyTrainer
from skyrl_train.training.update import update_policy
from skyrl_train.types import (
    Completion,
    GenerateRequest,
    LocalWeights,
    SamplingParams,
    TrainingSample,
    TrajectoryId,
    WeightUpdate,
)
from skyrl_train.weight_sync.sync import sync_weights

MODES = ("plain", "deterministic", "on policy")
BUILTIN = "builtin:arithmetic"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and a step of work. `shape` None is the built-in task's model."""

    name: str
    shape: str | None
    num_prompts: int
    num_samples: int
    prompt: LengthRange
    new: LengthRange


CASES = {
    case.name: case
    for case in (
        # As the built-in task's steps are: prompts of 18 tokens, answers of about 4.
        Case(
            name="builtin",
            shape=None,
            num_prompts=64,
            num_samples=16,
            prompt=LengthRange(low=18, high=18),
            new=LengthRange(low=2, high=6),
        ),
        Case(
            name="tiny",
            shape="tiny",
            num_prompts=16,
            num_samples=4,
            prompt=LengthRange(low=16, high=128),
            new=LengthRange(low=16, high=128),
        ),
    )
}


@dataclass
class Side:
    """One mode on one model: its engine, its trainer, and what was measured of them."""

    mode: str
    model: PreTrainedModel
    work: StepWork
    rollouts: list[Timing] = field(default_factory=list)
    updates: list[Timing] = field(default_factory=list)
    max_diff: float = 0.0

    def __post_init__(self) -> None:
        self._runner = asyncio.Runner()
        self._trainer = PolicyTrainer(
            self.model,
            OptimizerSettings(lr=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM),
            on_policy_target=self.mode == "on policy",
        )
        self._objective = PolicyObjective(policy_loss=ppo_clip, reduction=token_mean)
        longest = max(self.work.prompt_lens) + self.work.max_completion_len
        self._engine = EmbeddedEngine(
            self.model, None, config=EmbeddedConfig(max_context_len=longest, deterministic=self.mode != "plain")
        )

    def round(self, step: int, report: Report | None) -> None:
        """One step of the work; without a report it is a warm-up and isn't kept."""
        done: list[Completion] = []
        rollout = time_once(lambda: done.extend(self._runner.run(self._answers(step))), "cpu")
        samples = self._samples(step, done)
        metrics: dict[str, float] = {}

        def update() -> None:
            batch = pack(samples, max_tokens_per_micro_batch=16384)
            metrics.update(update_policy(self._trainer, [batch], self._objective).metrics)

        training = time_once(update, "cpu")
        version = WeightUpdate(version=self._trainer.version, source=LocalWeights())
        self._runner.run(sync_weights(self._engine, version))
        diff = metrics["policy/rollout_logprob_abs_diff_max"]
        self.max_diff = max(self.max_diff, diff)
        if self.mode == "on policy" and diff != 0.0:
            raise WrongOutput(f"the on-policy trainer is {diff} off the engine's log-probabilities")
        if report is not None:
            self.rollouts.append(rollout)
            self.updates.append(training)
            report.log(f"{self.mode}, step {step}: rollout {rollout}; update {training}; largest difference {diff:.3g}")

    def close(self) -> None:
        self._runner.run(self._engine.close())
        self._runner.close()

    async def _answers(self, step: int) -> list[Completion]:
        return await asyncio.gather(
            *(
                self._engine.generate(
                    GenerateRequest(
                        request_id=str(i),
                        prompt_token_ids=request.prompt_token_ids,
                        sampling=SamplingParams(max_new_tokens=request.max_new_tokens, ignore_eos=True, seed=i),
                    )
                )
                for i, request in enumerate(self.work.requests(step))
            )
        )

    def _samples(self, step: int, answers: Sequence[Completion]) -> list[TrainingSample]:
        samples = []
        for i, (request, answer) in enumerate(zip(self.work.requests(step), answers, strict=True)):
            num_prompt = len(request.prompt_token_ids)
            mask = torch.arange(num_prompt + len(answer.token_ids)) >= num_prompt
            samples.append(
                TrainingSample(
                    trajectory_id=TrajectoryId(
                        prompt_id=str(i // self.work.num_samples), sample=i % self.work.num_samples
                    ),
                    token_ids=torch.tensor(request.prompt_token_ids + answer.token_ids),
                    loss_mask=mask,
                    rollout_logprobs=torch.tensor((0.0,) * num_prompt + answer.logprobs),
                    rewards=torch.zeros(len(mask)),
                    advantages=mask * (1.0 if i % 2 else -1.0),
                    num_prompt_tokens=num_prompt,
                )
            )
        return samples


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deterministic", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=lambda text: tuple(text.split(",")), default=tuple(CASES))
    parser.add_argument("--rounds", type=int, default=7, help="how often the modes take turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=None, help="of each case; default: its own number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Side]]:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    report = Report("What exactness costs on a CPU", f"deterministic-{machine.slug('cpu')}", args.out)
    results: dict[str, dict[str, Side]] = {}
    for name in args.cases:
        case = CASES[name]
        models = {mode: _model(case, args.seed) for mode in MODES}
        work = StepWork.draw(
            args.prompts or case.num_prompts,
            case.num_samples,
            prompt=case.prompt,
            new=case.new,
            vocab_size=models["plain"].get_input_embeddings().weight.shape[0],  # type: ignore[operator]
            seed=args.seed,
        )
        report.log(f"{name}: {work}")
        sides = {mode: Side(mode, models[mode], work) for mode in MODES}
        for step in range(args.rounds + 1):
            for side in sides.values():
                side.round(step, report if step else None)
        for side in sides.values():
            side.close()
        results[name] = sides
    write(report, args, results)
    return results


def _model(case: Case, seed: int) -> PreTrainedModel:
    if case.shape is None:
        return load_model(prepare_builtin(BUILTIN, seed=42, on_progress=lambda *_: None))
    return build_model(
        SHAPES[case.shape], attn_implementation=ATTENTION_NAME, device="cpu", dtype=torch.float32, seed=seed
    )


def write(report: Report, args: argparse.Namespace, results: dict[str, dict[str, Side]]) -> None:
    report.facts({**machine.describe("cpu"), "threads": str(args.threads), "dtype": "float32"})
    report.text(
        f"Medians of {args.rounds} rounds in which the modes took turns. A ratio is the median over rounds of a mode's "
        "processor seconds over plain's in the same round, which others on the machine disturb less than the clock; "
        "under 1 is less work than plain."
    )
    for name, sides in results.items():
        work = next(iter(sides.values())).work
        report.text(f"## {name}: {work}")
        rows = []
        for mode, side in sides.items():
            rollout, update = summarize(side.rollouts), summarize(side.updates)
            others = max((f.others_frac for f in (rollout, update) if f.others_frac is not None), default=None)
            rows.append(
                [
                    mode,
                    rate(work.num_completion_tokens, rollout.median_s),
                    f"{rollout.median_s:.3f}",
                    f"{_ratio(side.rollouts, sides['plain'].rollouts):.2f}",
                    f"{update.median_s:.3f}",
                    f"{_ratio(side.updates, sides['plain'].updates):.2f}",
                    f"{side.max_diff:.2g}",
                    "" if others is None else f"{others:.0%}",
                ]
            )
        report.table(
            [
                *("mode", "rollout tokens/s", "rollout s", "ratio to plain", "update s", "ratio to plain"),
                *("largest log-probability difference", "processors used by others, up to"),
            ],
            rows,
        )
    report.save()


def _ratio(mine: Sequence[Timing], plain: Sequence[Timing]) -> float:
    return statistics.median(a.cpu_s / b.cpu_s for a, b in zip(mine, plain, strict=True))


if __name__ == "__main__":
    main()
