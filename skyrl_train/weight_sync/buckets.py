"""Several tensors as one run of bytes, in a buffer that is allocated once and used for every bucket.

[ q_proj, 96 bytes ][ k_proj, 48 bytes ][ … ]        one type a bucket, so no gaps and every number is aligned
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from skyrl_train.weight_sync.plan import TensorSpec, WeightPlan

Allocate = Callable[[int, torch.device], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Bytes [start, end) of a bucket are the tensor of this spec, contiguous."""

    spec: TensorSpec
    start: int
    end: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Bucket:
    """`data` is uint8 [num_bytes] in the buffer: valid until the next bucket is made in it."""

    data: torch.Tensor
    places: tuple[Place, ...]
    is_last: bool


def places(specs: Sequence[TensorSpec]) -> tuple[Place, ...]:
    """Where each tensor lies: one after the other."""
    found, end = [], 0
    for spec in specs:
        start, end = end, end + spec.num_bytes
        found.append(Place(spec=spec, start=start, end=end))
    return tuple(found)


class BucketBuffer:
    """The one buffer, on `device`; it grows with the largest bucket that it is asked for and is dropped by `free`."""

    def __init__(self, device: torch.device, *, allocate: Allocate | None = None) -> None:
        self._device = device
        self._allocate = allocate or (lambda size, device: torch.empty(size, dtype=torch.uint8, device=device))
        self._data: torch.Tensor | None = None

    def buckets(self, plan: WeightPlan, tensors: Mapping[str, torch.Tensor]) -> Iterator[Bucket]:
        """The plan's buckets, each filled when it is asked for: cast, and copied to the device."""
        runs = list(plan.buckets())
        self._reserve(max((sum(spec.num_bytes for spec in run) for run in runs), default=0))
        for number, run in enumerate(runs, start=1):
            yield self._fill(run, tensors, is_last=number == len(runs))

    def free(self) -> None:
        self._data = None

    def _reserve(self, num_bytes: int) -> None:
        if self._data is None or self._data.numel() < num_bytes:
            self._data = None
            self._data = self._allocate(num_bytes, self._device)

    def _fill(self, specs: Sequence[TensorSpec], tensors: Mapping[str, torch.Tensor], *, is_last: bool) -> Bucket:
        assert self._data is not None
        found = places(specs)
        with torch.no_grad():
            for place in found:
                view = self._data[place.start : place.end].view(place.spec.dtype).view(place.spec.shape)
                view.copy_(tensors[place.spec.name].detach(), non_blocking=True)
            if self._device.type == "cuda" or any(tensors[spec.name].is_cuda for spec in specs):
                # Who reads the bucket next is another stream, or another process.
                torch.cuda.synchronize(self._device if self._device.type == "cuda" else None)
        return Bucket(data=self._data[: found[-1].end], places=found, is_last=is_last)
