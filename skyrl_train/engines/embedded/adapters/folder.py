"""An adapter's folder in peft's format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from skyrl_train.errors import WeightUpdateError
from skyrl_train.types import AdapterWeights

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def read_adapter_folder(folder: str) -> AdapterWeights:
    """Everything in it; what fits is asked later. Raises WeightUpdateError for what can't be read."""
    root = Path(folder)
    if not root.is_dir():
        raise WeightUpdateError(f"{folder}: no such folder; name one with {CONFIG} and {TENSORS}, as peft saves them")
    missing = [name for name in (CONFIG, TENSORS) if not (root / name).is_file()]
    if missing:
        old = " (pickled adapter_model.bin is not read: save it with safe_serialization=True)"
        has_old = (root / "adapter_model.bin").is_file()
        raise WeightUpdateError(
            f"{folder} is no adapter in peft's format: it has no {' and no '.join(missing)}{old if has_old else ''}"
        )
    try:
        config: Any = json.loads((root / CONFIG).read_text())
        tensors = load_file(root / TENSORS)
    except (OSError, ValueError, SafetensorError) as exc:
        raise WeightUpdateError(f"can't read the adapter in {folder}: {exc}") from exc
    if not isinstance(config, dict):
        raise WeightUpdateError(f"{root / CONFIG} holds {type(config).__name__}, a mapping is needed")
    return AdapterWeights(tensors=tensors, config=config)
