"""A process that plays a server's worker in a group: `partner.py HOST PORT NAME NUM_BYTES BEHAVIOUR`.

receive: one broadcast, prints the sum. die: leaves inside the second. refuse: joins and receives nothing, until its
input closes. Joins as torch's own helper does, the way servers do it.
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
    host, port, name, num_bytes, behaviour = sys.argv[1:]
    store, rank, world_size = next(
        c10d.rendezvous(f"tcp://{host}:{port}", rank=1, world_size=2, timeout=timedelta(seconds=60))
    )
    group, _ = c10d._new_process_group_helper(
        world_size,
        rank,
        [],
        c10d.Backend("gloo"),
        c10d.PrefixStore(name, store),
        group_name=name,
        timeout=timedelta(minutes=30),
    )
    c10d._world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    print("joined", flush=True)
    if behaviour == "refuse":
        sys.stdin.read()
        return
    received = torch.empty(int(num_bytes), dtype=torch.uint8)
    if behaviour == "die":
        threading.Timer(0.5, lambda: os._exit(1)).start()
        threading.Event().wait()
    dist.broadcast(received, src=0, group=group)
    print(int(received.sum()), flush=True)


if __name__ == "__main__":
    main()
