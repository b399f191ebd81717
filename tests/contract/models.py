"""The models that all engines serve here: small, random, and made so that a wrong answer shows.

Qwen3 with heads of 32 numbers: the smallest that vLLM's CPU attention takes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, PreTrainedModel

from skyrl_train.engines.embedded.drafts.eagle.fresh import fresh_eagle3
from skyrl_train.engines.embedded.drafts.eagle.layout import save_head
from skyrl_train.types import AdapterWeights
from tests.tiny import VOCAB_SIZE, make_model, make_tokenizer

CONTEXT_LEN = 8192
SHAPE: dict[str, Any] = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
    "max_position_embeddings": CONTEXT_LEN,
}
FEW_IDS = (65, 66, 67, 68, 69, 70, 71, 72)
"""What `few_words` may answer: the letters A to H."""


def policy(seed: int = 0, *, attention: str = "eager") -> PreTrainedModel:
    """Random weights. Two seeds are two policies of one shape."""
    return make_model("qwen3", seed=seed, attn_implementation=attention, **SHAPE)


@torch.no_grad()
def constant(token_id: int, *, direction: int, seed: int = 0) -> PreTrainedModel:
    """Answers `token_id`, whatever it is asked.

    Every embedding has the same large number at `direction`, no layer writes there, and only the row of `token_id` in
    the last matrix reads it. Of two such models with two directions, the embeddings of one and the last matrix of the
    other give nearly equal odds to all tokens: a mixture can't pass for either.
    """
    model = policy(seed)
    _keep_direction(model, direction, 1000.0)
    head = model.lm_head.weight
    head.zero_()
    head[token_id, direction] = 5.0
    return model


@torch.no_grad()
def few_words(seed: int = 0) -> PreTrainedModel:
    """Samples from FEW_IDS alone, with odds that depend on the context: small enough to count."""
    model = policy(seed)
    _keep_direction(model, 0, 8.0)
    others = [i for i in range(model.config.vocab_size) if i not in FEW_IDS]
    model.lm_head.weight[:, 0] = 0
    model.lm_head.weight[others, 0] = -30.0
    return model


@torch.no_grad()
def nearly(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """A draft of `model`: right about some tokens and wrong about others."""
    draft = policy()
    generator = torch.Generator().manual_seed(seed)
    for own, other in zip(draft.parameters(), model.parameters(), strict=True):
        own.copy_(other * (1 + 0.1 * torch.randn(other.shape, generator=generator)))
    return draft


def save_eagle_head(folder: Path, architecture: str) -> Path:
    """A head of one layer that drafts what the policy has just said: right wherever a text repeats one token.

    `fc` [hidden, 2 * hidden] takes the policy's hidden state and leaves out the token's embedding, the layer adds
    nothing. Embedding and last matrix are the policy's, which the server shares with it. SGLang's `fc` has a bias.
    """
    hidden, wide, size = 64, 128, 32
    shapes = {
        "self_attn.q_proj": (2 * size, hidden),
        "self_attn.k_proj": (size, hidden),
        "self_attn.v_proj": (size, hidden),
        "self_attn.o_proj": (hidden, 2 * size),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    tensors = {f"layers.0.{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    tensors["layers.0.post_attention_layernorm.weight"] = torch.ones(hidden)
    tensors["fc.weight"] = torch.cat((torch.zeros(hidden, hidden), torch.eye(hidden)), dim=1)
    if architecture == "LlamaForCausalLMEagle":
        tensors["fc.bias"] = torch.zeros(hidden)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=size,
        max_position_embeddings=CONTEXT_LEN,
        tie_word_embeddings=False,
        architectures=[architecture],
        dtype="float32",
    )
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors")
    return folder


def save_eagle3_head(folder: Path) -> Path:
    """An EAGLE-3 head for the policy's shape as this package writes them, over all words but the last few.

    It begins near to what the policy says without its last layers, and so is right now and then.
    """
    model = policy()
    return save_head(fresh_eagle3(model, seed=0, word_ids=range(VOCAB_SIZE - 20)), folder, num_layers=2)


@torch.no_grad()
def adapter(seed: int, *, scale: float = 0.2, rank: int = 8) -> AdapterWeights:
    """A random LoRA adapter on q_proj and v_proj of `policy`, by peft's names."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in policy().named_modules():
        if name.endswith(("q_proj", "v_proj")):
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, module.in_features, generator=generator) * scale
            tensors[f"{key}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=generator) * scale
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
        "base_model_name_or_path": None,
        "inference_mode": True,
    }
    return AdapterWeights(tensors=tensors, config=config)


@torch.no_grad()
def merged(base: PreTrainedModel, weights: AdapterWeights) -> PreTrainedModel:
    """A copy of `base` with the adapter added into its matrices."""
    model = policy()
    model.load_state_dict(base.state_dict())
    scale = weights.config["lora_alpha"] / weights.config["r"]
    for key, low in weights.tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            high = weights.tensors[key.replace("lora_A", "lora_B")]
            model.get_submodule(name).weight.add_(scale * high @ low)
    return model


def save(model: PreTrainedModel, folder: Path) -> Path:
    """In HF format, with the tokenizer."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(weights: AdapterWeights, folder: Path) -> Path:
    """In peft's format."""
    folder.mkdir(parents=True)
    save_file(dict(weights.tensors), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(dict(weights.config)))
    return folder


def _keep_direction(model: PreTrainedModel, direction: int, value: float) -> None:
    """Dimension `direction` of the hidden state is `value` at every token, through all layers."""
    model.get_input_embeddings().weight[:, direction] = value
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[direction] = 0
        layer.mlp.down_proj.weight[direction] = 0
