"""Tensors that wait in host memory while nobody computes with them.

    on the device     storage: the bytes        host copy: none, or pinned and stale
    away              storage: 0 bytes          host copy: the bytes

Only the storage is given back: the tensor, its shape, its device and everything that refers to it stay, so that a
module, an optimizer or a gradient hook need not know.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch


class HostMemory:
    """Owns the host copies of some tensors. With `constant`, the bytes are copied out once and never again.

    Each tensor must have its storage to itself. While `is_away`, a tensor's values are to be read by `values` only.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], *, constant: bool = False) -> None:
        unique = {id(tensor): tensor for tensor in tensors}
        self._tensors = list(unique.values())
        self._constant = constant
        self._copies: dict[int, torch.Tensor] = {}
        self.is_away = False
        for tensor in self._tensors:
            if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
                raise ValueError(f"a tensor {list(tensor.shape)} shares its storage: it can't be moved alone")
            if not tensor.untyped_storage().resizable():  # a file's bytes, as torch.load and safetensors map them
                tensor.data = tensor.data.clone()

    def of(self, tensors: Sequence[torch.Tensor]) -> HostMemory:
        """For `tensors`: this one, if it is theirs, else a new one. Adam makes its moments in the first step."""
        same = [id(tensor) for tensor in tensors] == [id(tensor) for tensor in self._tensors]
        return self if same else HostMemory(tensors, constant=self._constant)

    @property
    def num_device_bytes(self) -> int:
        """What the tensors hold on their device just now."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._tensors)

    @torch.no_grad()
    def send_away(self) -> None:
        """Bytes to the host, device memory back to its allocator."""
        if self.is_away:
            return
        for tensor in self._tensors:
            copy = self._copies.get(id(tensor))
            if copy is None:
                copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
                self._copies[id(tensor)] = copy.copy_(tensor, non_blocking=True)
            elif not self._constant:
                copy.copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in self._tensors):
            # The host may read its copies as soon as this returns.
            torch.cuda.current_stream().synchronize()
        for tensor in self._tensors:
            tensor.untyped_storage().resize_(0)
        self.is_away = True

    @torch.no_grad()
    def bring_back(self) -> None:
        """Bytes to the device again, in the order of its current stream."""
        if not self.is_away:
            return
        for tensor in self._tensors:
            tensor.untyped_storage().resize_(tensor.numel() * tensor.element_size())
            tensor.data.copy_(self._copies[id(tensor)], non_blocking=True)
        self.is_away = False

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The tensors are on their device inside, and away after."""
        self.bring_back()
        try:
            yield
        finally:
            self.send_away()

    def values(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, or its host copy where it is one of ours and away."""
        return self._copies.get(id(tensor), tensor) if self.is_away else tensor
