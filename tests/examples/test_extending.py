"""The examples of docs/EXTENDING.md: short, shown as they are, and run by the main job from a folder outside."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from skyrl_train.observability.metrics import Row, read_metrics

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "extending"
DOCUMENT = ROOT / "docs" / "EXTENDING.md"
BLOCK = re.compile(r"<!-- file: (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)


def test_the_document_shows_every_example_as_it_is() -> None:
    shown = dict(BLOCK.findall(DOCUMENT.read_text()))
    files = {path.name: f"```python\n{path.read_text()}```\n" for path in EXAMPLES.glob("*.py")}
    assert shown == files


def test_every_example_is_under_thirty_lines() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert len(lengths) == 6 and max(lengths.values()) < 30, lengths


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somebody's own folder: the examples, some rows, a model that knows a little."""
    from skyrl_train.recipes.sft import main
    from skyrl_train.training.builtin_model import make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("outside")
    for path in EXAMPLES.glob("*.py"):
        shutil.copy(path, folder)
    rows = [
        f'{{"prompt": "What is {a} + {a + 7}?", "reward_spec": {{"ground_truth": "{2 * a + 7}"}}}}'
        for a in range(10, 26)
    ]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    make_model(make_tokenizer(), seed=0).save_pretrained(folder / "fresh")
    make_tokenizer().save_pretrained(folder / "fresh")
    taught = main(
        [
            f"trainer.policy.model.path={folder / 'fresh'}",
            f"trainer.run_path={folder / 'sft'}",
            f"trainer.export_path={folder / 'model'}",
            "trainer.max_steps=60",
            "trainer.train_batch_size=64",
            "trainer.eval_interval=-1",
            "trainer.ckpt_interval=-1",
            "trainer.policy.optimizer_config.scheduler=constant",
            "trainer.policy.optimizer_config.lr=2e-3",
        ]
    )
    assert taught == 0
    (folder / "mine.yaml").write_text(
        "trainer:\n"
        "  policy: {model: {path: model}, optimizer_config: {lr: 1.0e-3}}\n"
        "  train_batch_size: 8\n"
        "  max_steps: 2\n"
        "  eval_interval: -1\n"
        "  ckpt_interval: -1\n"
        "generator: {n_samples_per_prompt: 4, sampling_params: {max_generate_length: 6}}\n"
    )
    return folder


def command(folder: Path, name: str, *settings: str) -> subprocess.CompletedProcess[str]:
    """`python -m ...` as somebody types it there: nothing but the current directory is on the path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [
            *(sys.executable, "-m", "skyrl_train.entrypoints.main_base", "--config-path", ".", "--config-name", "mine"),
            f"trainer.run_name={name}",
            *settings,
        ],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def steps_of(folder: Path, name: str, *settings: str) -> list[Row]:
    """The metrics of two steps that moved the weights."""
    done = command(folder, name, *settings)
    assert done.returncode == 0, done.stderr
    run_path = folder / "runs" / name
    before, after = (load_file(path / "model.safetensors") for path in (folder / "model", run_path / "export"))
    assert any(not before[key].equal(after[key]) for key in after)
    return [row for row in read_metrics(run_path / "metrics.jsonl") if row["step"] > 0]


def test_an_estimator(folder: Path) -> None:
    rows = steps_of(
        folder,
        "estimator",
        "environment.reward=my_reward.closeness",
        "trainer.algorithm.advantage_estimator=my_estimator.median_baseline",
        "trainer.algorithm.gamma=0.5",
    )
    assert all(row["advantage/std"] > 0 for row in rows)


def test_a_loss(folder: Path) -> None:
    rows = steps_of(
        folder,
        "loss",
        "environment.reward=my_reward.closeness",
        "trainer.algorithm.policy_loss_type=my_loss:quadratic_trust_region",
        "trainer.update_epochs_per_batch=2",
    )
    assert all(row["policy/trust_penalty"] > 0 for row in rows)


def test_a_reward_for_the_built_in_rows_and_for_files(folder: Path) -> None:
    built_in = steps_of(folder, "reward", "environment.reward=my_reward.closeness")
    files = steps_of(folder, "reward-files", "environment.reward=my_reward.closeness", "data.train_data=[rows.jsonl]")
    assert all(0 < row["reward/mean"] < 1 and row["reward/std"] > 0 for row in (*built_in, *files))


def test_an_environment(folder: Path) -> None:
    rows = steps_of(
        folder, "environment", "environment.env_class=my_environment:DigitByDigit", "data.train_data=[rows.jsonl]"
    )
    assert all(0 < row["reward/mean"] < 1 for row in rows)


def test_a_generator(folder: Path) -> None:
    rows = steps_of(
        folder, "generator", "generator.agent=my_generator.AskTwice", "environment.reward=my_reward.closeness"
    )
    assert all(row["rollout/num_trajectories"] == 32 and row["reward/mean"] > 0 for row in rows)
    # Two answers of up to 6 tokens, and the second prompt holds the first one.
    assert rows[0]["train/num_loss_tokens"] > 32 * 2


def test_a_logit_processor(folder: Path) -> None:
    nine = 27  # what the built-in tokenizer writes for it
    rows = steps_of(
        folder,
        "processor",
        "environment.reward=my_reward.closeness",
        "generator.custom_logit_processor.enabled=true",
        "generator.sampling_params.logit_processor=my_processor.at_most",
        f"generator.sampling_params.logit_processor_kwargs={{token_id: {nine}, times: 1}}",
        "generator.sampling_params.ignore_eos=true",
    )
    assert rows[0]["rollout/num_trajectories"] == 32
    lines = (folder / "runs" / "processor" / "rollouts" / "step_000001.jsonl").read_text().splitlines()
    answers = [turn["token_ids"] for line in lines for turn in json.loads(line)["turns"]]
    assert len(answers) == 32 and all(len(answer) == 6 for answer in answers)
    assert {answer.count(nine) for answer in answers} == {0, 1}


def test_tree_search_over_sessions_of_an_environment_of_several_turns(folder: Path) -> None:
    rows = steps_of(
        folder,
        "search",
        "generator.agent=skyrl_train.rollout.tree_search.TreeSearch",
        "generator.sessions.enabled=true",
        "generator.max_turns=4",
        "generator.n_samples_per_prompt=2",
        "trainer.train_batch_size=2",
        "environment.env_class=my_environment:DigitByDigit",
        "data.train_data=[rows.jsonl]",
    )
    for row in rows:
        assert row["rollout/num_trajectories"] == 4 and row["environment/search_nodes"] == 64
        # All that was sampled is trained on, once: the nodes, not the best paths alone.
        assert row["train/num_loss_tokens"] == row["rollout/num_tokens"]
        assert row["advantage/abs_max"] > 0 and row["policy/grad_norm"] > 0


BROKEN = """
import torch
from skyrl_train.algorithms.policy_losses import TokenLosses

def old_signature(rewards, group_index, loss_mask): return rewards
def one_a_trajectory(inputs): return inputs.scores
def needs_beta(inputs, *, beta): return inputs.rewards
def reduced(inputs): return TokenLosses(values=(-inputs.logprobs * inputs.advantages).mean())
def detached(inputs): return TokenLosses(values=-inputs.logprobs.detach() * inputs.advantages)
def tensor(inputs): return -inputs.logprobs * inputs.advantages
def says_yes(response): return "yes"
def unknown_argument(response, judge): return 1.0
async def later(response): return 1.0
def other_names(scores): ...
class NoRun:
    def render(self, prompt): return ()
class WantsCritic:
    def __init__(self, *, critic): ...
    def render(self, prompt): return ()
    async def run(self, trajectory_id, prompt, prompt_token_ids, sampling): ...
class Raises:
    def __init__(self, *, generate): ...
    def render(self, prompt): return (1, 2)
    async def run(self, trajectory_id, prompt, prompt_token_ids, sampling): raise KeyError("no such tool")
number = 3
"""

ESTIMATOR, LOSS = "trainer.algorithm.advantage_estimator", "trainer.algorithm.policy_loss_type"
PROCESSOR = "generator.sampling_params.logit_processor"


@pytest.mark.parametrize(
    ("setting", "messages"),
    [
        (f"{ESTIMATOR}=broken.nothing", ["'broken.nothing' can't be imported", "has no 'nothing'"]),
        (f"{ESTIMATOR}=no_such_module.f", ["'no_such_module.f' can't be imported", "ModuleNotFoundError"]),
        (f"{ESTIMATOR}=broken.number", ["'broken.number' is a int, not a function"]),
        (f"{ESTIMATOR}=broken.old_signature", ["f(rewards, group_index, loss_mask)", "wanted: f(inputs: AdvantageInp"]),
        (f"{ESTIMATOR}=broken.one_a_trajectory", ["a tensor [4] of torch.float32 for 12 loss tokens"]),
        (f"{ESTIMATOR}=broken.needs_beta", ["required keyword-only argument: 'beta'", "options of trainer.algorithm"]),
        (f"{LOSS}=broken.reduced", ["values is a tensor [] of torch.float32 for 12 loss tokens", "Don't reduce"]),
        (f"{LOSS}=broken.detached", ["carry no gradient"]),
        (f"{LOSS}=broken.tensor", ["returned a tensor [12] of torch.float32; wanted: f(inputs: LossInputs"]),
        ("environment.reward=broken.unknown_argument", ["nobody gives it judge", "messages, response, target, extras"]),
        ("environment.reward=broken.later", ["is a coroutine function"]),
        ("environment.reward=broken.number", ["is a int"]),
        ("environment.reward=reward", ["'reward' is no dotted path"]),
        (
            f"{PROCESSOR}=broken.nothing generator.custom_logit_processor.enabled=true",
            ["logit processor 'broken.nothing' can't be imported"],
        ),
        (
            f"{PROCESSOR}=broken.other_names generator.custom_logit_processor.enabled=true",
            ["'broken.other_names' takes (scores)", "write it as def name(logits, prompt, answer, **arguments)"],
        ),
        (f"{PROCESSOR}=broken.number", ["logit_processor=broken.number", "needs generator.custom_logit_processor.en"]),
        ("generator.agent=broken.NoRun", ["'broken.NoRun' is NoRun; wanted: a class", "async run"]),
        ("generator.agent=broken.WantsCritic", ["wants 'critic', and nobody gives it that; known: generate"]),
    ],
)
def test_what_can_not_be_used_is_refused_before_a_model_is_loaded(
    folder: Path, setting: str, messages: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from skyrl_train.entrypoints.main_base import main

    (folder / "broken.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(folder)
    # A model that can't be loaded: what is said about the function comes first.
    (folder / "hollow").mkdir(exist_ok=True)
    model = folder / ("model" if "WantsCritic" in setting else "hollow")
    (folder / "hollow" / "config.json").write_text('{"model_type": "qwen2"}')
    argv = [*setting.split(), f"trainer.policy.model.path={model}", f"trainer.run_path={folder / 'runs' / 'refused'}"]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert all(message in said for message in messages), said


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("environment.reward=broken.says_yes", "TypeError: broken.says_yes returned 'yes' (str); a number is wanted"),
        ("generator.agent=broken.Raises", "KeyError: 'no such tool'"),
    ],
)
def test_what_goes_wrong_in_a_trajectory_stops_the_run_by_name(folder: Path, setting: str, message: str) -> None:
    (folder / "broken.py").write_text(BROKEN)
    done = command(folder, "wrong", setting)
    assert done.returncode == 3, done.stderr
    assert "32 of 32 trajectories failed" in done.stderr and message in done.stderr


def test_a_reward_and_an_environment_at_once_are_refused(folder: Path) -> None:
    done = command(folder, "both", "environment.reward=my_reward.closeness", "environment.env_class=gsm8k")
    assert done.returncode == 2
    assert "both score the answers; keep one of them" in done.stderr
