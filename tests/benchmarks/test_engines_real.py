"""The harness over real servers: one is started, given other weights, and answers as transformers does."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pytest
import torch

from benchmarks.engines.asking import GREEDY, ask
from benchmarks.engines.folders import model_folder, spread_model
from benchmarks.engines.harness import SERVERS, Fleet, Setup, new_report
from benchmarks.engines.reference import TOLERANCE, logprob_difference
from benchmarks.engines.weights import give_tensors
from benchmarks.models import SHAPES
from benchmarks.workload import LengthRange, draw_requests
from tests.interpreters import engine_python


@pytest.mark.engines
@pytest.mark.parametrize("backend", SERVERS)
async def test_a_head_that_is_the_embeddings_matrix_follows_it_in_an_update(backend: str, tmp_path: Path):
    shape, dtype = SHAPES["tiny"], torch.float32
    assert shape.tied
    setup = Setup(
        shape=shape,
        device="cpu",
        dtype=dtype,
        seed=0,
        folder=model_folder(shape, tmp_path / "models", device="cpu", dtype=dtype),
        work=tmp_path,
        pythons={backend: str(engine_python(backend))},
        max_model_len=512,
        max_num_seqs=8,
    )
    args = argparse.Namespace(shape="tiny", device="cpu", engine=backend, out=tmp_path)
    fleet = Fleet(
        setup=setup, report=new_report("test", "A test", args), one_at_a_time=True, end=time.perf_counter() + 280
    )
    length = LengthRange(low=16, high=16)
    requests = draw_requests(4, prompt=length, new=length, vocab_size=shape.vocab_size, seed=0)
    other = spread_model(shape, device="cpu", dtype=dtype, seed=1)
    try:
        ship = await fleet.get(backend)
        await give_tensors(ship, other.state_dict())
        run = await ask(ship.engine, requests, temperature=GREEDY)
    finally:
        await fleet.close()
    found = logprob_difference(other, [r.prompt_token_ids for r in requests], run.completions)
    assert found.largest <= TOLERANCE[dtype] and found.greedy_gap <= TOLERANCE[dtype]
