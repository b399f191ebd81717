"""A module's tensors by their names in a Hugging Face checkpoint, which is how engines know them."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


def checkpoint_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What `model.save_pretrained` would write, without writing: the module's own tensors, detached.

    A tied pair is there once, under the first of its names. Where an architecture's module keeps its weights in
    another form than its checkpoints (fused experts), those tensors are new ones.
    """
    tensors, seen = {}, set[tuple[int, tuple[int, ...], tuple[int, ...]]]()
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        tensors[name] = tensor
    with torch.no_grad():
        return dict(revert_weight_conversion(model, tensors))
