"""A real server (vLLM) as a run of the main job starts and asks it: our client, one HTTP request a completion."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.engines.asking import GREEDY, SAMPLED, ask
from benchmarks.engines.harness import Setup, build, interpreters
from benchmarks.engines.processes import cpu_seconds
from benchmarks.machine import num_cores
from benchmarks.models import SHAPES, build_byte_tokenizer
from benchmarks.workload import Output, Request
from skyrl_train.config import load_config
from skyrl_train.config.machine import engine_release
from skyrl_train.engines.base import Engine

CONTEXT_STEP = 64
"""Its context is rounded up to this."""


class ServerSampler:
    """Starts the server on a folder of `model`'s weights. `child_seconds` are the processor seconds of its processes.

    The server computes on `num_threads`; its HTTP side and its scheduling run in processes of their own beside those.
    """

    def __init__(
        self, model: PreTrainedModel, requests: Sequence[Request], *, shape: str, backend: str, num_threads: int
    ) -> None:
        longest = max(len(r.prompt_token_ids) + r.max_new_tokens for r in requests)
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        dtype = str(model.dtype).removeprefix("torch.")
        model.save_pretrained(folder / "model")
        build_byte_tokenizer(model.config.vocab_size).save_pretrained(folder / "model")
        setup = Setup(
            shape=SHAPES[shape],
            device=model.device.type,
            dtype=model.dtype,
            seed=0,
            folder=folder / "model",
            work=folder,
            pythons=interpreters(),
            max_model_len=-(-longest // CONTEXT_STEP) * CONTEXT_STEP,
            max_num_seqs=len(requests),
            more=(
                f"generator.engine_environment={{OMP_NUM_THREADS: '{num_threads}'}}",
                "generator.max_num_batched_tokens=2048",
            ),
        )
        config = load_config(setup.overrides(backend)).config
        self.name = f"{backend} {engine_release(config)} server, {dtype}, {num_threads} threads of {num_cores()} cores"
        self.num_threads = torch.get_num_threads()
        self._runner = asyncio.Runner()
        self._engine: Engine | None = None
        try:
            self._engine = self._runner.run(build(config))
            self._runner.run(self._engine.start())
        except BaseException:
            self.close()
            raise

    @property
    def engine(self) -> Engine:
        assert self._engine is not None
        return self._engine

    def prepare(self, *, greedy: bool) -> None:
        self._runner.run(self.engine.flush_cache())

    def run(self, requests: Sequence[Request], *, greedy: bool) -> list[Output]:
        run = self._runner.run(ask(self.engine, requests, temperature=GREEDY if greedy else SAMPLED))
        assert run.cached <= 2 * len(requests), f"{run.cached} prompt tokens came from the cache of an earlier run"
        return [Output(token_ids=c.token_ids, logprobs=c.logprobs) for c in run.completions]

    def child_seconds(self) -> float:
        return sum(cpu_seconds().values())

    def close(self) -> None:
        if self._engine is not None:
            self._runner.run(self._engine.close())
        self._runner.close()
        self._folder.cleanup()
