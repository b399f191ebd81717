"""What a weight update carries: names, shapes and types, agreed before the first byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from skyrl_train.errors import WeightUpdateError


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor as the engine takes it: `name` as in a Hugging Face checkpoint, `dtype` as it is sent."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes on the wire."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class WeightPlan:
    """The tensors of an update in the order in which they are sent; `bucket_bytes` bounds what travels at once.

    A tensor larger than a bucket travels alone.
    """

    specs: tuple[TensorSpec, ...]
    bucket_bytes: int = 512 * 2**20

    @classmethod
    def of(
        cls, tensors: Mapping[str, torch.Tensor], *, dtype: torch.dtype, bucket_bytes: int = 512 * 2**20
    ) -> WeightPlan:
        """The plan for these tensors, sent as `dtype`. One that shares its memory with an earlier name is tied to it
        and left out. Raises WeightUpdateError for what is no dense floating-point tensor.
        """
        specs, seen = [], set[tuple[int, tuple[int, ...]]]()
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or tensor.layout is not torch.strided:
                raise WeightUpdateError(f"{name} is {tensor.dtype} and {tensor.layout}; a dense float tensor is sent")
            place = (tensor.data_ptr(), tuple(tensor.shape))
            if tensor.numel() and place in seen:
                continue
            seen.add(place)
            specs.append(TensorSpec(name=name, shape=tuple(tensor.shape), dtype=dtype))
        return cls(specs=tuple(specs), bucket_bytes=bucket_bytes)

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.specs)

    def buckets(self) -> Iterator[tuple[TensorSpec, ...]]:
        """Runs of specs that together are at most `bucket_bytes`, in order."""
        bucket: list[TensorSpec] = []
        room = self.bucket_bytes
        for spec in self.specs:
            if bucket and spec.num_bytes > room:
                yield tuple(bucket)
                bucket, room = [], self.bucket_bytes
            bucket.append(spec)
            room -= spec.num_bytes
        if bucket:
            yield tuple(bucket)
