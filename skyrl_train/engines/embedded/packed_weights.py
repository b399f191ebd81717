"""Linear maps of one input as one matrix product, over weights that stay the trainer's own.

    before   q.weight [ .. ]   k.weight [ .. ]   v.weight [ .. ]      three storages
    after    [ q.weight | k.weight | v.weight ]                       one; each Parameter's data is a view of it

The parameters themselves are not replaced, so optimizers, hooks and names know nothing of it, and whatever is written
into a parameter is in the product at once. What gives a parameter other memory (a new Parameter, an assigned `.data`,
a move to another device) breaks the relation: `is_intact` sees that, and the maps are computed one by one from then on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class PackedLinears:
    """Calls `modules` on one input. Packs their weights at construction where that is possible."""

    def __init__(self, modules: Sequence[nn.Module], *, shared: frozenset[int] = frozenset()) -> None:
        """`shared`: data pointers of parameters that other modules use as well; those keep their own memory."""
        self.modules = tuple(modules)
        self._parameters = [module._parameters for module in modules]
        self._sizes = [_weight(parameters).shape[0] for parameters in self._parameters]
        self._weight: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None
        if _fits(self._parameters, shared):
            self._weight = _one_storage([_weight(parameters) for parameters in self._parameters])
            biases = [bias for parameters in self._parameters if (bias := parameters.get("bias")) is not None]
            self._bias = _one_storage(biases) if biases else None

    @property
    def is_packed(self) -> bool:
        return self._weight is not None

    def is_intact(self) -> bool:
        """Whether the parameters still lie in the packed memory, or never did."""
        if self._weight is None:
            return True
        biases = [parameters.get("bias") for parameters in self._parameters]
        if (self._bias is None) != all(bias is None for bias in biases):
            return False
        return _lie_in(self._weight, [_weight(parameters) for parameters in self._parameters]) and (
            self._bias is None or _lie_in(self._bias, [bias for bias in biases if bias is not None])
        )

    def separate(self) -> None:
        """Compute the maps one by one from now on."""
        self._weight = self._bias = None

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x [T, in] -> one [T, out] for each map; views of one product where they are packed."""
        if self._weight is not None:
            return torch.split(nn.functional.linear(x, self._weight, self._bias), self._sizes, dim=1)
        return tuple(
            nn.functional.linear(x, _weight(parameters), parameters.get("bias")) for parameters in self._parameters
        )


def _weight(parameters: dict[str, nn.Parameter | None]) -> nn.Parameter:
    weight = parameters["weight"]
    assert weight is not None
    return weight


def _fits(maps: Sequence[dict[str, nn.Parameter | None]], shared: frozenset[int]) -> bool:
    weights = [_weight(parameters) for parameters in maps]
    biases = [parameters.get("bias") for parameters in maps]
    if len({bias is None for bias in biases}) != 1:
        return False
    tensors = [*weights, *(bias for bias in biases if bias is not None)]
    return (
        len({(tensor.dtype, tensor.device) for tensor in tensors}) == 1
        and len({weight.shape[1] for weight in weights}) == 1
        and all(tensor.is_contiguous() and tensor.data_ptr() not in shared for tensor in tensors)
        and (_follow_each_other(weights) or all(_owns_storage(tensor) for tensor in weights))
        and (biases[0] is None or _follow_each_other(tensors[len(weights) :]) or all(map(_owns_storage, tensors)))
    )


def _owns_storage(tensor: torch.Tensor) -> bool:
    """A tensor in a file's memory or in somebody's flat buffer is left where it is."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def _follow_each_other(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether they lie in one storage already: an earlier engine packed them."""
    storage, at = tensors[0].untyped_storage().data_ptr(), tensors[0].data_ptr()
    for tensor in tensors:
        if tensor.untyped_storage().data_ptr() != storage or tensor.data_ptr() != at:
            return False
        at += tensor.numel() * tensor.element_size()
    return len(tensors) > 1


@torch.no_grad()
def _one_storage(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of all tensors as one tensor; afterwards each tensor is a view of its rows."""
    rows = sum(len(tensor) for tensor in tensors)
    if _follow_each_other(tensors):
        first = tensors[0].detach()
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    packed = torch.cat([tensor.detach() for tensor in tensors])
    for tensor, part in zip(tensors, torch.split(packed, [len(tensor) for tensor in tensors]), strict=True):
        tensor.data = part
    return packed


def _lie_in(packed: torch.Tensor, tensors: Sequence[torch.Tensor]) -> bool:
    at = packed.data_ptr()
    for tensor in tensors:
        if (tensor.data_ptr(), tensor.dtype, tensor.device) != (at, packed.dtype, packed.device):
            return False
        if not tensor.is_contiguous() or tensor.shape[1:] != packed.shape[1:]:
            return False
        at += tensor.numel() * tensor.element_size()
    return at == packed.data_ptr() + packed.numel() * packed.element_size()


def shared_pointers(model: nn.Module) -> frozenset[int]:
    """Data pointers of parameters that stand in the model under several names."""
    seen: set[int] = set()
    shared: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        pointer = parameter.data_ptr()
        (shared if pointer in seen else seen).add(pointer)
    return frozenset(shared)
