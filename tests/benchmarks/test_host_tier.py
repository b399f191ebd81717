"""The benchmark of the host tier counts what it says, at its smallest size."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks import host_tier
from benchmarks.host_tier import LARGE, SMALL, TIER, Lengths
from benchmarks.models import ModelShape, build_model
from benchmarks.report import Report
from skyrl_train.attention import ATTENTION_NAME

MICRO = ModelShape(
    name="micro",
    hidden_size=32,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    vocab_size=50,
    tied=True,
)


def test_the_tier_computes_what_is_new_and_less_than_a_block_of_each_history(tmp_path: Path) -> None:
    model = build_model(MICRO, attn_implementation=ATTENTION_NAME, device="cpu", dtype=torch.float32)
    work = Lengths(conversations=6, resident=2, turns=3, first=20, observation=10, answer=4)
    assert work.asked == 6 * (20 + 34 + 48)
    assert work.least == 6 * (20 + 11 + 11)
    played = host_tier.compare(model, work, repetitions=1, seed=0, report=Report("", "r", tmp_path))
    (small,), (tier,), (large,) = (played[way] for way in (SMALL, TIER, LARGE))
    assert large.prefilled == work.least and large.evicted == 0
    assert work.least <= tier.prefilled < work.least + 6 * 2 * 16
    assert small.prefilled - tier.prefilled == tier.read_back > 0 == small.read_back
    assert small.answers == tier.answers == large.answers
    assert len(host_tier.rows(work, played, kv_bytes=256)) == 3
