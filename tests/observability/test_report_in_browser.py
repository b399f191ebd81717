"""The report in a real browser: the page is opened, clicked on, and its document read back."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from skyrl_train.observability.report import write_report
from skyrl_train.observability.rollouts import RolloutLog

from .synthetic_run import decode, make_group, write_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine (.ci/run installs it)")

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


def in_browser(report: Path, script: str, tmp_path: Path, *, width: int = 1280) -> Any:
    """Open a copy of the page, run `script` (the body of an async function) in it, and give back what it returns."""
    driver = (
        "<script>setTimeout(async () => { let result; try { result = await (async () => {"
        + script
        + "})(); } catch (error) { result = {error: String(error)}; }"
        " const out = document.createElement('pre'); out.id = 'result'; out.textContent = JSON.stringify(result);"
        " document.body.append(out); }, 100)</script></body>"
    )
    copy = tmp_path / "driven.html"
    copy.write_text(report.read_text(encoding="utf-8").replace("</body>", driver), encoding="utf-8")
    profile = tmp_path / "profile"
    shutil.rmtree(profile, ignore_errors=True)
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},900"]
    command += ["--virtual-time-budget=5000", "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    match = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match is not None, f"exit {done.returncode}: {done.stdout[-2000:]} {done.stderr[-2000:]}"
    return json.loads(html.unescape(match[1]))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_run(tmp_path_factory.mktemp("runs") / "quickstart", steps=60))


def test_the_page_shows_the_run(report: Path, tmp_path: Path) -> None:
    seen = in_browser(
        report,
        """
        const texts = (selector) => [...document.querySelectorAll(selector)].map((e) => e.textContent);
        const shapes = (chart) => chart.querySelectorAll("svg path, svg rect:not(.hit)").length;
        const labels = (chart) => chart.querySelectorAll("svg text").length;
        const cards = [...document.querySelectorAll("#charts .chart")];
        const drawn = cards.map((card) => [card.dataset.chart, shapes(card), labels(card)]);
        return {
          ready: document.documentElement.dataset.ready, title: document.title,
          heading: texts("h1"), tiles: texts(".tile"), drawn,
          rows: texts("#config-view tbody tr"), prompts: texts(".prompt .text"),
          fetched: performance.getEntriesByType("resource").map((r) => r.name),
          overflow: document.documentElement.scrollWidth - window.innerWidth,
        };
        """,
        tmp_path,
    )
    assert seen["ready"] == "true"
    assert seen["title"] == "quickstart · skyrl_train"
    assert seen["heading"] == ["quickstart"]
    assert seen["tiles"][0].startswith("Held-out accuracy33.0% → 97.8%+64.8 points")
    assert [tile[:5] for tile in seen["tiles"][1:]] == ["Mean ", "Steps", "Time ", "Token", "Rollo"]
    assert seen["tiles"][2].startswith("Steps60")
    names = [name for name, _, _ in seen["drawn"]]
    assert names == [
        "reward/mean",
        "eval/accuracy",
        "policy/loss",
        "policy/ref_kl",
        "policy/entropy",
        "policy/grad_norm",
        "throughput/rollout_tokens_per_s",
        "phases",
    ]
    # Each chart has a curve, and labels on both axes.
    assert all(shapes >= 1 and labels >= 4 for _, shapes, labels in seen["drawn"]), seen["drawn"]
    assert "trainer.seed7" in "".join(seen["rows"])
    assert len(seen["prompts"]) == 4 and all(re.fullmatch(r"\d\d\+\d\d=", prompt) for prompt in seen["prompts"])
    assert seen["fetched"] == []
    assert seen["overflow"] <= 0


def test_hovering_shows_values_and_a_click_brings_up_the_rollouts_of_that_step(report: Path, tmp_path: Path) -> None:
    seen = in_browser(
        report,
        """
        const chart = document.querySelector('[data-chart="reward/mean"]');
        const hit = chart.querySelector(".hit").getBoundingClientRect();
        const at = { clientX: hit.left + hit.width / 2, clientY: hit.top + 20, bubbles: true };
        chart.querySelector(".hit").dispatchEvent(new PointerEvent("pointermove", at));
        const tip = chart.querySelector(".tip");
        const cursors = [...document.querySelectorAll(".chart .cursor")];
        const hovered = { text: tip.textContent, visible: getComputedStyle(tip).visibility,
          others: cursors.filter((c) => c.style.visibility === "visible").length };
        chart.querySelector(".hit").dispatchEvent(new MouseEvent("click", at));
        const step = document.querySelector(".step-name").textContent;
        chart.querySelector(".hit").dispatchEvent(new PointerEvent("pointerleave"));
        return { hovered, step, left: getComputedStyle(tip).visibility };
        """,
        tmp_path,
    )
    assert re.fullmatch(r"step 30Reward0\.\d+", seen["hovered"]["text"])
    assert seen["hovered"]["visible"] == "visible" and seen["left"] == "hidden"
    # One cursor runs through all eight charts.
    assert seen["hovered"]["others"] == 8
    assert seen["step"] == "step 30"


def test_rollouts_are_browsed_by_step_kind_reward_and_text(report: Path, tmp_path: Path) -> None:
    seen = in_browser(
        report,
        """
        const $1 = (selector) => document.querySelector("#rollout-view " + selector);
        const now = () => ({ step: $1(".step-name").textContent, count: $1(".count").textContent,
          pills: [...document.querySelectorAll("#rollout-view .pill")].map((p) => p.textContent) });
        const set = (element, value, event) => { element.value = value; element.dispatchEvent(new Event(event)); };
        const out = { start: now() };
        $1('[title="Earlier step"]').click(); out.back = now();
        set($1('input[type="range"]'), 0, "input"); out.first = now();
        set($1("select"), "zero", "change"); out.zero = now();
        set($1("select"), "all", "change");
        $1('[data-kind="eval"]').click(); out.held = now();
        $1('[data-kind="train"]').click();
        const query = $1(".prompt .text").textContent;
        set($1('input[type="search"]'), query, "input"); out.found = now();
        set($1('input[type="search"]'), "no such text", "input"); out.none = now();
        out.message = $1(".empty").textContent;
        set($1('input[type="search"]'), "", "input");
        $1('label input').click(); out.everywhere = now();
        out.more = $1(".more").textContent;
        out.groups = document.querySelectorAll(".group").length;
        $1(".more").click(); out.groupsAfter = document.querySelectorAll(".group").length;
        return out;
        """,
        tmp_path,
    )
    assert seen["start"]["step"] == "step 60" and seen["start"]["count"] == "16 rollouts"
    assert seen["back"]["step"] == "step 59"
    assert seen["first"]["step"] == "step 1"
    wrong = seen["first"]["pills"].count("0")
    assert 0 < wrong < 16
    assert seen["zero"]["pills"] == ["0"] * wrong
    assert seen["zero"]["count"] == f"{wrong} of 16 rollouts"
    assert seen["held"]["step"] == "step 60" and len(seen["held"]["pills"]) == 8
    assert len(seen["found"]["pills"]) == 4
    assert seen["none"]["pills"] == [] and seen["message"] == "No rollout matches."
    assert seen["everywhere"]["count"] == f"{60 * 16} rollouts"
    assert (seen["groups"], seen["groupsAfter"], seen["more"]) == (20, 40, "Show more (220 prompts)")


def test_a_sample_opens_to_its_tokens_and_their_probabilities(report: Path, tmp_path: Path) -> None:
    seen = in_browser(
        report,
        """
        const button = document.querySelector(".sample > button");
        button.click();
        const spans = [...document.querySelectorAll(".detail .tokens span")];
        const out = { answer: button.querySelector(".answer").textContent, tokens: spans.map((s) => s.textContent),
          title: spans[0].title, facts: document.querySelector(".detail .row").textContent,
          open: button.getAttribute("aria-expanded") };
        button.click();
        out.closed = document.querySelectorAll(".detail").length;
        return out;
        """,
        tmp_path,
    )
    assert "".join(seen["tokens"]) == seen["answer"]
    # The logprob is -0.25: e^-0.25 is 77.9 %.
    assert re.fullmatch(r"token \d+ · p 77\.9% · logprob \N{MINUS SIGN}0\.250", seen["title"])
    assert "id 60-0/0/0" in seen["facts"] and "policy version 0" in seen["facts"]
    assert (seen["open"], seen["closed"]) == ("true", 0)


def test_all_metrics_and_all_keys_can_be_opened_and_the_theme_changed(report: Path, tmp_path: Path) -> None:
    seen = in_browser(
        report,
        """
        const open = document.querySelectorAll("#metric-view .chart").length;
        document.querySelectorAll("#metric-view details").forEach((d) => { d.open = true; });
        await new Promise((done) => setTimeout(done, 300));
        const shown = [...document.querySelectorAll("#metric-view .chart")];
        const names = shown.map((chart) => chart.querySelector(".name").textContent);
        const curves = shown.filter((chart) => chart.querySelector("svg path")).length;
        const changed = document.querySelectorAll("#config-view tbody tr").length;
        document.querySelectorAll("#config-view .segments button")[1].click();
        const all = document.querySelectorAll("#config-view tbody tr").length;
        const themes = [];
        for (let i = 0; i < 3; i++) {
          const button = document.getElementById("theme");
          button.click();
          const background = getComputedStyle(document.body).backgroundColor;
          themes.push([button.textContent, document.documentElement.dataset.theme, background]);
        }
        return { open, names, curves, changed, all, themes };
        """,
        tmp_path,
    )
    assert seen["open"] == 0
    assert len(seen["names"]) == 19 and "policy/clip_frac" in seen["names"]
    assert seen["curves"] == 19
    assert 0 < seen["changed"] < seen["all"] == 9
    assert [theme[:2] for theme in seen["themes"]] == [["Light", "light"], ["Dark", "dark"], ["Auto", "light"]]
    assert seen["themes"][0][2] == "rgb(246, 247, 249)" and seen["themes"][1][2] == "rgb(14, 17, 22)"


def test_a_narrow_window_needs_no_sideways_scrolling(report: Path, tmp_path: Path) -> None:
    seen = in_browser(
        report,
        """
        document.querySelectorAll(".sample > button").forEach((b) => b.click());
        document.querySelectorAll("#metric-view details").forEach((d) => { d.open = true; });
        await new Promise((done) => setTimeout(done, 300));
        return { window: window.innerWidth, page: document.documentElement.scrollWidth };
        """,
        tmp_path,
        width=500,
    )
    assert seen["page"] <= seen["window"] <= 500


def test_markup_in_rollouts_is_shown_as_text_and_never_run(tmp_path: Path) -> None:
    evil = '</script><script>window.ran = 1</script><img src=x onerror="window.ran = 2"><b>bold</b>'
    run = write_run(tmp_path / "run", steps=1)

    def decode_evil(token_ids: Any) -> str:
        return evil if len(token_ids) > 1 else decode(token_ids)

    RolloutLog(run / "rollouts", decode_evil).write(1, [make_group("<i>", evil, ["xy"], [1.0], target=evil)])
    (run / "config.yaml").write_text(json.dumps({"trainer": {"run_name": evil}}))
    seen = in_browser(
        write_report(run),
        """
        document.querySelector(".sample > button").click();
        return { ran: window.ran === undefined, ready: document.documentElement.dataset.ready,
          prompt: document.querySelector(".prompt .text").textContent,
          answer: document.querySelector(".answer").textContent,
          bold: document.querySelectorAll(".group b b, .answer b, .text b, img").length };
        """,
        tmp_path,
    )
    assert seen == {"ran": True, "ready": "true", "prompt": evil, "answer": evil, "bold": 0}


@pytest.mark.parametrize("steps", [0, 1])
def test_an_empty_and_a_one_step_run_have_a_whole_page(tmp_path: Path, steps: int) -> None:
    run = write_run(tmp_path / "run", steps=1)
    if steps == 0:
        (run / "metrics.jsonl").write_text("")
        shutil.rmtree(run / "rollouts")
    seen = in_browser(
        write_report(run),
        """
        return { ready: document.documentElement.dataset.ready,
          empty: [...document.querySelectorAll(".empty")].map((e) => e.textContent),
          charts: document.querySelectorAll("#charts svg").length,
          bad: /NaN|undefined|Infinity/.test(document.querySelector("main").innerHTML) };
        """,
        tmp_path,
    )
    assert seen["ready"] == "true" and not seen["bad"]
    assert seen["charts"] == (8 if steps else 0)
    assert seen["empty"] == (
        [] if steps else ["No step was logged yet.", "No rollouts were recorded.", "No metrics yet."]
    )
