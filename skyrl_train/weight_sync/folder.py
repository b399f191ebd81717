"""Weights that are on disk already, as tensors by name."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from skyrl_train.errors import WeightUpdateError


def read_weights(folder: str) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder. Raises WeightUpdateError naming the folder."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise WeightUpdateError(f"{folder} has no *.safetensors file; a folder in Hugging Face's format is wanted")
    tensors: dict[str, torch.Tensor] = {}
    try:
        for file in files:
            tensors.update(load_file(file))
    except (OSError, SafetensorError) as exc:
        raise WeightUpdateError(f"can't read the weights in {folder}: {exc}") from exc
    return tensors
