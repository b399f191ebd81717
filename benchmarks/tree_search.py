"""Tree search against best-of-n, with the same policy and at the same number of sampled tokens: a lock of wheels.

    python -m benchmarks.tree_search --puzzles 40

The policy is random and stays so: what is compared is the use of its samples. A turn sets one wheel, by the sum of its
answer's characters; a wheel that is right pays its share of 1. `strict`: the first wrong wheel ends it, so an answer is
worth little unless all before it were right. `lenient`: all wheels are set, right or not. Best-of-n draws whole
conversations until it has sampled at least as many tokens as the search did, and takes the best.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput

from benchmarks import machine
from benchmarks.models import SHAPES, build_byte_tokenizer, build_model
from benchmarks.report import RESULTS, Report
from skyrl_train.attention import ATTENTION_NAME
from skyrl_train.engines.base import Engine
from skyrl_train.engines.embedded import EmbeddedConfig, EmbeddedEngine
from skyrl_train.rollout.agent import Agent, with_seed
from skyrl_train.rollout.branches import num_sampled
from skyrl_train.rollout.sessions import Sessions
from skyrl_train.rollout.tree_search import TreeSearch
from skyrl_train.types import Prompt, SamplingParams, Trajectory, TrajectoryId

NUM_POSITIONS = 4
"""Of a wheel: a random answer sets it right once in so many."""
WAYS = ("strict", "lenient")


class LockEnv(BaseTextEnv):  # type: ignore[misc]
    """`extras`: `code`, the position of each wheel; `strict`. The same answers always pay the same."""

    runs_inline = True

    def __init__(self, env_config: Any = None, extras: dict[str, Any] | None = None) -> None:
        super().__init__()
        assert extras is not None
        self._code: tuple[int, ...] = tuple(extras["code"])
        self._strict = bool(extras["strict"])
        self._wheel = 0

    def step(self, action: str) -> BaseTextEnvStepOutput:
        right = sum(map(ord, action)) % NUM_POSITIONS == self._code[self._wheel]
        self._wheel += 1
        over = self._wheel == len(self._code) or (self._strict and not right)
        return BaseTextEnvStepOutput(
            observations=[] if over else [{"role": "user", "content": "click" if right else "clack"}],
            reward=right / len(self._code),
            done=over,
            metadata={},
        )


@dataclass(frozen=True, kw_only=True)
class Tried:
    """What one puzzle gave: the best reward, and the tokens that were sampled for it."""

    reward: float
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Puzzle by puzzle, in the same order."""

    search: tuple[Tried, ...]
    best_of_n: tuple[Tried, ...]

    @property
    def margin(self) -> float:
        """Mean reward of the search minus that of best-of-n."""
        pairs = zip(self.search, self.best_of_n, strict=True)
        return statistics.mean(mine.reward - other.reward for mine, other in pairs)

    @property
    def margin_error(self) -> float:
        """Standard error of the margin, over puzzles."""
        pairs = zip(self.search, self.best_of_n, strict=True)
        return statistics.stdev(mine.reward - other.reward for mine, other in pairs) / len(self.search) ** 0.5


def puzzles(count: int, num_wheels: int, *, strict: bool, seed: int) -> list[Prompt]:
    rng = random.Random(seed)
    return [
        Prompt(
            prompt_id=f"lock{i}",
            messages=({"role": "user", "content": "open"},),
            environment="lock",
            extras={"code": [rng.randrange(NUM_POSITIONS) for _ in range(num_wheels)], "strict": strict},
        )
        for i in range(count)
    ]


async def compare(
    engine: Engine,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    *,
    seed: int,
    max_sampled_tokens: int,
    **settings: Any,
) -> Compared:
    """`settings` are the search's. Sessions are on for both."""
    sessions = Sessions(engine, capacity=1 << 20, max_idle=8)
    shared: dict[str, Any] = {
        "generate": sessions.generate,
        "tokenizer": tokenizer,
        "environments": {"lock": LockEnv},
        "max_turns": 100,
        "sessions": sessions,
    }
    bounds = {"max_sampled_tokens": max_sampled_tokens, "num_expansions": 10**6}
    searcher: TreeSearch = type("Search", (TreeSearch,), {**bounds, **settings})(**shared)
    sampler = Agent(**shared)
    search, best_of_n = [], []
    for prompt in prompts:
        found = await _run(searcher, prompt, 0, sampling, seed)
        search.append(Tried(reward=found.reward, num_tokens=int(found.metrics["search_sampled_tokens"])))
    for prompt, mine in zip(prompts, search, strict=True):
        best_of_n.append(await _best_of_n(sampler, prompt, sampling, seed, mine.num_tokens))
    await sessions.close()
    return Compared(search=tuple(search), best_of_n=tuple(best_of_n))


async def _best_of_n(agent: Agent, prompt: Prompt, sampling: SamplingParams, seed: int, num_tokens: int) -> Tried:
    """Whole conversations until they have at least `num_tokens` together."""
    reward, spent, sample = 0.0, 0, 0
    while spent < num_tokens:
        sample += 1
        one = await _run(agent, prompt, sample, sampling, seed)
        spent += num_sampled(one)
        reward = max(reward, one.reward)
    return Tried(reward=reward, num_tokens=spent)


async def _run(agent: Agent, prompt: Prompt, sample: int, sampling: SamplingParams, seed: int) -> Trajectory:
    name = TrajectoryId(prompt_id=prompt.prompt_id, sample=sample)
    trajectory = await agent.run(name, prompt, agent.render(prompt), with_seed(sampling, seed, name))
    if trajectory.status == "failed":
        raise RuntimeError(f"{name}: {trajectory.error}")
    return trajectory


def main(argv: Sequence[str] | None = None) -> dict[str, Compared]:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tree_search", description=about)
    parser.add_argument("--puzzles", type=int, default=40)
    parser.add_argument("--wheels", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=100, help="sampled tokens of one puzzle, at which a search ends")
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--exploration", type=float, default=0.5)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    shape = SHAPES[args.shape]
    model = build_model(shape, attn_implementation=ATTENTION_NAME, device="cpu", dtype=torch.float32, seed=args.seed)
    tokenizer = build_byte_tokenizer(shape.vocab_size)
    # A random model ends no answer: every second token does it here, so an answer has about two.
    ends = tuple(range(0, shape.vocab_size, 2))
    sampling = SamplingParams(max_new_tokens=64, stop_token_ids=ends)
    report = Report(
        f"Tree search against best-of-n, {args.shape}", f"tree-search-{args.shape}-{machine.slug('cpu')}", args.out
    )
    report.facts(
        {
            **machine.describe("cpu"),
            "model": f"Qwen2 of shape {shape.name}, float32, random with seed {args.seed}",
            "workload": f"{args.puzzles} locks of {args.wheels} wheels with {NUM_POSITIONS} positions; a search ends "
            f"at {args.tokens} sampled tokens a puzzle, width {args.width}, exploration {args.exploration:g}",
        }
    )

    async def run() -> dict[str, Compared]:
        found = {}
        for way in WAYS:
            engine = EmbeddedEngine(
                model, tokenizer, config=EmbeddedConfig(max_context_len=1024, max_num_seqs=16, kv_cache_tokens=65536)
            )
            try:
                found[way] = await compare(
                    engine,
                    tokenizer,
                    puzzles(args.puzzles, args.wheels, strict=way == "strict", seed=args.seed),
                    sampling,
                    seed=args.seed,
                    max_sampled_tokens=args.tokens,
                    width=args.width,
                    exploration=args.exploration,
                )
            finally:
                await engine.close()
            for i, (mine, other) in enumerate(zip(found[way].search, found[way].best_of_n, strict=True)):
                report.log(f"{way}, puzzle {i}: search {mine}, best of n {other}")
        return found

    found = asyncio.run(run())
    report.table(
        ["lock", "way", "mean reward", "opened", "sampled tokens a puzzle", "ahead by (standard error)"],
        [row for way in WAYS for row in _rows(way, found[way])],
    )
    report.text(
        "Best-of-n draws one conversation after another until it has as many tokens as the search: a few more. "
        "Time is not compared: both are bound by the host at this size."
    )
    report.save()
    return found


def _rows(way: str, found: Compared) -> list[list[str]]:
    return [
        [
            way,
            name,
            f"{statistics.mean(one.reward for one in tried):.3f}",
            f"{sum(one.reward > 1 - 1e-6 for one in tried)} of {len(tried)}",
            f"{statistics.mean(one.num_tokens for one in tried):.1f}",
            f"{found.margin:+.3f} ({found.margin_error:.3f})" if name == "tree search" else "",
        ]
        for name, tried in (("tree search", found.search), ("best of n", found.best_of_n))
    ]


if __name__ == "__main__":
    main()
