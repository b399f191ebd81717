"""transformers' `generate_batch`: continuous batching over a paged cache.

`generate_batch` itself takes one `max_new_tokens` for all; its manager, which it wraps, takes one a request, and that
is what runs here: so each request ends where it should. Set-up, allocation and warm-up are not timed. Treated well:
the longest requests are handed in first, so that no straggler is left; block sharing, which can't help random
prompts, is off.

On a CPU attention is one masked product over the keys of all running requests, whoever they belong to: with R
requests of context C it computes R * R * C scores where R * C are wanted. `max_requests` trades that against the
number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields

from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager

from benchmarks.models import PAD_ID
from benchmarks.workload import Output, Request

MAX_BATCH_TOKENS = 2048
PAGE_SIZE_KEY = "page_size" if "page_size" in {f.name for f in fields(ContinuousBatchingConfig)} else "block_size"
"""Some releases of transformers call it block_size."""
WAIT_S = 600.0
NO_END_TOKEN = -1


class GenerateBatchSampler:
    """One manager for sampling and one for greedy, each made when first asked for and kept until `close`."""

    def __init__(
        self,
        model: PreTrainedModel,
        requests: Sequence[Request],
        *,
        max_requests: int,
        page_size: int,
        num_threads: int,
    ) -> None:
        """The cache holds `max_requests` of the longest of `requests`."""
        self.name = f"generate_batch, {max_requests} requests at once, pages of {page_size}, {num_threads} threads"
        self.num_threads = num_threads
        self._model = model
        self._max_requests = min(max_requests, len(requests))
        self._page_size = page_size
        longest = max(len(request.prompt_token_ids) + request.max_new_tokens for request in requests)
        self._num_blocks = self._max_requests * (-(-longest // page_size) + 1)
        self._max_new_tokens = max(request.max_new_tokens for request in requests)
        self._open: dict[bool, tuple[ExitStack, ContinuousBatchingManager]] = {}
        self._count = 0

    def prepare(self, *, greedy: bool) -> None:
        self._manager(greedy)

    def run(self, requests: Sequence[Request], *, greedy: bool) -> list[Output]:
        manager = self._manager(greedy)
        self._count += 1
        ids = {f"{self._count}/{i}": i for i in range(len(requests))}
        for request_id, i in sorted(ids.items(), key=lambda item: -requests[item[1]].max_new_tokens):
            request = requests[i]
            manager.add_request(
                list(request.prompt_token_ids), request_id=request_id, max_new_tokens=request.max_new_tokens
            )
        outputs: dict[int, Output] = {}
        while len(outputs) < len(requests):
            result = manager.get_result(timeout=WAIT_S)
            if result is None:
                raise RuntimeError(f"{self.name}: nothing came in {WAIT_S} s or its thread died")
            if result.error:
                raise RuntimeError(f"{self.name}: {result.error}")
            if result.is_finished():
                outputs[ids[result.request_id]] = Output(
                    token_ids=tuple(result.generated_tokens), logprobs=tuple(result.logprobs)
                )
        return [outputs[i] for i in range(len(requests))]

    def close(self) -> None:
        for stack, _ in self._open.values():
            stack.close()
        self._open.clear()

    def _manager(self, greedy: bool) -> ContinuousBatchingManager:
        if greedy not in self._open:
            self.close()  # two managers would hold two caches
            stack = ExitStack()
            manager = stack.enter_context(
                self._model.continuous_batching_context_manager(
                    generation_config=GenerationConfig(
                        max_new_tokens=self._max_new_tokens,
                        do_sample=not greedy,
                        temperature=None if greedy else 1.0,
                        top_k=None if greedy else 0,
                        top_p=None if greedy else 1.0,
                        pad_token_id=PAD_ID,
                        eos_token_id=NO_END_TOKEN,
                    ),
                    continuous_batching_config=ContinuousBatchingConfig(
                        **{PAGE_SIZE_KEY: self._page_size},
                        num_blocks=self._num_blocks,
                        max_batch_tokens=MAX_BATCH_TOKENS,
                        max_requests_per_batch=self._max_requests,
                        allow_block_sharing=False,
                        return_logprobs=True,
                    ),
                )
            )
            self._open[greedy] = (stack, manager)
        return self._open[greedy][1]
