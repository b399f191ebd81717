"""Models for the engines' benchmarks: folders that any engine loads, and weights whose answers are known.

    spread     random; its logits are spread as a trained model's, so that a wrong answer shows in bfloat16
    constant   answers one token whatever it is asked: a mixture of two of them answers neither
    looping    after token i comes token i + 1 of its block of 16, for ever: text that n-grams foresee

All have the architecture of Qwen2 and an untied head, whatever the shape says: the last two need one of its own.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.models import NUM_POSITIONS, SHAPES, ModelShape, build_byte_tokenizer, build_model

LOGIT_STD = 2.5
LOOP = 16
"""Tokens of one loop."""
INITIAL_STD = 0.02
"""Of all matrices, as Hugging Face makes them."""


def untied(shape: str) -> ModelShape:
    return replace(SHAPES[shape], tied=False)


def spread_model(shape: ModelShape, *, device: str, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """In eval mode. The last normalisation is scaled, and nothing before it: errors don't grow on the way there."""
    model = build_model(shape, attn_implementation="sdpa", device=device, dtype=dtype, seed=seed)
    with torch.no_grad():
        model.model.norm.weight.fill_(LOGIT_STD / (INITIAL_STD * shape.hidden_size**0.5))
    return model


@torch.no_grad()
def constant_model(
    shape: ModelShape, token_id: int, *, direction: int, device: str, dtype: torch.dtype, seed: int
) -> PreTrainedModel:
    """Every embedding has the same large number at `direction`, no layer writes there, and only the row of `token_id`
    in the head reads it.
    """
    model = spread_model(shape, device=device, dtype=dtype, seed=seed)
    model.get_input_embeddings().weight[:, direction] = 20.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[direction] = 0
        layer.mlp.down_proj.weight[direction] = 0
    head = model.lm_head.weight
    head.zero_()
    head[token_id, direction] = 2.0
    return model


@torch.no_grad()
def looping_model(shape: ModelShape, *, device: str, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """Embeddings outweigh what the layers add, and the head of each token is the embedding of the one before it."""
    model = spread_model(shape, device=device, dtype=dtype, seed=seed)
    embeddings = model.get_input_embeddings().weight
    std = 0.4 * shape.num_layers**0.5
    embeddings.mul_(std / INITIAL_STD)
    before = torch.tensor([previous_in_loop(i) for i in range(shape.vocab_size)], device=embeddings.device)
    # A token's logit is then about 10 times the scale of the last normalisation, all others' are near 0.
    model.lm_head.weight.copy_(embeddings[before] * (10.0 / (shape.hidden_size * std)))
    return model


def previous_in_loop(token_id: int) -> int:
    return token_id - 1 if token_id % LOOP else token_id + LOOP - 1


def next_in_loop(token_id: int) -> int:
    return token_id + 1 if token_id % LOOP != LOOP - 1 else token_id - LOOP + 1


def model_folder(
    shape: ModelShape,
    folder: Path,
    *,
    device: str,
    dtype: torch.dtype,
    seed: int = 0,
    kind: str = "spread",
    num_positions: int = 0,
) -> Path:
    """The folder of `spread_model` with a tokenizer, made once. `num_positions`: at least so many."""
    longer = f"-{num_positions}" if num_positions > NUM_POSITIONS else ""
    path = folder / f"{kind}-{shape.name}-{str(dtype).removeprefix('torch.')}-{seed}{longer}"
    if not (path / "complete").is_file():
        make = {"spread": spread_model, "looping": looping_model}[kind]
        model = make(shape, device=device, dtype=dtype, seed=seed)
        model.config.max_position_embeddings = max(num_positions, NUM_POSITIONS)  # no weight depends on it
        model.save_pretrained(path)
        build_byte_tokenizer(shape.vocab_size).save_pretrained(path)
        _name_dtype(path / "config.json", dtype)
        (path / "complete").touch()
    return path


def _name_dtype(path: Path, dtype: torch.dtype) -> None:
    """By both names: which one is read depends on the release of transformers that an engine carries."""
    config = json.loads(path.read_text())
    name = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps({**config, "dtype": name, "torch_dtype": name}, indent=2))
