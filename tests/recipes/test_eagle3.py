"""Training a draft head with the recipe: what it learns, resuming, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from skyrl_train.engines.embedded.config import EmbeddedConfig
from skyrl_train.engines.embedded.core import EngineCore
from skyrl_train.engines.embedded.drafts.eagle.drafter import EagleSettings
from skyrl_train.engines.embedded.drafts.eagle.fresh import fresh_eagle3
from skyrl_train.engines.embedded.drafts.eagle.head import Eagle3Head, Target
from skyrl_train.engines.embedded.drafts.eagle.layout import load_head
from skyrl_train.engines.embedded.drafts.eagle.source import eagle_source
from skyrl_train.entrypoints.run import DONE, REFUSED
from skyrl_train.environments.arithmetic import arithmetic_rows
from skyrl_train.observability.metrics import deterministic_metrics, read_metrics
from skyrl_train.recipes.eagle3 import main
from skyrl_train.training.builtin_model import make_tokenizer
from skyrl_train.training.model import load_model
from tests.engines.embedded.common import request, run

LONG = ("generator.sampling_params.ignore_eos=true", "generator.sampling_params.max_generate_length=24")


@pytest.fixture(scope="module")
def model(taught: Path) -> Path:
    return taught / "export"


def arguments(model: Path, run_path: Path, *more: str) -> list[str]:
    return [
        f"trainer.policy.model.path={model}",
        f"trainer.run_path={run_path}",
        "trainer.run_name=head",
        "trainer.train_batch_size=16",
        "trainer.policy.optimizer_config.scheduler=constant",
        "trainer.policy.optimizer_config.num_warmup_steps=1",
        *LONG,
        *more,
    ]


def accept_len(model: Path, head: Eagle3Head, temperature: float) -> float:
    policy, tokenizer = load_model(model), make_tokenizer()
    drafts = eagle_source(policy, head, EagleSettings(num_steps=4, topk=1, max_guesses=4))
    config = EmbeddedConfig(max_num_seqs=8, kv_cache_tokens=2048, max_context_len=128)
    core = EngineCore(policy, tokenizer, config=config, drafts=drafts)
    prompts = [
        tokenizer.apply_chat_template(list(row.messages), add_generation_prompt=True, return_dict=False)
        for row in arithmetic_rows("eval", 24)
    ]
    run(
        core,
        [
            request(str(i), prompt, 24, temperature=temperature, seed=i, ignore_eos=True)
            for i, prompt in enumerate(prompts)
        ],
    )
    assert core.speculation is not None
    return core.speculation.counts.accept_len


def test_a_trained_head_is_right_far_more_often_than_a_new_one(model: Path, tmp_path: Path) -> None:
    more = ("trainer.max_steps=60", "trainer.policy.optimizer_config.lr=3e-3")
    assert main(arguments(model, tmp_path / "run", *more)) == DONE
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["eagle3/loss"] < 0.6 * rows[0]["eagle3/loss"]
    policy = load_model(model)
    trained = load_head(tmp_path / "run" / "export", "eagle3", Target.of(policy), dtype=torch.float32)
    assert isinstance(trained, Eagle3Head)
    untrained = fresh_eagle3(policy, seed=0)
    # Greedy answers that go on after their end repeat themselves, which a new head foresees as well.
    assert accept_len(model, trained, 0.0) > accept_len(model, untrained, 0.0)
    assert accept_len(model, trained, 1.0) > accept_len(model, untrained, 1.0) + 0.7


def test_a_run_that_was_cut_off_ends_with_the_same_bits(model: Path, tmp_path: Path) -> None:
    """Also where its answers were sampled: a step's answers depend on its number."""
    more = ("trainer.max_steps=6", "trainer.ckpt_interval=3")
    for name in ("whole", "cut"):
        assert main(arguments(model, tmp_path / name, *more)) == DONE
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "global_step_6")
    shutil.rmtree(tmp_path / "cut" / "export")
    assert main(arguments(model, tmp_path / "cut", *more)) == DONE
    heads = [load_file(tmp_path / name / "export" / "model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(tensor, heads[1][name]) for name, tensor in heads[0].items())
    whole, cut = (deterministic_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut"))
    assert whole == cut


def test_conversations_are_learned_as_they_stand(model: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"What is {i} + 1?"}, {"role": "assistant", "content": f"{i + 1}"}]}
        for i in range(10, 26)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    more = (f"data.train_data=[{tmp_path / 'rows.jsonl'}]", "data.prompt_key=messages", "trainer.epochs=1")
    assert main(arguments(model, tmp_path / "run", *more)) == DONE
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert row["train/num_loss_tokens"] == sum(len(str(i + 1)) + 1 for i in range(10, 26))


def test_keys_that_have_no_meaning_here_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generator.n_samples_per_prompt=4"]) == REFUSED
    assert "training an EAGLE-3 head has no use for generator.n_samples_per_prompt=4" in capsys.readouterr().err
    assert main(["--explain"]) == DONE
    assert "generator.sampling_params.temperature=" in capsys.readouterr().out


def test_a_head_goes_on_from_another_one_or_begins_with_the_words_of_a_map(model: Path, tmp_path: Path) -> None:
    drafts = "generator.speculative_decoding"
    torch.save(list(range(200)), tmp_path / "words.pt")
    one_step = ("trainer.max_steps=1", f"{drafts}.num_steps=2")
    assert main(arguments(model, tmp_path / "few", *one_step, f"{drafts}.token_map={tmp_path / 'words.pt'}")) == DONE
    few = tmp_path / "few" / "export"
    assert load_file(few / "model.safetensors")["lm_head.weight"].shape[0] == 200
    assert main(arguments(model, tmp_path / "more", *one_step, f"{drafts}.draft_model_path={few}")) == DONE
    assert load_file(tmp_path / "more" / "export" / "model.safetensors")["lm_head.weight"].shape[0] == 200
    (row,) = read_metrics(tmp_path / "more" / "metrics.jsonl")
    assert "eagle3/agree_2" in row and "eagle3/agree_3" not in row
