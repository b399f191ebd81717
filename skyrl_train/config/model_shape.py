"""What a model's config.json says about its size: enough to plan memory, without torch or transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUILTIN_PREFIX = "builtin:"
BYTES_PER_NUMBER = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder-only transformer. `num_parameters` is counted from the shape and is within a percent or so."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    mlp_size: int
    max_positions: int | None
    num_parameters: int
    architecture: str

    def kv_bytes_per_token(self, bytes_per_number: int) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_number

    @property
    def num_linear_parameters(self) -> int:
        """Of the seven linear maps of each layer."""
        heads = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return self.num_layers * self.hidden_size * (heads + 3 * self.mlp_size)

    def num_adapter_parameters(self, rank: int) -> int:
        """Adapters on the seven linear maps of each layer; those of a mixture's experts have none."""
        hidden, queries, keys = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        ends = 2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + self.mlp_size)
        return self.num_layers * rank * ends


def find_model_folder(path: str) -> Path | None:
    """The folder with the model's config.json: `path` itself, or a hub name's newest snapshot in the local cache."""
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        return None
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    snapshots = (hub / f"models--{path.replace('/', '--')}" / "snapshots").glob("*/config.json")
    newest = max(snapshots, key=lambda file: file.stat().st_mtime, default=None)
    return newest.parent if newest is not None else None


def read_model_shape(path: str) -> ModelShape | None:
    """None when the model is not on this disk, is built in, or is not a decoder that this file knows how to count."""
    folder = find_model_folder(path)
    if folder is None:
        return None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return shape_of(config)


def shape_of(config: Mapping[str, Any]) -> ModelShape | None:
    """The shape from a parsed config.json."""
    text = {**config, **config.get("text_config", {})}
    if not all(name in text for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")):
        return None
    hidden, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
    kv_heads = int(text.get("num_key_value_heads") or heads)
    head_dim = int(text.get("head_dim") or hidden // heads)
    layers, vocab = int(text["num_hidden_layers"]), int(text["vocab_size"])
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    embeddings = vocab * hidden * (1 if text.get("tie_word_embeddings", False) else 2)
    return ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        mlp_size=int(text.get("intermediate_size") or 4 * hidden),
        max_positions=text.get("max_position_embeddings"),
        num_parameters=embeddings + layers * (attention + _mlp(text, hidden) + 2 * hidden) + hidden,
        architecture=str((text.get("architectures") or [text.get("model_type", "unknown")])[0]),
    )


def _mlp(text: Mapping[str, Any], hidden: int) -> int:
    """Gate, up and down; for a mixture, of every expert, and the router."""
    dense = 3 * hidden * int(text.get("intermediate_size") or 4 * hidden)
    experts = text.get("num_experts") or text.get("num_local_experts") or text.get("n_routed_experts")
    if not experts:
        return dense
    size = int(text.get("moe_intermediate_size") or text.get("intermediate_size") or 4 * hidden)
    return int(experts) * (3 * hidden * size + hidden)
