"""Random adapters, and the judge: peft's own merge of each into transformers' plain model."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from skyrl_train.attention import ATTENTION_NAME
from skyrl_train.engines.embedded.adapters.settings import LoraLimits
from skyrl_train.engines.embedded.core import EngineCore
from skyrl_train.types import AdapterWeights, Completion, GenerateRequest
from tests.engines.embedded.common import logprob_reference, make_core, request
from tests.tiny import make_model

LIMIT = 1e-4
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPE: dict[str, Any] = {"initializer_range": 0.15, "num_attention_heads": 2, "num_key_value_heads": 1}
"""Heads of 32 numbers, which the steps in C take."""


def base(attention: str = "eager") -> PreTrainedModel:
    return make_model("qwen3", attn_implementation=attention, **SHAPE)


@torch.no_grad()
def random_adapter(
    seed: int, *, rank: int = 4, modules: Sequence[str] = LINEAR, scale: float = 0.15, **config: Any
) -> AdapterWeights:
    """Large enough that answers differ."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in base().named_modules():
        if name.endswith(tuple(modules)):
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, module.in_features, generator=generator) * scale
            tensors[f"{key}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=generator) * scale
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "bias": "none",
        "target_modules": list(modules),
        **config,
    }
    return AdapterWeights(tensors=tensors, config=settings)


def save(weights: AdapterWeights, folder: Path) -> str:
    """In peft's format."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(weights.tensors), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(dict(weights.config)))
    return str(folder)


def merged(weights: AdapterWeights | None) -> PreTrainedModel:
    """peft's merge, in transformers' own model; None: the model without an adapter."""
    if weights is None:
        return base()
    import peft

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of peft, to transformers
        adapted: Any = peft.PeftModel.from_pretrained(base(), save(weights, Path(folder)))
        return adapted.merge_and_unload().eval()  # type: ignore[no-any-return]


def make_adapted(limits: LoraLimits | None = None, **config: Any) -> EngineCore:
    """A small engine over `base`, with adapters."""
    settings = {"max_num_batched_tokens": 64, "kv_cache_tokens": 1024, "max_num_seqs": 8}
    return make_core(base(ATTENTION_NAME), lora=limits or LoraLimits(), **{**settings, **config})


def ask(name: str, adapter: str | None, prompt: Sequence[int], max_new: int = 12, **sampling: Any) -> GenerateRequest:
    return replace(request(name, prompt, max_new, **{"ignore_eos": True, **sampling}), adapter=adapter)


def assert_is_of(model: PreTrainedModel, item: GenerateRequest, answer: Completion) -> None:
    """The answer's log-probabilities are this model's, and greedy answers its likeliest tokens."""
    temperature = item.sampling.temperature or 1.0
    wanted = logprob_reference(model, item.prompt_token_ids, answer.token_ids, temperature)
    assert (wanted - torch.tensor(answer.logprobs)).abs().max() < LIMIT
    if item.sampling.temperature == 0:
        ids = torch.tensor([[*item.prompt_token_ids, *answer.token_ids]])
        with torch.no_grad():
            rows = model(input_ids=ids).logits[0, len(item.prompt_token_ids) - 1 : -1]
        best = rows.max(dim=-1).values
        taken = rows.gather(-1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        assert (best - taken).max() < LIMIT
