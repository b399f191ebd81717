"""Tensors as runs of bytes in one buffer, and the same bytes in another process."""

from __future__ import annotations

import base64
import subprocess
import sys

import torch

from skyrl_train.weight_sync.buckets import BucketBuffer
from skyrl_train.weight_sync.cuda_ipc import allocate_shared, handle_bytes
from skyrl_train.weight_sync.plan import WeightPlan

TENSORS = {
    "a": torch.arange(6, dtype=torch.float64).view(2, 3),
    "b": torch.tensor(5.0),
    "c": torch.arange(8.0).view(2, 4).T,
    "d": torch.nn.Parameter(torch.ones(7)),
}
CPU = torch.device("cpu")


def test_every_bucket_lies_in_the_one_buffer_and_holds_its_tensors_in_the_plans_type() -> None:
    plan = WeightPlan.of(TENSORS, dtype=torch.bfloat16, bucket_bytes=16)
    buffer = BucketBuffer(CPU)
    seen, starts = {}, set()
    for bucket in buffer.buckets(plan, TENSORS):
        starts.add(bucket.data.data_ptr())
        assert bucket.data.numel() == bucket.places[-1].end
        for place in bucket.places:
            seen[place.spec.name] = (
                bucket.data[place.start : place.end].view(torch.bfloat16).view(place.spec.shape).clone()
            )
        assert bucket.is_last is ("d" in seen)
    assert len(starts) == 1
    assert all(torch.equal(seen[name], tensor.detach().bfloat16()) for name, tensor in TENSORS.items())


def test_an_empty_plan_has_no_bucket() -> None:
    assert list(BucketBuffer(CPU).buckets(WeightPlan(specs=()), {})) == []


def test_another_process_opens_the_buffer_by_its_handle_and_sees_it_filled_again() -> None:
    """Nothing of this process's own setting of shared memory is changed."""
    before = torch.multiprocessing.get_sharing_strategy()
    plan = WeightPlan.of(TENSORS, dtype=torch.float32, bucket_bytes=2**20)
    buffer = BucketBuffer(CPU, allocate=allocate_shared)
    for turn in (1, 2):
        tensors = {name: tensor.detach() * turn for name, tensor in TENSORS.items()}
        (bucket,) = buffer.buckets(plan, tensors)
        program = (
            "import base64, pickle, sys, torch\n"
            "data = pickle.loads(base64.b64decode(sys.argv[1]))\n"
            "flat = data['flattened_tensor']\n"
            "for m in data['metadata']:\n"
            "    print(m.name, flat[m.start_idx:m.end_idx].view(m.dtype).reshape(m.shape).tolist())\n"
        )
        handle = base64.b64encode(handle_bytes(bucket)).decode()
        done = subprocess.run([sys.executable, "-c", program, handle], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == [f"{name} {t.float().tolist()}" for name, t in tensors.items()]
    assert torch.multiprocessing.get_sharing_strategy() == before
