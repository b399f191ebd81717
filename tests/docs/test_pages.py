"""What the pages name is there: commands run, links lead somewhere, keys and functions exist."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from skyrl_train.config.keys import schema_groups, schema_keys
from skyrl_train.entrypoints.main_base import main
from tests.docs.pages import (
    PAGES,
    REFERENCE,
    ROOT,
    anchors,
    code_words,
    links,
    main_commands,
    make_targets,
    modules_run,
    name_of,
)

ENGINE_PAGES = [
    page for page in PAGES if "SGLANG" in page.name or page.name in ("API_REFERENCE.md", "BACKEND_SELECTION.md")
]
COMMANDS = sorted({(name_of(page), tuple(command)) for page in PAGES for command in main_commands(page)})


def test_there_is_something_to_check() -> None:
    assert len(PAGES) > 12 and len(COMMANDS) > 20
    assert sum(len(links(page)) for page in PAGES) > 80


@pytest.mark.parametrize(
    ("page", "command"), [pytest.param(*one, id=f"{one[0]}: {' '.join(one[1])[:60]}") for one in COMMANDS]
)
def test_a_command_of_the_main_job_is_a_configuration(
    page: str, command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is run with --explain, which starts nothing, where the page has its reader: at the root of a clone."""
    for folder in ("examples", "docs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    shutil.copy(ROOT / "examples/sglang/sglang_full_config_example.yaml", tmp_path / "my_config.yaml")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").write_text("trainer: {seed: 3}\n")
    monkeypatch.chdir(tmp_path)
    if page == "docs/EXTENDING.md":
        monkeypatch.chdir(ROOT / "examples" / "extending")
    said, wrong = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong):
        code = main([*command, "--explain"])
    assert code == 0, f"{page}: {' '.join(command)}: {wrong.getvalue()}"
    assert "configuration:" in said.getvalue() or "--config-path DIR" in said.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_modules_that_commands_run_exist(page: Path) -> None:
    ours = [name for name in modules_run(page) if name.split(".")[0] in ("skyrl_train", "benchmarks")]
    assert [name for name in ours if importlib.util.find_spec(name) is None] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    broken = []
    for link in links(page):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert make_targets(page) - targets == set()


@pytest.mark.parametrize("page", ENGINE_PAGES, ids=name_of)
def test_keys_in_backticks_are_keys(page: Path) -> None:
    """`generator.max_turns`, and also with a value; groups and what a mapping may hold are fine."""
    known = {*schema_keys(), *schema_groups()}
    free = ("generator.engine_init_kwargs.", "generator.engine_environment.")
    wrong = []
    for word in code_words(page):
        path = re.match(r"(?:generator|trainer|environment|data)\.[a-z0-9_.]+", word)
        if path and path[0].rstrip(".") not in known and not path[0].startswith(free):
            wrong.append(path[0])
    # In the column of messages a page may show keys that are wrong on purpose.
    assert sorted(set(wrong) - {"generator.max_num_seq"}) == []


@pytest.mark.parametrize("page", ENGINE_PAGES, ids=name_of)
def test_names_of_the_package_exist(page: Path) -> None:
    assert [word for word in code_words(page) if word.startswith("skyrl_train.") and not _exists(word)] == []


def test_the_reference_has_sections_1_to_36_with_sessions_at_23_and_observability_at_33() -> None:
    headings = re.findall(r"^## (\d+)\. (.+)$", REFERENCE.read_text(), re.MULTILINE)
    assert [int(number) for number, _ in headings] == list(range(1, 37))
    names = {int(number): title for number, title in headings}
    assert names[23] == "Sessions" and names[33] == "Observability"
    listed = re.findall(r"(\d+) \[([^\]]+)\]\(#", REFERENCE.read_text().split("\n## ")[0])
    assert {int(number): title for number, title in listed} == names


def _exists(word: str) -> bool:
    """`skyrl_train.a.b.name`, with or without a call behind it."""
    parts = re.match(r"[\w.]+", word)[0].rstrip(".").split(".")  # type: ignore[index]
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False
