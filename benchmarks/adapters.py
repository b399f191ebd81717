"""Decode tokens/s of the embedded engine with 0, 1, 4 and 8 adapters in one batch, beside the model alone and merged.

    python -m benchmarks.adapters                     # 32 requests, rank 8 on every linear map but the head
    python -m benchmarks.adapters --shape small --rank 32

All contestants decode the same 32 prompts at once, each in an engine of its own over the same tensors, and take turns
of a few steps: a ratio is of two turns of the same round, at the same context length, in processor seconds of this
process. So what else runs on the machine shifts both sides alike. The prompts' own steps are not counted.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks import machine
from benchmarks.models import SHAPES, build_model
from benchmarks.report import RESULTS, Report
from benchmarks.workload import LengthRange, draw_requests
from skyrl_train.attention import ATTENTION_NAME
from skyrl_train.engines.embedded.adapters.settings import LoraLimits
from skyrl_train.engines.embedded.adapters.sites import find_sites
from skyrl_train.engines.embedded.config import EmbeddedConfig
from skyrl_train.engines.embedded.core import EngineCore
from skyrl_train.types import AdapterWeights, Completion, GenerateRequest, SamplingParams
from skyrl_train.weight_sync.adapter import HIGH, LOW, PREFIX

TOLERANCE = 1e-3
"""Of a log-probability, against a plain forward pass of the merged model in float32."""
ALONE = "the model alone"


@dataclass(kw_only=True, eq=False)
class Contestant:
    """`adapters` [n]: request i names adapters[i]. `judge` is the plain module of request 0's answer."""

    name: str
    core: EngineCore
    adapters: tuple[str | None, ...]
    judge: PreTrainedModel
    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    done: dict[str, Completion] = field(default_factory=dict)
    first_prompt: tuple[int, ...] = ()

    def start(self, requests: Sequence[GenerateRequest]) -> None:
        """Add all and compute their prompts."""
        self.first_prompt = requests[0].prompt_token_ids
        for request in requests:
            self.core.add(request)
        while self.core.stats().num_waiting or self.core.stats().num_generated_tokens_total < len(requests):
            self._step()

    def take_turn(self, num_steps: int) -> bool:
        """False when all answers are complete."""
        before = self.core.stats().num_generated_tokens_total
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(num_steps):
            if self.core.has_work:
                self._step()
        self.cpu_s.append(time.process_time() - cpu)
        self.wall_s.append(time.perf_counter() - wall)
        self.num_tokens.append(self.core.stats().num_generated_tokens_total - before)
        return self.core.has_work

    def _step(self) -> None:
        self.done |= {item.completion.request_id: item.completion for item in self.core.step()}


def main(argv: Sequence[str] | None = None) -> list[Contestant]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--adapters", type=_ints, default=(1, 4, 8))
    parser.add_argument("--turn", type=int, default=8, help="steps of one contestant before the next one's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    shape = SHAPES[args.shape]
    model = build_model(shape, attn_implementation=ATTENTION_NAME, device="cpu", dtype=torch.float32, seed=args.seed)
    stem = f"adapters-{args.shape}-rank{args.rank}-{machine.slug('cpu')}"
    report = Report(f"Adapters in one batch, {args.shape}, rank {args.rank}", stem, args.out)
    contestants = build(model.requires_grad_(False), args)
    length = LengthRange(low=args.prompt, high=args.prompt)
    prompts = draw_requests(args.requests, prompt=length, new=length, vocab_size=shape.vocab_size, seed=args.seed)
    for contestant in contestants:
        contestant.start(
            [
                GenerateRequest(
                    request_id=str(i),
                    prompt_token_ids=prompt.prompt_token_ids,
                    sampling=SamplingParams(max_new_tokens=args.new, ignore_eos=True, seed=i),
                    adapter=contestant.adapters[i],
                )
                for i, prompt in enumerate(prompts)
            ]
        )
    meter, turn, goes_on = machine.LoadMeter(), 0, True
    while goes_on:
        # Whoever comes first finds other things in the processor's caches: each is first in its turn.
        at = turn % len(contestants)
        goes_on = all([one.take_turn(args.turn) for one in (*contestants[at:], *contestants[:at])])
        turn += 1
    others = meter.others_frac()
    for contestant in contestants:
        error = check(contestant)
        report.log(f"{contestant.name}: {turn} turns, log-probabilities within {error:.1e} of the plain merged model")
    write(report, contestants, args, others)
    return contestants


def build(model: PreTrainedModel, args: argparse.Namespace) -> list[Contestant]:
    weights = {f"adapter{i}": random_adapter(model, rank=args.rank, seed=i) for i in range(max(args.adapters))}
    merged = merge(model, weights["adapter0"])
    nobody: tuple[str | None, ...] = (None,) * args.requests
    plain, limits = _config(args, None), _config(args, LoraLimits(max_in_batch=len(weights) + 1))
    contestants = [
        Contestant(name=ALONE, core=EngineCore(model, None, config=plain), adapters=nobody, judge=model),
        Contestant(name="merged", core=EngineCore(merged, None, config=plain), adapters=nobody, judge=merged),
        Contestant(name="0 adapters", core=EngineCore(model, None, config=limits), adapters=nobody, judge=model),
    ]

    def adapted(name: str, order: Callable[[int], str | None]) -> Contestant:
        core = EngineCore(model, None, config=limits)
        assert core.adapters is not None
        for adapter, tensors in weights.items():
            core.adapters.load(adapter, tensors, paused=False)
        return Contestant(name=name, core=core, adapters=tuple(map(order, range(args.requests))), judge=merged)

    for count in args.adapters:
        word = "adapter" if count == 1 else "adapters"
        contestants.append(adapted(f"{count} {word}", lambda i, count=count: f"adapter{i % count}"))
    most = max(args.adapters)
    mixed = [*weights, None]
    contestants.append(adapted(f"{most} adapters and none", lambda i: mixed[i % len(mixed)]))
    return contestants


def _config(args: argparse.Namespace, lora: LoraLimits | None) -> EmbeddedConfig:
    length = args.prompt + args.new
    return EmbeddedConfig(
        max_num_seqs=args.requests, max_context_len=length, kv_cache_tokens=args.requests * length, lora=lora
    )


def random_adapter(model: PreTrainedModel, *, rank: int, seed: int) -> AdapterWeights:
    """On every linear map but the head."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for site, spec in find_sites(model, None).items():
        out_features, in_features = spec.shape
        tensors[f"{PREFIX}{site}{LOW}"] = torch.randn(rank, in_features, generator=generator) / in_features**0.5
        tensors[f"{PREFIX}{site}{HIGH}"] = torch.randn(out_features, rank, generator=generator) * 0.02
    return AdapterWeights(tensors=tensors, config={"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none"})


@torch.no_grad()
def merge(model: PreTrainedModel, adapter: AdapterWeights) -> PreTrainedModel:
    """A copy; alpha is the rank, so the scale is 1."""
    merged = copy.deepcopy(model)
    for site in find_sites(model, None):
        change = adapter.tensors[f"{PREFIX}{site}{HIGH}"] @ adapter.tensors[f"{PREFIX}{site}{LOW}"]
        merged.get_submodule(site).weight.add_(change)  # type: ignore[operator, union-attr]
    return merged


@torch.no_grad()
def check(contestant: Contestant) -> float:
    """Largest difference of request 0's log-probabilities from its judge's; raises over TOLERANCE."""
    answer = contestant.done["0"]
    prompt = contestant.first_prompt
    ids = torch.tensor([[*prompt, *answer.token_ids]])
    judge = contestant.judge
    before = judge.config._attn_implementation
    judge.set_attn_implementation("sdpa")
    rows = judge(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    judge.set_attn_implementation(before)
    wanted = rows.gather(-1, torch.tensor(answer.token_ids)[:, None])[:, 0]
    error = float((wanted - torch.tensor(answer.logprobs)).abs().max())
    if not error < TOLERANCE:
        raise RuntimeError(f"{contestant.name}: a log-probability is {error:.1e} from the plain merged model's")
    return error


def write(report: Report, contestants: Sequence[Contestant], args: argparse.Namespace, others: float | None) -> None:
    base = contestants[0]
    report.facts(
        {
            **machine.describe("cpu"),
            "model": f"Qwen2 of shape {args.shape}, float32, random with seed {args.seed}",
            "adapters": f"rank {args.rank} on every linear map but the head; requests take them in turn",
            "workload": f"{args.requests} requests of {args.prompt} tokens, {args.new} new each; {args.threads} thread",
            "others": "" if others is None else f"used {others:.0%} of the processors meanwhile",
        }
    )
    rows = []
    for one in contestants:
        tokens = sum(one.num_tokens)
        ratios = [mine / theirs for mine, theirs in zip(one.cpu_s, base.cpu_s, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(
            [
                one.name,
                f"{tokens / sum(one.cpu_s):,.0f}",
                f"{tokens / sum(one.wall_s):,.0f}",
                "" if one is base else f"{middle:.3f} ({low:.3f} to {high:.3f})",
            ]
        )
    report.table(
        ["", "tokens / processor s", "tokens / s", "processor time over the model's alone (quartiles of rounds)"], rows
    )
    report.text(
        "Ratios are of two turns of the same round, so they hold on a busy machine; tokens/s by the clock do not. "
        "Each contestant's first answer was scored by a plain forward pass of the merged model."
    )
    report.save()


def _ints(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


if __name__ == "__main__":
    main()
