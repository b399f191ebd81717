"""Engines over one model that differ in their kernels, and the work that they are given."""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks import machine
from benchmarks.models import SHAPES, build_model
from benchmarks.workload import Request, draw_tokens
from skyrl_train.attention import ATTENTION_NAME
from skyrl_train.engines.embedded.config import EmbeddedConfig
from skyrl_train.engines.embedded.core import EngineCore
from skyrl_train.types import GenerateRequest, SamplingParams

if os.environ.get("TRITON_INTERPRET") == "1":  # a rehearsal
    import tests.engines.embedded.interpreted  # noqa: F401

KERNELS = ("plain", "fused")


@dataclass(frozen=True, kw_only=True)
class Work:
    """`count` requests of `prompt` and `new` tokens, `group` on one prompt: written 256x128x256 or 32*8x128x256."""

    count: int
    prompt: int
    new: int
    group: int = 1

    @classmethod
    def parse(cls, text: str) -> Work:
        count, prompt, new = text.split("x")
        prompts, _, group = count.partition("*")
        size = int(group or 1)
        return cls(count=int(prompts) * size, prompt=int(prompt), new=int(new), group=size)

    def __str__(self) -> str:
        who = f"{self.count // self.group} prompts x {self.group}" if self.group > 1 else f"{self.count}"
        return f"{who} x ({self.prompt}, {self.new})"

    def requests(self, vocab_size: int, seed: int = 0) -> tuple[Request, ...]:
        rng = random.Random(seed)
        prompts = [draw_tokens(rng, self.prompt, vocab_size) for _ in range(self.count // self.group)]
        return tuple(
            Request(prompt_token_ids=prompts[i // self.group], max_new_tokens=self.new) for i in range(self.count)
        )


def parser_of(prog: str, doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=doc.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--work", type=Path, default=Path("."), help="a folder for files on the way")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=500.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def works(text: str) -> tuple[Work, ...]:
    return tuple(Work.parse(part) for part in text.split(","))


def dtype_of(device: str) -> torch.dtype:
    """The interpreter rounds to bfloat16 in a way of its own: float32 for rehearsals."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def model_for(args: argparse.Namespace) -> PreTrainedModel:
    return build_model(
        SHAPES[args.shape],
        attn_implementation=ATTENTION_NAME,
        device=args.device,
        dtype=dtype_of(args.device),
        seed=args.seed,
    ).requires_grad_(False)


def core_for(model: PreTrainedModel, work: Work, kernels: str, **options: Any) -> EngineCore:
    """An engine with room for the work. On a CPU "plain" is the CPU's engine and "fused" runs interpreted."""
    device = model.device.type
    size = work.prompt + work.new
    config = EmbeddedConfig(
        max_num_seqs=work.count,
        max_num_batched_tokens=max(16384 if device == "cuda" else 256, work.count),
        kv_cache_tokens=work.count * (size + 64) + size,
        max_context_len=size + 16,
        cuda_kernels=kernels,  # type: ignore[arg-type]
        **options,
    )
    return EngineCore(model, None, config=config)


def add_all(core: EngineCore, requests: Sequence[Request], *, new: int | None = None, **sampling: Any) -> None:
    for i, item in enumerate(requests):
        params = SamplingParams(max_new_tokens=new or item.max_new_tokens, ignore_eos=True, seed=i, **sampling)
        core.add(GenerateRequest(request_id=f"{i}", prompt_token_ids=item.prompt_token_ids, sampling=params))


def run_to_the_end(core: EngineCore) -> dict[str, Any]:
    """Completions by request id."""
    done = {}
    while core.has_work:
        for item in core.step():
            done[item.completion.request_id] = item.completion
    return done


class Rows:
    """Figures as JSON beside the tables, on disk after each one: a run that is stopped has them."""

    def __init__(self, path: Path, device: str) -> None:
        self._path = path
        self._rows: list[dict[str, Any]] = []
        self._about = machine.describe(device)

    def add(self, **figures: Any) -> None:
        self._rows.append(figures)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps({"machine": self._about, "rows": self._rows}, indent=1))


class Clock:
    """What is left of a budget."""

    def __init__(self, budget_s: float) -> None:
        self._end = time.monotonic() + budget_s

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()
