from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from skyrl_train.errors import DataError
from skyrl_train.observability.report import render_page, write_report
from skyrl_train.observability.report.collect import MAX_POINTS, MAX_ROLLOUT_FILES, MAX_TEXT, collect, thin
from skyrl_train.observability.rollouts import RolloutLog
from skyrl_train.observability.trackers import JsonlTracker

from .synthetic_run import arithmetic_groups, decode, make_group, write_run


def page_data(page: str) -> dict[str, Any]:
    """The data as the page's script reads it: what stands before the first end of the script element."""
    match = re.search(r'<script type="application/json" id="data">(.*?)</script', page, re.DOTALL)
    assert match is not None
    data: dict[str, Any] = json.loads(match[1])
    return data


def test_a_series_above_the_limit_becomes_means_with_their_range() -> None:
    assert thin([1, 2, 3, 4], [1, 3, 5, 9], limit=2) == {"s": [2, 4], "v": [2, 7], "lo": [1, 5], "hi": [3, 9]}
    assert thin([1, 2], [0.123456789, 3], limit=2) == {"s": [1, 2], "v": [0.123457, 3]}
    assert thin([], []) == {"s": [], "v": []}


def test_the_summary_counts_all_steps(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker.log(0, {"eval/accuracy": 0.3, "timing/step_s": 1.0})
    tracker.log(1, {"reward/mean": 0.2, "rollout/num_tokens": 100, "timing/rollout_s": 2.0, "timing/step_s": 3.0})
    tracker.log(2, {"reward/mean": 0.6, "rollout/num_tokens": 300, "timing/rollout_s": 3.0, "timing/step_s": 4.0})
    tracker.log(3, {"eval/accuracy": 0.9, "memory/peak_rss_bytes": 1000, "timing/step_s": 2.0})
    tracker.close()
    assert collect(tmp_path)["summary"] == {
        "num_steps": 3,
        "accuracy": {"first": 0.3, "last": 0.9, "best": 0.9},
        "reward": {"first": 0.2, "last": 0.6, "best": 0.6},
        "seconds": 10.0,
        "tokens": 400,
        "tokens_per_s": 80.0,
        "peak_bytes": 1000,
    }


def test_phases_are_aligned_and_time_between_them_is_shown(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker.log(
        1, {"timing/rollout_s": 1.0, "timing/train_s": 2.0, "timing/train/forward_s": 1.0, "timing/step_s": 3.5}
    )
    tracker.log(2, {"timing/rollout_s": 1.0, "timing/evaluate_s": 4.0, "timing/step_s": 5.0})
    tracker.close()
    assert collect(tmp_path)["phases"] == {
        "steps": [1, 2],
        "names": ["rollout", "train", "evaluate", "other"],
        "seconds": [[1.0, 1.0], [2.0, 0.0], [0.0, 4.0], [0.5, 0.0]],
        "totals": [2.0, 2.0, 4.0, 0.5],
    }


def test_a_run_of_ten_thousand_steps_makes_a_page_of_a_few_megabytes(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = (
        json.dumps({"step": step, "reward/mean": rng.random(), "loss": None, "timing/rollout_s": 1.5}) + "\n"
        for step in range(1, 10_001)
    )
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    log = RolloutLog(tmp_path / "rollouts", decode)
    for step in range(1, 301):
        log.write(step, arithmetic_groups(rng, step, 0.5))
    data = collect(tmp_path)
    reward = data["series"]["reward/mean"]
    assert len(reward["s"]) == len(reward["hi"]) == MAX_POINTS
    assert reward["s"][-1] == 10_000
    assert "loss" not in data["series"]
    assert data["summary"]["num_steps"] == 10_000
    steps = [file["step"] for file in data["rollouts"]["files"]]
    assert (len(steps), steps[0], steps[-1]) == (MAX_ROLLOUT_FILES, 1, 300)
    assert data["rollouts"]["num_recorded"] == 300
    assert write_report(tmp_path).stat().st_size < 3_000_000


def test_rollouts_larger_than_the_budget_are_left_out_but_for_a_spread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, steps=40)
    monkeypatch.setattr("skyrl_train.observability.report.collect.MAX_ROLLOUT_BYTES", 60_000)
    data = collect(tmp_path)
    train = [file["step"] for file in data["rollouts"]["files"] if file["kind"] == "train"]
    assert 1 < len(train) < 20
    assert (train[0], train[-1]) == (1, 40)
    assert data["rollouts"]["num_recorded"] == 44
    sizes = [(tmp_path / "rollouts" / f"step_{step:06d}.jsonl").stat().st_size for step in train]
    assert sum(sizes) <= 45_000


def test_text_that_looks_like_markup_or_a_placeholder_stays_text(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><!-- %%DATA%% ]]> \u2028 \\u003c"
    write_run(tmp_path, steps=1)
    group = make_group("</script>", evil, [evil], [1.0], target=evil)

    def decode_evil(token_ids: Any) -> str:
        return evil if len(token_ids) > 1 else "</script>"

    RolloutLog(tmp_path / "rollouts", decode_evil).write(1, [group])
    (tmp_path / "config.yaml").write_text("trainer:\n  run_name: '</script><b>'\n")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert page.count("<script") == page.count("</script>") == 2
    assert "alert(1)</script>" not in page
    (record,) = page_data(page)["rollouts"]["files"][0]["records"]
    assert record["response"] == record["prompt"][0]["content"] == record["target"] == evil
    assert record["turns"][0]["tokens"][0] == "</script>"
    assert page_data(page)["config"][0]["value"] == "</script><b>"


def test_the_name_of_the_run_is_escaped_in_the_title(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a & <b>", steps=1)
    assert "<title>a &amp; &lt;b&gt; · skyrl_train</title>" in write_report(folder).read_text(encoding="utf-8")


def test_the_page_fetches_nothing(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path, steps=2)).read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert not re.search(r"<(link|img|iframe|script[^>]+src)\b", page)
    assert set(re.findall(r"https?://[^\s\"']+", page)) == {"http://www.w3.org/2000/svg"}
    assert "@import" not in page and "url(" not in page


def test_a_run_that_has_only_a_configuration_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("trainer:\n  seed: 7\n")
    data = page_data(write_report(tmp_path).read_text(encoding="utf-8"))
    assert data["series"] == {} and data["rollouts"] == {"files": [], "num_recorded": 0}
    assert data["summary"] == {"num_steps": 0}
    assert data["facts"] == {"seed": "7"}


def test_keys_that_differ_from_their_default_say_so(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("trainer:\n  seed: 7\n  logger: [jsonl]\ngenerator:\n  backend: embedded\n")
    entries = {entry["key"]: entry for entry in collect(tmp_path)["config"]}
    assert entries["trainer.logger"] == {
        "key": "trainer.logger",
        "value": '["jsonl"]',
        "default": '["console", "jsonl", "tensorboard"]',
    }
    assert "default" in entries["trainer.seed"]
    assert entries["generator.backend"] == {"key": "generator.backend", "value": "embedded"}


def test_what_can_not_be_read_is_told_on_the_page(tmp_path: Path) -> None:
    write_run(tmp_path, steps=1)
    with (tmp_path / "rollouts" / "step_000001.jsonl").open("a") as file:
        file.write('{"cut')
    (tmp_path / "config.yaml").write_text("a: [")
    problems = collect(tmp_path)["problems"]
    assert "config.yaml can't be read" in problems[0]
    assert "step_000001.jsonl, line 17 is not JSON" in problems[1]


def test_values_that_were_not_finite_are_named(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    for step in range(1, 31):
        tracker.log(step, {"policy/loss": float("nan"), "reward/mean": 0.5})
    tracker.close()
    data = collect(tmp_path)
    assert data["nonfinite"]["count"] == 30
    assert data["nonfinite"]["named"][0] == "policy/loss was nan at step 1"
    assert len(data["nonfinite"]["named"]) == 20
    json.dumps(data, allow_nan=False)
    assert render_page(data)


def test_long_texts_are_cut_and_say_so(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    group = make_group("1", "q", ["x" * (MAX_TEXT + 1234)], [1.0])
    RolloutLog(tmp_path / "rollouts", decode, tokens=False).write(1, [group])
    (record,) = collect(tmp_path)["rollouts"]["files"][0]["records"]
    assert record["response"].endswith("x … (1,234 more characters in the rollouts file)")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not the folder of a run: neither config\.yaml nor metrics\.jsonl"):
        write_report(tmp_path)


def test_the_command_writes_the_report_and_says_where(tmp_path: Path) -> None:
    write_run(tmp_path / "quickstart", steps=3)
    command = [sys.executable, "-m", "skyrl_train.observability.report"]
    done = subprocess.run([*command, str(tmp_path / "quickstart")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path}/quickstart/report.html\n", "")
    shutil.rmtree(tmp_path / "quickstart")
    done = subprocess.run([*command, str(tmp_path / "quickstart")], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "is not the folder of a run" in done.stderr
