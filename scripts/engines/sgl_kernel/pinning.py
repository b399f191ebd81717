"""Pinned memory where there is no device to copy to: asked for, and ordinary memory given.

SGLang's LoRA layers and backends (lora/layers.py, lora/backend/torch_backend.py) pin what they stage for a device, and
a CPU build of PyTorch refuses. While there is no CUDA device, importing this makes the whole process ignore the wish.
"""

import functools

import torch

FACTORIES = ("empty", "empty_like", "full", "ones", "tensor", "zeros", "zeros_like")


def _unpinned(factory):
    @functools.wraps(factory)
    def make(*args, pin_memory=False, **kwargs):
        return factory(*args, **kwargs)

    return make


if not torch.cuda.is_available():
    for _name in FACTORIES:
        setattr(torch, _name, _unpinned(getattr(torch, _name)))
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
