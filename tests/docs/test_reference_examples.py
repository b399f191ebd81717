"""The Python examples of docs/API_REFERENCE.md, as they stand."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from skyrl_train.engines.base import Engine
from tests.docs.pages import REFERENCE, Example, examples, preludes, to_run
from tests.interpreters import engine_python

AnExample = Callable[[Engine], Awaitable[None]]


def test_every_python_block_is_marked() -> None:
    assert REFERENCE.read_text().count("```python") == len(examples(REFERENCE)) > 12


@pytest.mark.parametrize("example", to_run("embedded"), ids=lambda example: f"line {example.line}")
def test_an_example_runs_on_the_embedded_engine(
    example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {"__name__": "example"}
    exec(preludes("embedded"), space)
    exec(compile(example.code, f"{REFERENCE.name}:{example.line}", "exec"), space)


@pytest.mark.engines
@pytest.mark.timeout(900)
def test_the_examples_for_servers_run_on_a_real_sglang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One server for all of them: what a reader does with one each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SKYRL_SGLANG_PYTHON", str(engine_python("sglang")))
    space: dict[str, Any] = {"__name__": "example"}
    exec(preludes("server"), space)
    start, collected = space["run_on_server"], list[AnExample]()
    space["run_on_server"] = collected.append
    space["run"], run = lambda example, engine: collected.append(example), space["run"]
    # An example for both engines makes the embedded one by itself; here it gets the server.
    space["make_engine"] = lambda: None
    for example in to_run("server"):
        exec(compile(example.code, f"{REFERENCE.name}:{example.line}", "exec"), space)
    assert len(collected) == len(to_run("server")) > 3

    async def one_after_the_other(engine: Engine) -> None:
        for example in collected:
            await example(engine)

    space["run"] = run
    start(one_after_the_other)
