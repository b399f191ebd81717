"""Data files to prompt rows, each checked when read: a bad row is named by file and number.

A row, in the form that skyrl-gym's data sets use:
    prompt       a string (one user message) or a list of messages
    env_class    the environment's name, if it isn't the run's
    reward_spec  {"ground_truth": ...}: what the environment compares with
    ...          any other column goes to the environment untouched
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from skyrl_train.errors import ConfigError, DataError
from skyrl_train.types import Message

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """One row of a data file. `extras` holds every column, as the environment wants them."""

    messages: tuple[Message, ...]
    environment: str
    target: Any
    extras: Mapping[str, Any] = field(default_factory=dict)


def read_rows(
    paths: Sequence[str],
    *,
    environment: str,
    prompt_key: str = "prompt",
    target_key: str = "reward_spec.ground_truth",
    on_bad_row: Literal["error", "skip"] = "error",
    check: Callable[[Sequence[Message]], None] | None = None,
) -> list[PromptRow]:
    """All rows of the files (jsonl, json, parquet, a `datasets` folder), in order.

    `check` may refuse a row's messages, by raising DataError. Raises DataError for a bad row, or with
    `on_bad_row="skip"` counts it in one warning; ConfigError for a bad path.
    """
    rows: list[PromptRow] = []
    skipped: list[str] = []
    for path in paths:
        for number, raw in _raw_rows(Path(path)):
            try:
                row = _check_row(raw, environment=environment, prompt_key=prompt_key, target_key=target_key)
                if check is not None:
                    check(row.messages)
                rows.append(row)
            except DataError as exc:
                message = f"{path}, row {number}: {exc}"
                if on_bad_row == "error":
                    raise DataError(
                        f"{message}. Mend the row, or set data.on_bad_row=skip to leave such rows out and count them"
                    ) from exc
                skipped.append(message)
    if skipped:
        logger.warning("%d of %d rows skipped; first: %s", len(skipped), len(skipped) + len(rows), skipped[0])
    if not rows:
        raise DataError(f"no usable row in {', '.join(map(str, paths))}")
    return rows


def _raw_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(row number from 1, row). A line that isn't JSON is handed on as the exception, for the caller to place."""
    if not path.exists():
        raise ConfigError(
            f"data file {str(path)!r} does not exist (looked in {Path.cwd()}); "
            "examples/gsm8k/README.md shows how to make one"
        )
    if path.suffix in {".jsonl", ".ndjson"}:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _parse(line)
        return
    import datasets

    if path.is_dir():
        dataset = datasets.load_from_disk(str(path))
        if isinstance(dataset, datasets.DatasetDict):
            raise ConfigError(f"{path} holds several splits {sorted(dataset)}: name one, {path}/{next(iter(dataset))}")
    elif path.suffix == ".parquet":
        dataset = datasets.Dataset.from_parquet(str(path))
    elif path.suffix == ".json":
        dataset = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(dataset, list):
            raise ConfigError(f"{path} must hold a JSON list of rows, found {type(dataset).__name__}")
    else:
        raise ConfigError(
            f"data file {path}: wanted .jsonl, .json, .parquet or a datasets folder, found {path.suffix!r}"
        )
    yield from enumerate(dataset, start=1)


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as exc:
        return exc


def _check_row(raw: Any, *, environment: str, prompt_key: str, target_key: str) -> PromptRow:
    if isinstance(raw, json.JSONDecodeError):
        raise DataError(f"not JSON: {raw}")
    if not isinstance(raw, Mapping):
        raise DataError(f"wanted an object, found {type(raw).__name__}")
    prompt = raw.get(prompt_key)
    if isinstance(prompt, str) and prompt.strip():
        messages: tuple[Message, ...] = ({"role": "user", "content": prompt},)
    elif (
        isinstance(prompt, list)
        and prompt
        and all(isinstance(m, Mapping) and isinstance(m.get("role"), str) and "content" in m for m in prompt)
    ):
        messages = tuple(dict(message) for message in prompt)
    else:
        raise DataError(
            f"column {prompt_key!r} must be a string or a list of messages with role and content, "
            f"found {prompt!r:.80}; columns here: {sorted(raw)}"
        )
    target: Any = raw
    for part in target_key.split("."):
        target = target.get(part) if isinstance(target, Mapping) else None
    extras = {key: value for key, value in raw.items() if key != prompt_key}
    return PromptRow(messages=messages, environment=raw.get("env_class") or environment, target=target, extras=extras)
