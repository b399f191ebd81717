"""No speed without right answers: every engine's tokens go once through the plain model, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from benchmarks.workload import Output, Request

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""In natural-log units. bfloat16 keeps 8 bits: logits near 4 are 1/64 apart, and kernels differ by several steps."""


class WrongOutput(Exception):
    """An engine's tokens or log-probabilities don't agree with the model's."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of one engine's outputs with a plain forward pass over prompt and completion, without any cache.

    `max_logprob_diff` over all tokens. `max_greedy_gap`: how far below the best token's log-probability the chosen
    one's is; `num_argmax` counts those that are the best one. Both None for sampled outputs.
    """

    num_tokens: int
    max_logprob_diff: float
    max_greedy_gap: float | None
    num_argmax: int | None

    def __str__(self) -> str:
        text = f"{self.num_tokens} tokens, log-probabilities within {self.max_logprob_diff:.1e}"
        if self.max_greedy_gap is None:
            return text
        return f"{text}, {self.num_argmax} are the model's best token, none is further than {self.max_greedy_gap:.1e}"


@torch.no_grad()
def check_outputs(
    model: PreTrainedModel, requests: Sequence[Request], outputs: Sequence[Output], *, greedy: bool
) -> Agreement:
    """`model` has one of transformers' own attentions. Raises WrongOutput."""
    worst, gap, num_argmax, num_tokens = 0.0, 0.0, 0, 0
    for request, output in zip(requests, outputs, strict=True):
        if len(output.token_ids) != request.max_new_tokens or len(output.logprobs) != request.max_new_tokens:
            raise WrongOutput(f"wanted {request.max_new_tokens} tokens, found {len(output.token_ids)}")
        ids = torch.tensor([request.prompt_token_ids + output.token_ids], device=model.device)
        logits = model(ids, use_cache=False, logits_to_keep=request.max_new_tokens + 1).logits[0, :-1]
        expected = logits.float().log_softmax(-1)
        chosen = expected.gather(1, torch.tensor(output.token_ids, device=model.device)[:, None])[:, 0]
        found = torch.tensor(output.logprobs, device=model.device)
        worst = max(worst, float((chosen - found).abs().max()))
        below = expected.max(-1).values - chosen
        gap = max(gap, float(below.max()))
        num_argmax += int((below == 0).sum())
        num_tokens += request.max_new_tokens
    tolerance = TOLERANCE[model.dtype]
    if worst > tolerance:
        raise WrongOutput(f"a log-probability differs by {worst:.3g} from the model's, more than {tolerance}")
    if greedy and gap > tolerance:
        raise WrongOutput(f"a greedy token's log-probability is {gap:.3g} below the best one's, more than {tolerance}")
    return Agreement(
        num_tokens=num_tokens,
        max_logprob_diff=worst,
        max_greedy_gap=gap if greedy else None,
        num_argmax=num_argmax if greedy else None,
    )
