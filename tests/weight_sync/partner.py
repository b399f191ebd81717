"""A process that plays a server's worker in a group: `partner.py HOST PORT NAME NUM_BYTES BEHAVIOUR [BACKEND]`.

receive: broadcasts until the group ends, prints each sum. die: leaves after it joined. refuse: joins and receives
nothing. once: receives one, then nothing. These end when their input closes. By NCCL it is on the second GPU.
Joins as torch's own helper does, the way servers do it.
"""

from __future__ import annotations

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def main() -> None:
    host, port, name, num_bytes, behaviour, *rest = sys.argv[1:]
    backend = rest[0] if rest else "gloo"
    device = torch.device("cuda:1" if backend == "nccl" else "cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    store, rank, world_size = next(
        c10d.rendezvous(f"tcp://{host}:{port}", rank=1, world_size=2, timeout=timedelta(seconds=60))
    )
    group, _ = c10d._new_process_group_helper(
        world_size,
        rank,
        [],
        c10d.Backend(backend),
        c10d.PrefixStore(name, store),
        group_name=name,
        timeout=timedelta(minutes=30),
    )
    c10d._world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    print("joined", flush=True)
    if behaviour == "die":
        threading.Timer(0.5, lambda: os._exit(1)).start()
        threading.Event().wait()
    received = torch.empty(int(num_bytes), dtype=torch.uint8, device=device)
    for _ in range({"refuse": 0, "once": 1, "receive": 1 << 30}[behaviour]):
        try:
            dist.broadcast(received, src=0, group=group)
        except RuntimeError:
            return
        print(int(received.sum()), flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
