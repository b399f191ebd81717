"""Speculation in the embedded engine on a CPU: tokens/s with guesses and without, where they win and where they lose.

    python -m benchmarks.speculation

A tiny model is trained for a minute or two on two kinds of text, told apart by the first word. `repetitive` is like
code: lines of a small bank follow each other in any order, and whoever knows a line's beginning knows its end. `plain`:
every word goes on with one of many. So sampled answers really repeat themselves, or don't. A smaller model is trained
on the same texts to draft for it. `auto` is n-grams, left out where they lose.

Speed is tokens a processor second: one thread does all the work and waits for nobody, so on a machine that does nothing
else it is tokens a second, and others' work does not count as ours. (`auto` itself decides by the clock.)

All ways serve the same model, take turns round by round, and get the same requests, new ones in each round. The first
round warms up (auto measures there as it does ever after) and counts for nothing. A ratio is the median over rounds of
what the same round took without guesses.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from benchmarks import machine
from benchmarks.machine import LoadMeter
from benchmarks.models import SHAPES, ModelShape, build_model
from benchmarks.report import RESULTS, Report
from skyrl_train.attention import ATTENTION_NAME
from skyrl_train.engines.embedded import EmbeddedConfig
from skyrl_train.engines.embedded.core import EngineCore
from skyrl_train.engines.embedded.drafts.base import DraftSource
from skyrl_train.engines.embedded.drafts.build import ngram_source, standalone_source
from skyrl_train.engines.embedded.drafts.ngram import NgramSettings
from skyrl_train.types import GenerateRequest, SamplingParams

TEXTS = ("repetitive", "plain")
FIRST_WORD = {"repetitive": 1, "plain": 2}
NUM_WORDS = 512
NUM_LINES = 6
LINE_LEN = (8, 24)
NUM_SUCCESSORS = 24
WINDOW = 160
"""Words that are trained on at once."""
SERVED_SHAPE = replace(SHAPES["tiny"], name="tiny, 512 words", vocab_size=NUM_WORDS)
DRAFT_SHAPE = ModelShape(
    name="draft",
    hidden_size=64,
    intermediate_size=256,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    vocab_size=NUM_WORDS,
    tied=True,
)


class Language:
    """Both kinds of text, drawn from a bank that is fixed by a seed. Words are [3, NUM_WORDS)."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self._lines = [self._line(draw) for _ in range(NUM_LINES)]
        self._successors = {word: draw.sample(range(3, NUM_WORDS), NUM_SUCCESSORS) for word in range(NUM_WORDS)}

    def _line(self, draw: random.Random) -> list[int]:
        return [draw.randrange(3, NUM_WORDS) for _ in range(draw.randint(*LINE_LEN))]

    def text(self, kind: str, length: int, draw: random.Random) -> list[int]:
        words = [FIRST_WORD[kind]]
        while len(words) < length:
            words += draw.choice(self._lines) if kind == "repetitive" else [draw.choice(self._successors[words[-1]])]
        return words[:length]


def train(model: PreTrainedModel, language: Language, *, num_steps: int, seed: int) -> float:
    """In place, on both kinds of text; the mean loss of the last steps."""
    draw = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=num_steps, pct_start=0.1)
    losses = []
    model.train()
    for _ in range(num_steps):
        ids = torch.tensor([language.text(TEXTS[i % 2], WINDOW, draw) for i in range(8)])
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    model.eval()
    return statistics.mean(losses[-10:])


def trained(
    shape: ModelShape, language: Language, *, num_steps: int, report: Report, keep: Path | None
) -> PreTrainedModel:
    """Trained with eager attention, served with the engine's. `keep`: a folder of weights from an earlier run."""
    model = build_model(shape, attn_implementation=ATTENTION_NAME, device="cpu", dtype=torch.float32)
    kept = None if keep is None else keep / f"{shape.name.partition(',')[0]}-{num_steps}.pt"
    if kept is not None and kept.is_file():
        model.load_state_dict(torch.load(kept, weights_only=True))
        report.log(f"{shape.name}: {num_steps} steps of training, by an earlier run")
        return model
    learner = build_model(shape, attn_implementation="eager", device="cpu", dtype=torch.float32)
    loss = train(learner, language, num_steps=num_steps, seed=1)
    report.log(f"{shape.name}: {num_steps} steps of training, loss {loss:.2f}")
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(learner.state_dict(), kept)
    model.load_state_dict(learner.state_dict())
    return model


@dataclass(frozen=True, kw_only=True)
class Run:
    """One round of one way. `accept_len` None: nothing was verified."""

    tokens_per_s: float  # processor seconds
    accept_len: float | None
    answers: list[tuple[int, ...]]


def requests_of(
    kind: str, batch: int, language: Language, *, prompt_len: int, num_new: int, seed: int
) -> list[GenerateRequest]:
    draw = random.Random(f"{kind} {batch} {seed}")
    sampling = SamplingParams(max_new_tokens=num_new, temperature=1.0, ignore_eos=True)
    return [
        GenerateRequest(
            request_id=f"{seed}-{i}",
            prompt_token_ids=tuple(language.text(kind, prompt_len, draw)),
            sampling=replace(sampling, seed=draw.randrange(1 << 30)),
        )
        for i in range(batch)
    ]


def serve(core: EngineCore, requests: Sequence[GenerateRequest]) -> Run:
    before = core.stats()
    began = time.process_time()
    for request in requests:
        core.add(request)
    done = {}
    while core.has_work:
        for finished in core.step():
            done[finished.completion.request_id] = finished.completion.token_ids
    seconds = time.process_time() - began
    after = core.stats()
    verified = after.num_verifications_total - before.num_verifications_total
    accepted = after.num_accepted_tokens_total - before.num_accepted_tokens_total
    return Run(
        tokens_per_s=sum(map(len, done.values())) / seconds,
        accept_len=1 + accepted / verified if verified else None,
        answers=[done[request.request_id] for request in requests],
    )


def main(argv: Sequence[str] | None = None) -> Path:
    args = _arguments(argv)
    torch.set_num_threads(1)
    report = Report(
        f"Speculation in the embedded engine on a CPU: {SERVED_SHAPE.name}",
        f"{args.name}-{machine.slug('cpu')}",
        args.out,
    )
    meter = LoadMeter()
    language = Language(seed=0)
    model = trained(SERVED_SHAPE, language, num_steps=args.train_steps, report=report, keep=args.keep)
    draft = trained(DRAFT_SHAPE, language, num_steps=2 * args.train_steps, report=report, keep=args.keep)
    ngram = ngram_source(NgramSettings())
    ways: dict[str, Callable[[], DraftSource | None]] = {
        "off": lambda: None,
        "ngram": lambda: ngram,
        "standalone": lambda: standalone_source(draft, model, max_guesses=4, packs_weights=True),
        "auto": lambda: replace(ngram, measures=True),
    }
    config = EmbeddedConfig(
        max_num_seqs=max(args.batches),
        max_num_batched_tokens=2048,
        max_context_len=args.prompt + args.new,
        kv_cache_tokens=2 * max(args.batches) * (args.prompt + args.new),
    )
    rows, worst, best, num_different = [], 9.0, 0.0, 0
    for kind in TEXTS:
        for batch in args.batches:
            cores = {way: EngineCore(model, None, config=config, drafts=make()) for way, make in ways.items()}
            rounds: list[dict[str, Run]] = []
            for number in range(args.rounds + 1):
                requests = requests_of(kind, batch, language, prompt_len=args.prompt, num_new=args.new, seed=number)
                turn = number % len(ways)
                order = [*list(ways)[turn:], *list(ways)[:turn]]
                rounds.append({way: serve(cores[way], requests) for way in order})
                for run in rounds[-1].values():
                    num_different += sum(a != b for a, b in zip(run.answers, rounds[-1]["off"].answers, strict=True))
            counted = rounds[1:]
            row = [kind, str(batch)]
            for way in ways:
                speed = statistics.median(run[way].tokens_per_s for run in counted)
                ratio = statistics.median(run[way].tokens_per_s / run["off"].tokens_per_s for run in counted)
                lengths = [found for run in counted if (found := run[way].accept_len) is not None]
                accept = f", {statistics.mean(lengths):.2f}" if lengths else ""
                row.append(f"{speed:.0f}" if way == "off" else f"{speed:.0f} ({ratio:.2f} x{accept})")
                worst = min(worst, ratio) if way == "auto" else worst
                if way == "auto" and kind == "repetitive" and batch == 1:
                    best = ratio
            report.log(" | ".join(row))
            rows.append(row)
    report.facts({**machine.describe("cpu"), "threads": "1", **_load(meter)})
    report.text(
        f"Sampled at temperature 1 with seeds, {args.prompt} prompt tokens and {args.new} new ones a request, "
        f"{args.rounds} rounds. In brackets: the ratio to `off` in the same round, and tokens a verification."
    )
    report.table(("text", "requests at once", *(f"{way}, tokens/processor s" for way in ways)), rows)
    report.text(
        f"`auto` at its worst: {worst:.2f} x `off` (goal: 0.97). On repetitive text at one request: {best:.2f} x "
        f"(goal: 2). Answers that differ from those without guesses: {num_different} of "
        f"{len(rows) and sum(args.batches) * len(TEXTS) * (args.rounds + 1) * (len(ways) - 1)}."
    )
    return report.save()


def _load(meter: LoadMeter) -> dict[str, str]:
    others = meter.others_frac(0.0)
    return {} if others is None else {"others used of the processors": f"{others:.0%}"}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speculation", description=__doc__)
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1, 4, 16, 64])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--train-steps", type=int, default=100)
    parser.add_argument("--keep", type=Path, default=None, help="a folder for the trained weights, to train once")
    parser.add_argument("--name", default="speculation-tiny")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
