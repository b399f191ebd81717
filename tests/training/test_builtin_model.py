from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from skyrl_train.data.chat import render_prompt, response_text
from skyrl_train.environments import calculator
from skyrl_train.environments.arithmetic import pairs, question
from skyrl_train.errors import ConfigError
from skyrl_train.training import warm_start
from skyrl_train.training.builtin_model import CALL_WORDS, make_model, make_tokenizer, prepare_builtin


@pytest.fixture
def short_warm_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """20 steps instead of some 150, and a cache of its own."""
    monkeypatch.setattr(warm_start, "MAX_STEPS", 20)
    monkeypatch.setenv("SKYRL_TRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def quiet(step: int, total: int, metrics: Mapping[str, float]) -> None:
    pass


def test_a_tokenizer_that_was_saved_splits_text_as_the_one_that_was_trained_with(tmp_path: Path) -> None:
    """AutoTokenizer may put the architecture's own class in the place of the saved one: seen with 13 tokens as 28."""
    tokenizer = make_tokenizer()
    make_model(tokenizer, seed=0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in ("What is 23 + 48?", "Hello, wörld!\n  12+3 = 15"):
        messages = [{"role": "user", "content": text}]
        assert render_prompt(loaded, messages) == render_prompt(tokenizer, messages)
        assert response_text(loaded, loaded(text).input_ids) == text
    assert len(render_prompt(loaded, [{"role": "user", "content": question(23, 48)}])) < 20


def test_the_warm_start_lowers_the_loss_reports_it_and_is_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_start, "MAX_STEPS", 30)
    seen: list[tuple[int, int, float]] = []
    weights = []
    for _ in range(2):
        tokenizer = make_tokenizer()
        model = make_model(tokenizer, seed=1)
        warm_start.teach_form(
            model, tokenizer, seed=1, on_progress=lambda step, total, m: seen.append((step, total, m["loss"]))
        )
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    half = len(seen) // 2
    assert seen[:half] == seen[half:] and seen[half - 1][2] < 0.7 * seen[0][2]


def test_what_is_held_out_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(warm_start, "pairs", lambda split: asked.append(split) or pairs(split))
    monkeypatch.setattr(warm_start, "MAX_STEPS", 5)
    tokenizer = make_tokenizer()
    warm_start.teach_form(make_model(tokenizer, seed=0), tokenizer, seed=0, on_progress=quiet)
    assert set(asked) == {"train"}


def test_the_model_is_made_once_and_an_interrupted_one_is_not_taken_for_whole(short_warm_start: Path) -> None:
    def interrupt(step: int, total: int, metrics: Mapping[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_builtin("builtin:arithmetic", seed=3, on_progress=interrupt)
    calls: list[int] = []
    folder = prepare_builtin("builtin:arithmetic", seed=3, on_progress=lambda step, *_: calls.append(step))
    assert calls and AutoModelForCausalLM.from_pretrained(folder).num_parameters() < 1_000_000
    calls.clear()
    assert prepare_builtin("builtin:arithmetic", seed=3, on_progress=lambda step, *_: calls.append(step)) == folder
    assert not calls, "it was made again"
    assert prepare_builtin("builtin:arithmetic", seed=4, on_progress=quiet) != folder
    assert all(path.name.count(".") == 0 for path in short_warm_start.iterdir())


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(ConfigError, match="there is builtin:arithmetic"):
        prepare_builtin("builtin:geometry", seed=0, on_progress=quiet)


def test_the_calculators_model_is_shown_whole_demonstrations_and_never_a_held_out_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = make_tokenizer(CALL_WORDS)
    token_ids, labels = warm_start.CALCULATOR.encode(tokenizer, [(417, 18), (100, 10)])
    learned = [row[row != warm_start.IGNORED].tolist() for row in labels]
    assert [tokenizer.decode(ids) for ids in learned] == [
        "<calc>417*18</calc><|im_end|>7506<|im_end|>",
        "<calc>100*10</calc><|im_end|>1000<|im_end|>",
    ]
    text = tokenizer.decode(token_ids[0], skip_special_tokens=False)
    assert "</calc><|im_end|>\n<|im_start|>user\n7506<|im_end|>\n<|im_start|>assistant\n7506<|im_end|>" in text
    assert set(warm_start.CALCULATOR.problems()).isdisjoint(calculator.problems("eval"))

    seen: list[float] = []
    monkeypatch.setattr(warm_start, "MAX_STEPS", 20)
    model = make_model(tokenizer, seed=1)
    warm_start.teach_form(
        model, tokenizer, warm_start.CALCULATOR, seed=1, on_progress=lambda step, total, m: seen.append(m["loss"])
    )
    assert seen[-1] < 0.7 * seen[0]


def test_a_call_of_the_tool_is_few_tokens_and_comes_back_from_disk_as_such(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(CALL_WORDS)
    make_model(tokenizer, seed=0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    ids = loaded("<calc>417*18</calc>").input_ids
    assert ids == tokenizer("<calc>417*18</calc>").input_ids and len(ids) == 11
