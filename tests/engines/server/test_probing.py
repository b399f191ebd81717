"""The long question to an engine's interpreter is asked once for each state of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from skyrl_train.engines.server.probing import probe
from skyrl_train.errors import ConfigError


def package(site: Path, name: str, release: str) -> dict[str, str]:
    """An installed package of this name, on PYTHONPATH."""
    (site / name).mkdir(parents=True, exist_ok=True)
    (site / name / "__init__.py").touch()
    info = site / f"{name}-{release}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n")
    return {"PYTHONPATH": str(site)}


def script(path: Path, asked: Path, answer: str) -> Path:
    path.write_text(f"open({str(asked)!r}, 'a').write('x')\nprint('noise')\nprint({answer!r})\n")
    return path


def test_an_answer_is_kept_until_the_release_or_the_question_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKYRL_TRAIN_CACHE", str(tmp_path / "cache"))
    asked = tmp_path / "asked"
    environment = package(tmp_path / "site", "enginelike", "1.0")
    question = script(tmp_path / "probe.py", asked, '{"release": "1.0", "options": {}}')

    def ask() -> dict[str, object]:
        return probe(sys.executable, environment, package="enginelike", title="EngineLike", script=question)

    assert ask() == ask() == {"release": "1.0", "options": {}}
    assert asked.read_text() == "x"
    script(question, asked, '{"release": "1.0", "options": {"a": null}}')
    assert ask() == {"release": "1.0", "options": {"a": None}}
    assert asked.read_text() == "xx"
    (tmp_path / "site" / "enginelike-1.0.dist-info").rename(tmp_path / "site" / "enginelike-1.1.dist-info")
    (tmp_path / "site" / "enginelike-1.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: enginelike\nVersion: 1.1\n"
    )
    ask()
    assert asked.read_text() == "xxx"


def test_what_can_t_be_asked_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYRL_TRAIN_CACHE", str(tmp_path / "cache"))
    broken = tmp_path / "probe.py"
    broken.write_text("import no_such_engine\n")
    with pytest.raises(ConfigError, match=r"EngineLike can't be imported there .*no_such_engine"):
        probe(sys.executable, {}, package="enginelike", title="EngineLike", script=broken)
    with pytest.raises(ConfigError, match=r"engine_python=/no/such/python can't be run"):
        probe("/no/such/python", {}, package="enginelike", title="EngineLike", script=broken)
