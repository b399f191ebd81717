"""An engine's answers through transformers' own forward pass, without any cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from skyrl_train.types import Completion

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""In natural-log units, for the largest of all differences. bfloat16 keeps 8 bits: logits near 8 are 1/32 apart."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Over all tokens of some answers. `greedy_gap`: how far a greedy token is below the model's best one."""

    num_tokens: int
    largest: float
    mean: float
    greedy_gap: float

    def __str__(self) -> str:
        return f"{self.largest:.1e} at most, {self.mean:.1e} on average"


def load_reference(folder: Path, *, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """With transformers' own attention, in eval mode."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True)
    return model.to(device).eval()


@torch.no_grad()
def logprob_difference(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], completions: Sequence[Completion]
) -> Difference:
    """Of log-probabilities at temperature 1 or of greedy answers."""
    differences, gap = [], 0.0
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([[*prompt, *completion.token_ids]], device=model.device)
        count = len(completion.token_ids)
        logits = model(ids, use_cache=False, logits_to_keep=count + 1).logits[0, :-1]
        expected = logits.float().log_softmax(-1)
        chosen = expected.gather(1, torch.tensor(completion.token_ids, device=model.device)[:, None])[:, 0]
        found = torch.tensor(completion.logprobs, device=model.device)
        differences.append((chosen - found).abs())
        gap = max(gap, float((expected.max(-1).values - chosen).max()))
    every = torch.cat(differences)
    return Difference(num_tokens=len(every), largest=float(every.max()), mean=float(every.mean()), greedy_gap=gap)
