"""Seconds of one policy update on given completions: packed with shared prompts, packed without, padded.

    python -m benchmarks.train_step                                                   # short answers, a toy model
    python -m benchmarks.train_step --shape tiny --prompts 8 --samples 8 --prompt 16:256 --new 16:256

"padded" is the usual way: rows of one length through transformers' sdpa attention under a mask, logits of every
position, AdamW. All three make the same gradient, which is checked first, from the same weights.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks import machine
from benchmarks.check import WrongOutput
from benchmarks.grpo.work import EPS_CLIP, LEARNING_RATE, MAX_GRAD_NORM, StepWork
from benchmarks.measure import Timing, profile_once, summarize, time_once
from benchmarks.models import PAD_ID, SHAPES, ModelShape, build_model
from benchmarks.report import RESULTS, Report, rate
from benchmarks.workload import LengthRange, draw_tokens
from skyrl_train.algorithms.objective import PolicyObjective
from skyrl_train.algorithms.policy_losses import ppo_clip
from skyrl_train.algorithms.reductions import token_mean
from skyrl_train.attention import ATTENTION_NAME
from skyrl_train.data.pack import pack
from skyrl_train.training.optimizer import OptimizerSettings
from skyrl_train.training.trainer import PolicyTrainer
from skyrl_train.training.update import update_policy
from skyrl_train.types import TrainingSample, TrajectoryId

TOY = ModelShape(
    name="toy",
    hidden_size=128,
    intermediate_size=512,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=64,
    tied=True,
)
ALL_SHAPES = {TOY.name: TOY, **SHAPES}
MODES = ("shared", "unshared", "padded")
MAX_PADDED_LOGITS_BYTES = 2 << 30
"""Of one padded micro-batch in float32; several copies of them are alive at once."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
Update = Callable[[], float]
"""One update; returns the gradient's norm."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=ALL_SHAPES, default=TOY.name)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16, help="completions a prompt")
    parser.add_argument("--prompt", type=LengthRange.parse, default=LengthRange(low=12, high=12), metavar="LOW:HIGH")
    parser.add_argument("--new", type=LengthRange.parse, default=LengthRange(low=3, high=7), metavar="LOW:HIGH")
    parser.add_argument("--micro-batch-tokens", type=int, default=16384, help="rows of a micro-batch, padding included")
    parser.add_argument("--modes", type=lambda text: tuple(text.split(",")), default=MODES)
    parser.add_argument("--rounds", type=int, default=5, help="how often the modes take turns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", action="store_true", help="one more update of each, by operator, in the log")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    args.dtype = getattr(torch, args.dtype)
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, list[Timing]]:
    args = parse_args(argv)
    shape = ALL_SHAPES[args.shape]
    work = StepWork.draw(
        args.prompts, args.samples, prompt=args.prompt, new=args.new, vocab_size=shape.vocab_size, seed=args.seed
    )
    samples = draw_samples(work)
    stem = f"train-step-{args.shape}-{args.prompts}x{args.samples}-{machine.slug(args.device)}"
    report = Report(f"One policy update: {args.prompts} prompts x {args.samples} samples, {args.shape}", stem, args.out)
    report.log(str(work))
    updates: dict[str, Update] = {}
    num_rows: dict[str, int] = {}
    for mode in args.modes:
        attention = "sdpa" if mode == "padded" else ATTENTION_NAME
        model = build_model(shape, attn_implementation=attention, device=args.device, dtype=args.dtype, seed=args.seed)
        if mode == "padded":
            num_rows[mode] = len(samples) * max(len(sample.token_ids) for sample in samples)
            max_rows = min(args.micro_batch_tokens, MAX_PADDED_LOGITS_BYTES // (4 * shape.vocab_size))
            report.log(f"padded: micro-batches of up to {max_rows} rows")
            updates[mode] = padded_update(model, samples, max_rows)
        else:
            batch = pack(samples, max_tokens_per_micro_batch=args.micro_batch_tokens, share_prefix=mode == "shared")
            num_rows[mode] = sum(len(m.token_ids) for m in batch.micro_batches[0])
            updates[mode] = packed_update(model, samples, args.micro_batch_tokens, share_prefix=mode == "shared")
    norms = {mode: update() for mode, update in updates.items()}
    report.log("; ".join(f"{mode}: gradient norm {norm:.6f}" for mode, norm in norms.items()))
    if max(norms.values()) - min(norms.values()) > TOLERANCE[args.dtype] * max(norms.values()):
        raise WrongOutput(f"the modes' gradients differ: {norms}")

    timings: dict[str, list[Timing]] = {mode: [] for mode in updates}
    for i in range(args.rounds):
        for mode, update in updates.items():
            timings[mode].append(time_once(update, args.device))
            report.log(f"{mode}, round {i}: {timings[mode][-1]}")
    for mode, update in updates.items() if args.profile else ():
        report.log(f"{mode}, by operator:\n{profile_once(update, args.device)}")
    write(report, args, work, timings, num_rows)
    return timings


def draw_samples(work: StepWork) -> list[TrainingSample]:
    rng = random.Random(work.seed)
    samples = []
    for p, (prompt, lens) in enumerate(zip(work.prompts(0), work.completion_lens, strict=True)):
        for s, length in enumerate(lens):
            loss_mask = torch.tensor([False] * len(prompt) + [True] * length)
            samples.append(
                TrainingSample(
                    trajectory_id=TrajectoryId(prompt_id=str(p), sample=s),
                    token_ids=torch.tensor(prompt + draw_tokens(rng, length, work.vocab_size)),
                    loss_mask=loss_mask,
                    rollout_logprobs=torch.zeros(len(loss_mask)),
                    rewards=torch.zeros(len(loss_mask)),
                    advantages=loss_mask * rng.uniform(-1, 1),
                    num_prompt_tokens=len(prompt),
                )
            )
    return samples


def packed_update(
    model: PreTrainedModel, samples: Sequence[TrainingSample], max_rows: int, *, share_prefix: bool
) -> Update:
    """Packing included: a training step packs."""
    trainer = PolicyTrainer(model, OptimizerSettings(lr=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM))
    objective = PolicyObjective(policy_loss=ppo_clip, reduction=token_mean)

    def update() -> float:
        batch = pack(samples, max_tokens_per_micro_batch=max_rows, share_prefix=share_prefix)
        return update_policy(trainer, [batch], objective).metrics["policy/grad_norm"]

    return update


def padded_update(
    model: PreTrainedModel, samples: Sequence[TrainingSample], max_rows: int, *, by_length: bool = False
) -> Update:
    """Every sample in a row of the longest one's length; `by_length`: sorted, in a row of its micro-batch's longest."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    num_loss_tokens = sum(int(sample.loss_mask.sum()) for sample in samples)
    parts = padded_parts(samples, max_rows, by_length=by_length)

    def update() -> float:
        for part, length in parts:
            token_ids = torch.full((len(part), length), PAD_ID)
            mask, loss_mask = torch.zeros(len(part), length, dtype=torch.int64), torch.zeros(len(part), length)
            advantages = torch.zeros(len(part), length)
            for i, sample in enumerate(part):
                n = len(sample.token_ids)
                token_ids[i, :n], mask[i, :n], loss_mask[i, :n] = sample.token_ids, 1, sample.loss_mask.float()
                advantages[i, :n] = sample.advantages
            token_ids, mask, loss_mask, advantages = (
                x.to(model.device) for x in (token_ids, mask, loss_mask[:, 1:], advantages[:, 1:])
            )
            logits = model(input_ids=token_ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            logprobs = torch.log_softmax(logits.float(), dim=-1).gather(-1, token_ids[:, 1:, None])[..., 0]
            ratio = torch.exp(logprobs - logprobs.detach())
            clipped = ratio.clamp(1 - EPS_CLIP, 1 + EPS_CLIP)
            losses = torch.maximum(-ratio * advantages, -clipped * advantages) * loss_mask
            (losses.sum() / num_loss_tokens).backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return float(norm)

    return update


def padded_parts(
    samples: Sequence[TrainingSample], max_rows: int, *, by_length: bool
) -> list[tuple[list[TrainingSample], int]]:
    """Micro-batches of at most `max_rows` rows, padding included (of one sample if that is longer), and their length.

    Lengths 2 5 2 5 by 10 rows: [2 5] [2 5], both of length 5; by length: [2 2] of length 2 and [5 5] of length 5.
    """
    longest = max(len(sample.token_ids) for sample in samples)
    ordered = sorted(samples, key=lambda sample: len(sample.token_ids)) if by_length else list(samples)
    parts: list[list[TrainingSample]] = []
    for sample in ordered:
        length = len(sample.token_ids) if by_length else longest
        if parts and (len(parts[-1]) + 1) * length <= max_rows:
            parts[-1].append(sample)
        else:
            parts.append([sample])
    return [(part, max(len(s.token_ids) for s in part) if by_length else longest) for part in parts]


def write(
    report: Report,
    args: argparse.Namespace,
    work: StepWork,
    timings: dict[str, list[Timing]],
    num_rows: dict[str, int],
) -> None:
    shape = ALL_SHAPES[args.shape]
    report.facts(
        {
            **machine.describe(args.device),
            "threads": str(torch.get_num_threads()),
            "model": f"Qwen2 of shape {args.shape}, {shape.num_step_weights / 1e6:.1f} million weights, "
            f"{str(args.dtype).removeprefix('torch.')}, random with seed {args.seed}",
            "workload": f"{work}; seed {args.seed}; micro-batches of {args.micro_batch_tokens} rows",
        }
    )
    report.text(
        "Tokens count each sample whole, prompt and completion, in every mode; rows are what the model computed. "
        f"Median of {args.rounds} updates."
    )
    num_tokens = sum(work.prompt_lens) * work.num_samples + work.num_completion_tokens
    figures = {mode: summarize(values) for mode, values in timings.items()}
    report.table(
        ["mode", "rows", "seconds", "min", "max", "processor s", "tokens/s", "processors used by others, up to"],
        [
            [
                mode,
                f"{num_rows[mode]:,}",
                *(f"{seconds:.3f}" for seconds in (f.median_s, f.min_s, f.max_s, f.cpu_s)),
                rate(num_tokens, f.median_s),
                f.others,
            ]
            for mode, f in figures.items()
        ],
    )
    report.save()


if __name__ == "__main__":
    main()
