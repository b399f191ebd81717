"""An EAGLE-3 head that was trained for a model beside the same engine without drafts: accept length and tokens/s, CPU.

    python -m benchmarks.eagle3

The model is a small one, trained here for a few minutes on this package's own source, byte by byte; the head on answers
that the model samples. Prompts are beginnings from files that neither has seen. All contestants give the same answers,
which is checked; what differs is the time.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import skyrl_train
from benchmarks import machine
from benchmarks.measure import Timing, summarize, time_once
from benchmarks.report import RESULTS, Report
from skyrl_train.attention import ATTENTION_NAME
from skyrl_train.engines.embedded import EmbeddedConfig
from skyrl_train.engines.embedded.core import EngineCore
from skyrl_train.engines.embedded.drafts.eagle.drafter import EagleSettings
from skyrl_train.engines.embedded.drafts.eagle.fresh import fresh_eagle3
from skyrl_train.engines.embedded.drafts.eagle.head import Eagle3Head
from skyrl_train.engines.embedded.drafts.eagle.source import eagle_settings, eagle_source
from skyrl_train.training.eagle3 import AnsweredSequence, Eagle3Settings, Eagle3Trainer
from skyrl_train.training.eagle3_loss import PaddedCausal
from skyrl_train.training.optimizer import MasterAdamW, OptimizerSettings
from skyrl_train.types import Completion, GenerateRequest, SamplingParams

VOCAB_SIZE = 256
PROMPT_LEN, TRAINED_LEN, ROWS = 32, 128, 12
HELD_OUT_EACH = 5


@dataclass(frozen=True, kw_only=True)
class Contestant:
    name: str
    core: EngineCore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of the model")
    parser.add_argument("--head-steps", type=int, default=120, help="optimizer steps of the head")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--batches", default="1,4,16,64", help="requests that run at once")
    parser.add_argument("--new", type=int, default=96, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = Report("EAGLE-3 beside no drafts, CPU", f"eagle3-{machine.slug('cpu')}", args.out)
    train, held_out = source_files()
    model = trained_model(train, args, report)
    head = trained_head(model, train, args, report)
    untrained = fresh_eagle3(model, seed=0)
    report.facts(
        {
            **machine.describe("cpu"),
            "model": f"Qwen2, {args.layers} layers of {args.hidden}, bytes; {args.steps} steps on this package's code",
            "head": f"{args.head_steps} steps on the model's own answers, sampled at temperature 1",
            "threads": str(args.threads),
        }
    )
    rows = []
    for temperature in (0.0, 1.0):
        for batch in map(int, args.batches.split(",")):
            rows += compared(model, head, untrained, held_out, batch, temperature, args, report)
    report.table(
        ("sampling", "batch", "drafts", "accept length", "tokens/s", "by the clock", "by processor", "others"), rows
    )
    report.text(
        "Accept length: tokens that a verification brought, 1 without a right guess. Tokens/s: medians of "
        f"{args.repeats} runs in turns, prompts of {PROMPT_LEN} bytes included; the ratios are medians over "
        "neighbouring runs, by the clock and in processor seconds, which say more where others use the machine. A "
        "chain has 3 guesses; the tree 3 levels of 3 branches, of which 6 guesses are verified."
    )
    report.save()


def compared(
    model: PreTrainedModel,
    head: Eagle3Head,
    untrained: Eagle3Head,
    texts: Sequence[bytes],
    batch: int,
    temperature: float,
    args: argparse.Namespace,
    report: Report,
) -> list[list[str]]:
    """A row for each contestant."""
    chain, tree = eagle_settings(3, 1, 4), eagle_settings(3, 3, 7)

    def core(given: Eagle3Head | None, settings: EagleSettings = chain) -> EngineCore:
        drafts = None if given is None else eagle_source(model, given, settings, packs_weights=True)
        config = EmbeddedConfig(max_num_seqs=batch, kv_cache_tokens=batch * 256 + 64, max_context_len=256)
        return EngineCore(model, None, config=config, drafts=drafts)

    contestants = [
        Contestant(name="none", core=core(None)),
        Contestant(name="chain", core=core(head, chain)),
        Contestant(name="tree", core=core(head, tree)),
        Contestant(name="chain, untrained head", core=core(untrained, chain)),
    ]
    prompts = beginnings(texts, batch, PROMPT_LEN, seed=batch)
    answers = [answered(one.core, prompts, args.new, temperature) for one in contestants]  # warm, and the same
    different = [
        one.name
        for one, found in zip(contestants, answers, strict=True)
        if [item.token_ids for item in found] != [item.token_ids for item in answers[0]]
    ]
    report.log(f"temperature {temperature}, batch {batch}: {', '.join(different) or 'nobody'} answers differently")
    timings: dict[str, list[Timing]] = {one.name: [] for one in contestants}
    for _ in range(args.repeats):
        for one in contestants:
            one.core.flush_cache()
            timings[one.name].append(time_once(partial(answered, one.core, prompts, args.new, temperature), "cpu"))
            report.log(f"  {one.name}: {timings[one.name][-1]}")
    rows = []
    for one in contestants:
        figures = summarize(timings[one.name])
        pairs = list(zip(timings["none"], timings[one.name], strict=True))
        by_clock = statistics.median(none.wall_s / own.wall_s for none, own in pairs)
        by_processor = statistics.median(none.cpu_s / own.cpu_s for none, own in pairs)
        accept_len = one.core.stats().accept_len
        rows.append(
            [
                "greedy" if temperature == 0 else f"temperature {temperature:g}",
                str(batch),
                one.name,
                "" if accept_len is None else f"{accept_len:.2f}",
                f"{batch * args.new / figures.median_s:,.0f}",
                f"{by_clock:.2f}",
                f"{by_processor:.2f}",
                figures.others,
            ]
        )
    return rows


def answered(core: EngineCore, prompts: Sequence[tuple[int, ...]], new: int, temperature: float) -> list[Completion]:
    for i, prompt in enumerate(prompts):
        sampling = SamplingParams(max_new_tokens=new, temperature=temperature, seed=i, ignore_eos=True)
        core.add(GenerateRequest(request_id=str(i), prompt_token_ids=prompt, sampling=sampling))
    done: dict[str, Completion] = {}
    while core.has_work:
        done |= {item.completion.request_id: item.completion for item in core.step()}
    return [done[str(i)] for i in range(len(prompts))]


def source_files() -> tuple[list[bytes], list[bytes]]:
    """This package's files: those to train on, and the others."""
    paths = sorted(Path(skyrl_train.__file__).parent.rglob("*.py"))
    texts = [path.read_bytes() for path in paths]
    texts = [bytes(text) for text in texts if len(text) > 4 * TRAINED_LEN]
    return [t for i, t in enumerate(texts) if i % HELD_OUT_EACH], texts[::HELD_OUT_EACH]


def beginnings(texts: Sequence[bytes], count: int, length: int, seed: int) -> list[tuple[int, ...]]:
    draw = random.Random(seed)
    chosen = [draw.choice(texts) for _ in range(count)]
    starts = [draw.randrange(len(text) - length) for text in chosen]
    return [tuple(text[start : start + length]) for text, start in zip(chosen, starts, strict=True)]


def trained_model(texts: Sequence[bytes], args: argparse.Namespace, report: Report) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(args.hidden // 128, 1),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    config._attn_implementation = ATTENTION_NAME
    model = Qwen2ForCausalLM(config)
    settings = OptimizerSettings(
        lr=2e-3, scheduler="cosine", num_warmup_steps=min(10, args.steps // 2), num_steps=args.steps + 1
    )
    optimizer = MasterAdamW(list(model.parameters()), settings)
    for step in range(args.steps):
        ids = torch.tensor(beginnings(texts, ROWS, TRAINED_LEN, seed=1000 + step))
        positions = torch.arange(TRAINED_LEN).repeat(ROWS)[None]
        logits = model(
            input_ids=ids.view(1, -1),
            position_ids=positions,
            use_cache=False,
            attention_context=PaddedCausal(ROWS, TRAINED_LEN),
        ).logits.view(ROWS, TRAINED_LEN, -1)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 25 == 0 or step == args.steps - 1:
            report.log(f"model, step {step}: {loss.item():.2f} nats a byte")
    model.eval().requires_grad_(False)  # type: ignore[no-untyped-call]
    return model


def trained_head(
    model: PreTrainedModel, texts: Sequence[bytes], args: argparse.Namespace, report: Report
) -> Eagle3Head:
    head = fresh_eagle3(model, seed=0)
    settings = OptimizerSettings(
        lr=2e-3, scheduler="cosine", num_warmup_steps=min(5, args.head_steps // 2), num_steps=args.head_steps + 1
    )
    trainer = Eagle3Trainer(model, head, Eagle3Settings(optimizer=settings, num_unrolled=3))
    config = EmbeddedConfig(max_num_seqs=ROWS, kv_cache_tokens=ROWS * 256, max_context_len=256)
    core = EngineCore(model, None, config=config)
    for step in range(args.head_steps):
        prompts = beginnings(texts, ROWS, PROMPT_LEN, seed=5000 + step)
        found = answered(core, prompts, args.new, 1.0)
        metrics = trainer.step(
            [
                AnsweredSequence(
                    token_ids=torch.tensor((*prompt, *item.token_ids)),
                    is_answer=torch.arange(len(prompt) + args.new) >= len(prompt),
                )
                for prompt, item in zip(prompts, found, strict=True)
            ]
        )
        if step % 20 == 0 or step == args.head_steps - 1:
            shown = {name: round(value, 3) for name, value in metrics.items()}
            report.log(f"head, step {step}: {shown}")
    return head


if __name__ == "__main__":
    main()
