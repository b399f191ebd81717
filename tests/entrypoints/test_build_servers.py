"""Where the servers of a run find what they need."""

from __future__ import annotations

from pathlib import Path

import pytest

from skyrl_train.config import load_config
from skyrl_train.entrypoints.build_servers import server_places


def test_a_model_by_its_hub_name_is_its_folder_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hub" / "models--some--model" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    config = load_config(["generator.backend=sglang", "trainer.policy.model.path=some/model"]).config
    places = server_places(config, Path("some/model"))
    assert places.model == folder
    assert places.logs == Path("runs/quickstart/engines")
