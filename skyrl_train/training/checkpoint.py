"""Checkpoints that are whole or not there.

    checkpoints/
      global_step_8/
        policy/shard-00001-....safetensors  ...  what each part wrote
        run_state.json                           the loop's own state
        manifest.json                            size and SHA-256 of every other file; written last
      .global_step_9.writing/                    a save that was cut short; removed by the next one, as is
      .global_step_2.removing/                   an old checkpoint that was only half removed

A checkpoint is written beside, synced to the disk and renamed; `latest` reads every byte back against the manifest
and falls back to the one before, aloud, when they differ.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skyrl_train.errors import CheckpointError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
RUN_STATE = "run_state.json"
FORMAT = 2
_NAME = re.compile(r"global_step_(\d+)")
_LEFT_BEHIND = re.compile(r"\.global_step_\d+\.(writing|removing)")

WritePart = Callable[[Path], None]
"""Writes its files into the folder that it is given, such as `PolicyTrainer.save`."""

ReadPart = Callable[[Path], None]
"""Reads them from there again, such as `PolicyTrainer.load`."""

Parts = Mapping[str, tuple[WritePart, ReadPart]]
"""What a checkpoint has a folder for, by name."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint: `path / name` is the folder that part `name` wrote."""

    step: int
    path: Path
    run_state: Mapping[str, Any]


class CheckpointStore:
    """Owns a run's folder of checkpoints. `max_to_keep` None keeps all."""

    def __init__(self, root: str | Path, *, max_to_keep: int | None = None) -> None:
        if max_to_keep is not None and max_to_keep < 1:
            raise ValueError(f"max_to_keep must be >= 1 or None, found {max_to_keep}")
        self.root = Path(root)
        self._max_to_keep = max_to_keep

    def steps(self) -> list[int]:
        """Of all checkpoints that were renamed into place, rising; not verified."""
        if not self.root.is_dir():
            return []
        names = (_NAME.fullmatch(entry.name) for entry in self.root.iterdir())
        return sorted(int(match[1]) for match in names if match)

    def save(self, step: int, parts: Mapping[str, WritePart], run_state: Mapping[str, Any]) -> Checkpoint:
        """Write a checkpoint, then drop the oldest over `max_to_keep`. `run_state` must survive JSON.

        A checkpoint of the same step is replaced: a run that fell back to an earlier one comes by here again.
        Raises CheckpointError, with those before untouched, where the disk doesn't take it.
        """
        text = json.dumps(run_state, indent=1, allow_nan=False)
        if json.loads(text) != run_state:
            raise ValueError(f"run_state of step {step} does not survive JSON: keys must be strings, sequences lists")
        final = self._folder(step)
        beside = self.root / f".{final.name}.writing"
        try:
            self._remove_left_behind()
            beside.mkdir(parents=True)
            for name, write in parts.items():
                (beside / name).mkdir()
                write(beside / name)
            (beside / RUN_STATE).write_text(text)
            manifest = {"format": FORMAT, "step": step, "files": _describe(beside)}
            (beside / MANIFEST).write_text(json.dumps(manifest, indent=1))
            _sync(beside)
            self._remove(final)
            os.rename(beside, final)
            _sync_folder(self.root)
            self._prune(step)
        except OSError as exc:
            shutil.rmtree(beside, ignore_errors=True)  # the room that it took may be what others lack
            raise CheckpointError(
                f"the checkpoint of step {step} can't be written to {self.root}: {exc}; those of steps {self.steps()} "
                "are as they were. Make room, or lower trainer.max_ckpts_to_keep; the same command goes on from there"
            ) from exc
        return Checkpoint(step=step, path=final, run_state=run_state)

    def tidy(self, newest: int) -> None:
        """What `save` of step `newest` would have done last, had nobody killed it."""
        self._remove_left_behind()
        self._prune(newest)

    def latest(self) -> Checkpoint | None:
        """The last whole checkpoint, None if there is none; says which broken ones it passed over."""
        for step in reversed(self.steps()):
            try:
                return self.open(step)
            except CheckpointError as exc:
                logger.warning("skipping a checkpoint: %s", exc)
        return None

    def open(self, step: int) -> Checkpoint:
        """Checkpoint `step`, verified byte by byte. Raises CheckpointError naming the file that is wrong."""
        return open_checkpoint(self._folder(step))

    def _folder(self, step: int) -> Path:
        return self.root / f"global_step_{step}"

    def _prune(self, newest: int) -> None:
        """Steps after `newest` belong to a future that was given up; they go first."""
        if self._max_to_keep is None:
            return
        others = sorted((s for s in self.steps() if s != newest), key=lambda s: (s < newest, s))
        for step in others[: max(0, len(others) + 1 - self._max_to_keep)]:
            self._remove(self._folder(step))

    def _remove_left_behind(self) -> None:
        """What a kill in the midst of a save or a removal left."""
        for entry in self.root.iterdir() if self.root.is_dir() else ():
            if _LEFT_BEHIND.fullmatch(entry.name):
                shutil.rmtree(entry)

    def _remove(self, folder: Path) -> None:
        """Out of sight first, so that a kill in between leaves no half-deleted checkpoint."""
        if folder.exists():
            doomed = folder.with_name(f".{folder.name}.removing")
            os.rename(folder, doomed)
            shutil.rmtree(doomed)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A checkpoint folder, verified against its manifest. Raises CheckpointError."""
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files, step, found_format = manifest["files"], manifest["step"], manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise CheckpointError(f"{path}: no readable {MANIFEST} ({exc!r}); the checkpoint was cut short") from exc
    if found_format != FORMAT:
        raise CheckpointError(
            f"{path}: format {found_format}, this version reads {FORMAT}; go on with the version that wrote it, or "
            "start anew with trainer.resume_mode=none"
        )
    for name, wanted in files.items():
        try:
            found = _describe_file(path / name)
        except OSError as exc:
            raise CheckpointError(f"{path}: {name} can't be read ({exc})") from exc
        if found != wanted:
            raise CheckpointError(f"{path}: {name} should be {wanted}, found {found}")
    return Checkpoint(step=step, path=path, run_state=json.loads((path / RUN_STATE).read_text()))


def _describe(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): _describe_file(p) for p in files}


def _describe_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(folder: Path) -> None:
    """Every file and folder below, so that the rename can't reach the disk before the bytes."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(parent, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(parent))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
