"""What the builder of server engines reads of a model, and how it lets the trainer prove an update."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from skyrl_train.config.load import load_config
from skyrl_train.engines.build import Places, _verify, build_server_engine, end_token_ids
from skyrl_train.errors import ConfigError, WeightUpdateError
from tests.tiny import make_model


def test_what_ends_an_answer_is_named_in_three_places(tmp_path: Path) -> None:
    assert end_token_ids(tmp_path, None) == frozenset()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7, "text_config": {"eos_token_id": None}}))
    assert end_token_ids(tmp_path, None) == {7}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert end_token_ids(tmp_path, SimpleNamespace(eos_token_id=0)) == {0, 7, 8}


async def test_a_server_that_is_started_again_is_proved_without_asking_the_trainer() -> None:
    """Which may be in the middle of its next step."""
    weights, asked = {"trainer": 1.0, "server": 1.0}, 0

    async def reference(token_ids: Sequence[int]) -> list[float]:
        nonlocal asked
        asked += 1
        return [weights["trainer"]] * (len(token_ids) - 1)

    async def score(token_ids: Sequence[int]) -> list[float]:
        return [weights["server"]] * (len(token_ids) - 1)

    client: Any = SimpleNamespace(score=score)
    verify = _verify("one", reference, 100, torch.float32)
    await verify(client, 1)
    weights["trainer"] = 2.0  # the next step has begun
    await verify(client, 1)
    assert asked == 1
    with pytest.raises(WeightUpdateError, match="does not have the weights of version 2"):
        await verify(client, 2)
    weights["server"] = 2.0
    await verify(client, 2)
    assert asked == 2


async def test_a_head_that_an_update_from_disk_would_end_is_refused_before_anything_starts(tmp_path: Path) -> None:
    make_model(attn_implementation="eager").save_pretrained(tmp_path / "model")
    drafts = "generator.speculative_decoding"
    arguments = [
        f"trainer.policy.model.path={tmp_path / 'model'}",
        "generator.backend=sglang",
        f"{drafts}.enabled=true",
        f"{drafts}.algorithm=eagle3",
        f"{drafts}.draft_model_path=head",
    ]
    config = load_config(arguments).config
    assert config.generator.weight_sync_backend == "disk"
    places = Places(model=tmp_path / "model", logs=tmp_path / "logs", weights=tmp_path / "weights")
    with pytest.raises(ConfigError, match="loads the policy's new weights into the head too"):
        await build_server_engine(config, places, reference=lambda ids: ())
