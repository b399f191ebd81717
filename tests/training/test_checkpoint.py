"""Checkpoints are whole or not there, and the last whole one is found."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch

from skyrl_train.errors import CheckpointError
from skyrl_train.training.checkpoint import CheckpointStore, open_checkpoint


def writer(value: float):  # type: ignore[no-untyped-def]
    def write(folder: Path) -> None:
        torch.save({"x": torch.full((100,), value)}, folder / "x.pt")

    return write


def save(store: CheckpointStore, step: int) -> None:
    store.save(step, {"policy": writer(float(step))}, {"data": {"position": step}, "best": None})


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    assert store.latest() is None
    save(store, 3)
    save(store, 12)
    found = store.latest()
    assert found is not None
    assert (found.step, found.path) == (12, tmp_path / "checkpoints" / "global_step_12")
    assert found.run_state == {"data": {"position": 12}, "best": None}
    loaded = torch.load(found.path / "policy" / "x.pt", weights_only=True)
    assert torch.equal(loaded["x"], torch.full((100,), 12.0))
    assert sorted(os.listdir(store.root)) == ["global_step_12", "global_step_3"]


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "manifest cut", "manifest gone", "state edited"])
def test_a_broken_checkpoint_is_passed_over_aloud(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    save(store, 2)
    file, manifest = tmp_path / "global_step_2/policy/x.pt", tmp_path / "global_step_2/manifest.json"
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[:-10])
    elif damage == "flip":
        file.write_bytes(content[:700] + bytes([content[700] ^ 1]) + content[701:])
    elif damage == "missing":
        file.unlink()
    elif damage == "manifest cut":
        manifest.write_text(manifest.read_text()[:40])
    elif damage == "manifest gone":
        manifest.unlink()
    else:
        (tmp_path / "global_step_2/run_state.json").write_text(json.dumps({"data": {"position": 9}, "best": None}))
    with caplog.at_level(logging.WARNING):
        found = store.latest()
    assert found is not None and found.step == 1
    assert "skipping a checkpoint" in caplog.text and "global_step_2" in caplog.text
    with pytest.raises(CheckpointError, match="global_step_2"):
        store.open(2)


def test_with_nothing_whole_left_there_is_no_latest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    (tmp_path / "global_step_1/manifest.json").unlink()
    assert store.latest() is None


def test_a_save_that_raises_leaves_the_last_checkpoint_alone(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(CheckpointError, match=r"step 2 can't be written .*disk full; those of steps \[1\] are as they"):
        store.save(2, {"policy": fail}, {})
    assert os.listdir(tmp_path) == ["global_step_1"], "what was written of it takes no room"
    save(store, 2)
    assert sorted(os.listdir(tmp_path)) == ["global_step_1", "global_step_2"]
    assert os.listdir(tmp_path / "global_step_2" / "policy") == ["x.pt"]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, max_to_keep=2)
    for step in (1, 2, 3, 10):
        save(store, step)
    assert store.steps() == [3, 10]
    with pytest.raises(ValueError, match="max_to_keep must be >= 1"):
        CheckpointStore(tmp_path, max_to_keep=0)


def test_after_a_step_back_the_abandoned_future_goes_first(tmp_path: Path) -> None:
    """Steps 2 to 4 were saved, 3 and 4 are broken, the run goes on from 2 and saves 3 again."""
    store = CheckpointStore(tmp_path, max_to_keep=2)
    save(store, 2)
    CheckpointStore(tmp_path).save(4, {"policy": writer(4.0)}, {})
    save(store, 3)
    assert store.steps() == [2, 3]
    save(store, 3)
    found = store.latest()
    assert found is not None and found.step == 3


def test_what_a_kill_left_behind_is_removed_by_the_next_save_or_when_the_run_is_taken_up(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, max_to_keep=2)
    for step in (1, 2):
        save(store, step)
    for again in (lambda: save(store, 3), lambda: store.tidy(3)):
        (tmp_path / ".global_step_7.writing" / "policy").mkdir(parents=True)
        (tmp_path / ".global_step_1.removing").mkdir()
        (tmp_path / "notes").mkdir(exist_ok=True)
        again()
        assert sorted(os.listdir(tmp_path)) == ["global_step_2", "global_step_3", "notes"]


def test_removing_old_ones_is_finished_when_the_run_is_taken_up(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(CheckpointStore(tmp_path), step)
    CheckpointStore(tmp_path, max_to_keep=2).tidy(4)
    assert CheckpointStore(tmp_path).steps() == [3, 4]


def test_a_state_that_json_would_change_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        store.save(1, {}, {"loss": float("nan")})
    with pytest.raises(TypeError):
        store.save(1, {}, {"tensor": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"run_state.*does not survive JSON"):
        store.save(1, {}, {"by_id": {3: "x"}})
    assert store.steps() == []


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    manifest = tmp_path / "global_step_1/manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 99'))
    with pytest.raises(CheckpointError, match=r"format 99, this version reads 2; .*trainer.resume_mode=none"):
        open_checkpoint(tmp_path / "global_step_1")


def test_a_missing_checkpoint_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="global_step_7"):
        CheckpointStore(tmp_path).open(7)
