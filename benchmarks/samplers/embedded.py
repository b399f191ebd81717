"""Our embedded engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from transformers import PreTrainedModel

from benchmarks.workload import Output, Request
from skyrl_train.engines.embedded.config import EmbeddedConfig
from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.types import GenerateRequest, LocalWeights, SamplingParams, WeightUpdate
from skyrl_train.weight_sync.sync import sync_weights


class EmbeddedSampler:
    """`model` runs with the attention of `skyrl_train.attention`. No request has a prefix in common with another."""

    def __init__(self, model: PreTrainedModel, requests: Sequence[Request], *, num_threads: int) -> None:
        self.name = f"skyrl_train embedded, {num_threads} threads"
        self.num_threads = num_threads
        self._model = model
        self._config = EmbeddedConfig(
            max_num_seqs=len(requests),
            # A GPU wants long prompt chunks; a CPU is busy with a few hundred rows.
            max_num_batched_tokens=max(2048 if model.device.type == "cpu" else 16384, len(requests)),
            kv_cache_tokens=sum(len(r.prompt_token_ids) + r.max_new_tokens for r in requests) + 64 * len(requests),
            max_context_len=max(len(r.prompt_token_ids) + r.max_new_tokens for r in requests),
        )
        self._runner = asyncio.Runner()
        self._engine = EmbeddedEngine(model, None, config=self._config)

    def prepare(self, *, greedy: bool) -> None:
        self._runner.run(self._forget_prefixes())

    def run(self, requests: Sequence[Request], *, greedy: bool) -> list[Output]:
        return self._runner.run(self._run(requests, greedy))

    def close(self) -> None:
        self._runner.run(self._engine.close())
        self._runner.close()

    async def _forget_prefixes(self) -> None:
        """The same prompts come again in the next repetition; they must not be served from the cache."""
        version = (await self._engine.stats()).policy_version
        await sync_weights(self._engine, WeightUpdate(version=version, source=LocalWeights()))

    async def _run(self, requests: Sequence[Request], greedy: bool) -> list[Output]:
        completions = await asyncio.gather(
            *(
                self._engine.generate(
                    GenerateRequest(
                        request_id=str(i),
                        prompt_token_ids=request.prompt_token_ids,
                        sampling=SamplingParams(
                            max_new_tokens=request.max_new_tokens,
                            temperature=0.0 if greedy else 1.0,
                            ignore_eos=True,
                        ),
                    )
                )
                for i, request in enumerate(requests)
            )
        )
        # Two random prompts may begin with the same token; whole prompts would be those of the run before.
        cached = sum(c.num_cached_tokens for c in completions)
        assert cached <= 2 * len(requests), f"{cached} prompt tokens came from the cache of an earlier run"
        return [Output(token_ids=c.token_ids, logprobs=c.logprobs) for c in completions]
