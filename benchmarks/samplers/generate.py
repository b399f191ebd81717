"""transformers' `generate`: padded batches, each run until its longest request is done.

Treated well: requests are sorted by how much they want (which a real rollout can't know), so a batch wastes little;
log-probabilities are taken as the tokens are made instead of keeping the logits of all steps (`output_scores`), which
at 152k words would be tens of GB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from transformers import CompileConfig, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from benchmarks.models import PAD_ID
from benchmarks.workload import Output, Request

CacheName = Literal["dynamic", "static", "compiled"]


class GenerateSampler:
    """`cache` "static" preallocates keys and values; on a GPU transformers then compiles the decode step.

    "compiled" is static and compiles on a CPU as well.
    """

    def __init__(self, model: PreTrainedModel, *, batch_size: int, cache: CacheName, num_threads: int) -> None:
        self.name = f"generate, {cache} cache, batches of {batch_size}, {num_threads} threads"
        self.num_threads = num_threads
        self._model = model
        self._batch_size = batch_size
        self._cache = cache
        self._compile = CompileConfig(mode="default", fullgraph=False) if cache == "compiled" else None
        if self._compile is not None:
            self._compile._compile_all_devices = True

    def prepare(self, *, greedy: bool) -> None:
        pass

    def run(self, requests: Sequence[Request], *, greedy: bool) -> list[Output]:
        order = sorted(range(len(requests)), key=lambda i: requests[i].max_new_tokens)
        outputs: dict[int, Output] = {}
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            outputs |= zip(chosen, self._run_batch([requests[i] for i in chosen], greedy=greedy), strict=True)
        return [outputs[i] for i in range(len(requests))]

    def close(self) -> None:
        pass

    def _run_batch(self, requests: Sequence[Request], *, greedy: bool) -> list[Output]:
        prompt_len = max(len(request.prompt_token_ids) for request in requests)
        padding = [prompt_len - len(request.prompt_token_ids) for request in requests]
        rows = [[PAD_ID] * n + list(r.prompt_token_ids) for n, r in zip(padding, requests, strict=True)]
        mask = [[0] * n + [1] * (prompt_len - n) for n in padding]
        device = self._model.device
        recorder = LogprobRecorder()
        tokens = self._model.generate(
            torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            logits_processor=LogitsProcessorList([recorder]),
            generation_config=GenerationConfig(
                max_new_tokens=max(request.max_new_tokens for request in requests),
                do_sample=not greedy,
                temperature=None if greedy else 1.0,
                top_k=None if greedy else 0,
                top_p=None if greedy else 1.0,
                pad_token_id=PAD_ID,
                eos_token_id=None,
                cache_implementation=None if self._cache == "dynamic" else "static",
                compile_config=self._compile,
            ),
        )[:, prompt_len:]
        logprobs = recorder.finish(tokens)
        return [
            Output(token_ids=tuple(t[: r.max_new_tokens]), logprobs=tuple(p[: r.max_new_tokens]))
            for t, p, r in zip(tokens.tolist(), logprobs.tolist(), requests, strict=True)
        ]


class LogprobRecorder(LogitsProcessor):
    """Keeps of each step's scores [B, V] only what the token that is sampled next needs.

    The token of step t is known at step t + 1, so the scores of one step are held that long.
    """

    def __init__(self) -> None:
        self._held: torch.Tensor | None = None
        self._logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._held is not None:
            self._logprobs.append(_logprobs_of(self._held, input_ids[:, -1:]))
        self._held = scores.clone()  # a compiled step writes the next scores into the same memory
        return scores

    def finish(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, L] log-probabilities of all tokens [B, L]."""
        assert self._held is not None and len(self._logprobs) == tokens.shape[1] - 1
        self._logprobs.append(_logprobs_of(self._held, tokens[:, -1:]))
        return torch.cat(self._logprobs, dim=1)


def _logprobs_of(scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return scores.gather(1, tokens) - scores.logsumexp(1, keepdim=True)
