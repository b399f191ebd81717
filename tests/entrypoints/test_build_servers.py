"""Where the servers of a run find what they need."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from skyrl_train.config import load_config
from skyrl_train.engines.build import Places, build_server_engine
from skyrl_train.entrypoints.build_servers import server_places
from skyrl_train.errors import ConfigError
from tests.tiny import make_model


def test_a_model_by_its_hub_name_is_its_folder_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hub" / "models--some--model" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    config = load_config(["generator.backend=sglang", "trainer.policy.model.path=some/model"]).config
    places = server_places(config, Path("some/model"))
    assert places.model == folder
    assert places.logs == Path("runs/quickstart/engines")


async def test_a_disk_without_room_for_the_weights_is_refused_before_a_server_starts(tmp_path: Path) -> None:
    """A model of 4 PB: the header of its file says so, which is all that is read."""
    numbers = 10**15
    header = json.dumps({"w": {"dtype": "F32", "shape": [numbers], "data_offsets": [0, 4 * numbers]}}).encode()
    make_model().config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    places = Places(model=tmp_path, logs=tmp_path / "run" / "engines", weights=tmp_path / "run" / "engines")

    async def score(token_ids: Sequence[int]) -> tuple[float, ...]:
        raise AssertionError

    keys = ["generator.backend=sglang", f"trainer.policy.model.path={tmp_path}", "generator.weight_sync_backend=disk"]
    with pytest.raises(ConfigError, match=r"make room, or set trainer\.run_path to another disk"):
        await build_server_engine(load_config(keys).config, places, reference=score)
