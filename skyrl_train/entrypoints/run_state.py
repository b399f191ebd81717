"""What a checkpoint holds beside the trainer's state, and from which one a run goes on."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from skyrl_train.config.compose import flatten
from skyrl_train.config.schema_trainer import Trainer as TrainerKeys
from skyrl_train.data.stream import PromptStream
from skyrl_train.errors import CheckpointError
from skyrl_train.training.checkpoint import Checkpoint, CheckpointStore, Parts, open_checkpoint


class RunState:
    """Saves and restores (models, data position, step) of one run.

    `resumed_from` is the checkpoint that `restore` used, `changes` the configuration's differences to it, and
    `set_aside` where checkpoints of an earlier run went that this one was told not to go on from.
    """

    def __init__(self, keys: TrainerKeys, settings: Mapping[str, Any], *, loaded_later: Collection[str] = ()) -> None:
        """`loaded_later` are parts that a checkpoint may have and that somebody else loads."""
        self.loaded_later = set(loaded_later)
        self._keys = keys
        self._settings = json.loads(json.dumps(settings))
        self._store = CheckpointStore(
            str(keys.ckpt_path), max_to_keep=keys.max_ckpts_to_keep if keys.max_ckpts_to_keep > 0 else None
        )
        self.resumed_from: Path | None = None
        self.set_aside: Path | None = None
        self.changes: list[str] = []

    def restore(self, parts: Parts, prompts: PromptStream) -> int:
        """Load the checkpoint that `resume_mode` names into all of them.

        Returns the step it was taken after, 0 for a fresh start. Raises CheckpointError for one that doesn't fit
        this run; it names the keys that changed.
        """
        found = self._find()
        if found is None:
            return 0
        self._check_parts(found, parts)
        for name, (_, load) in parts.items():
            try:
                load(found.path / name)
            except CheckpointError as exc:
                raise CheckpointError(f"{exc}. {self._what_to_do(found)}") from exc
        prompts.load_state_dict(found.run_state["prompts"])
        self.changes = _changes(found.run_state["settings"], self._settings)
        self.resumed_from = found.path
        return found.step

    def save(self, step: int, parts: Parts, prompts: Mapping[str, Any]) -> None:
        """Everything that going on after `step` needs; whole on the disk or not there. `prompts`: the data position."""
        run_state = {"prompts": prompts, "settings": self._settings}
        self._store.save(step, {name: save for name, (save, _) in parts.items()}, run_state)

    def _check_parts(self, found: Checkpoint, parts: Parts) -> None:
        """What is saved and what would be loaded must be the same; rollouts in flight are the loop's to load."""
        stored = {entry.name for entry in found.path.iterdir() if entry.is_dir()}
        lacking, surplus = sorted(parts.keys() - stored), sorted(stored - parts.keys() - self.loaded_later)
        if not lacking and not surplus:
            return
        what = [f"has no {name}" for name in lacking] + [f"has {name}, which this run doesn't" for name in surplus]
        raise CheckpointError(
            f"{found.path} {' and '.join(what)}: it was made with another configuration. {self._what_to_do(found)}"
        )

    def _what_to_do(self, found: Checkpoint) -> str:
        keys = [f"\n  {line}" for line in _changes(found.run_state["settings"], self._settings)]
        return "Set back what changed, or start anew with trainer.resume_mode=none; changed since: " + (
            "".join(keys) or "no key, so a file that one names"
        )

    def _find(self) -> Checkpoint | None:
        if self._keys.resume_mode == "none":
            self._set_aside()
            return None
        if self._keys.resume_mode == "from_path":
            found = self._cut_short() or _newest(CheckpointStore(str(self._keys.resume_path)))
            return found or open_checkpoint(str(self._keys.resume_path))
        found = _newest(self._store)
        if found is not None:
            self._store.tidy(found.step)
        return found

    def _cut_short(self) -> Checkpoint | None:
        """The newest one that this very command made: started anew from its path, it would do that work again."""
        for step in reversed(self._store.steps()):
            with suppress(CheckpointError):
                found = self._store.open(step)
                if found.run_state["settings"] == self._settings:
                    return found
        return None

    def _set_aside(self) -> None:
        """Old checkpoints must not be what a later `latest` of the new run finds; they are moved, not deleted."""
        root = self._store.root
        if not self._store.steps():
            return
        number = 1
        while (aside := root.with_name(f"{root.name}.old-{number}")).exists():
            number += 1
        root.rename(aside)
        self.set_aside = aside


def _newest(store: CheckpointStore) -> Checkpoint | None:
    """The newest whole one; None where there is none at all. Raises CheckpointError where none of them can be used."""
    found = store.latest()
    if found is None and (steps := store.steps()):
        try:
            store.open(steps[-1])
        except CheckpointError as exc:
            raise CheckpointError(
                f"{store.root} holds checkpoints of steps {steps}, none of them whole; trainer.resume_mode=none starts "
                f"anew. The newest: {exc}"
            ) from exc
    return found


_FREE_TO_CHANGE = (
    *(f"trainer.{name}" for name in ("resume_mode", "resume_path", "run_name", "run_path", "ckpt_path", "export_path")),
    *(f"trainer.{name}" for name in ("logger", "project_name", "rollout_log_interval")),
)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for the keys that differ and may change what is computed."""
    old, new = dict(flatten(dict(before))), dict(flatten(dict(now)))
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key) and key not in _FREE_TO_CHANGE
    ]
