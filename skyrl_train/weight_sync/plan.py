"""What a weight update carries: names, shapes and types, agreed before the first byte."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
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
        """Runs of specs of one type that together are at most `bucket_bytes`, in order."""
        bucket: list[TensorSpec] = []
        room = self.bucket_bytes
        for spec in self.specs:
            if bucket and (spec.num_bytes > room or spec.dtype != bucket[-1].dtype):
                yield tuple(bucket)
                bucket, room = [], self.bucket_bytes
            bucket.append(spec)
            room -= spec.num_bytes
        if bucket:
            yield tuple(bucket)

    def check_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """These tensors are the plan's. Raises WeightUpdateError naming the first that isn't."""
        for spec in self.specs:
            tensor = tensors.get(spec.name)
            if tensor is None or tuple(tensor.shape) != spec.shape:
                found = "is missing" if tensor is None else f"has shape {list(tensor.shape)}"
                raise WeightUpdateError(f"{spec.name}: the plan has shape {list(spec.shape)}, the tensor {found}")

    def check_model(self, model: Mapping[str, TensorSpec], *, tied: Collection[str] = (), whole: bool = False) -> None:
        """The engine's model has all these tensors, in these shapes; `model` is its checkpoint (see model_folder).

        Matrices that an engine fuses (q, k, v; gate, up) travel under their own names: the engine's loader fuses them.
        `tied` are names that the model has and its checkpoint may leave out. With `whole`, every tensor of the model
        must be in the plan. Raises WeightUpdateError that lists the differences.
        """
        wrong, planned = [], set[str]()
        for spec in self.specs:
            planned.add(spec.name)
            known = model.get(spec.name)
            if known is None and spec.name not in tied:
                near = difflib.get_close_matches(spec.name, model, n=1, cutoff=0.8)
                wrong.append(f"{spec.name} is not in the model{f'; it has {near[0]}' if near else ''}")
            elif known is not None and known.shape != spec.shape:
                wrong.append(f"{spec.name} has shape {list(spec.shape)}, the model's has {list(known.shape)}")
        if whole:
            wrong += [f"{name} is missing" for name in model if name not in planned and name not in tied]
        if wrong:
            more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise WeightUpdateError(f"the update does not fit the engine's model: {'; '.join(wrong[:5])}{more}")
