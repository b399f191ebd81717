"""Speculation in the embedded engine: what goes together, and who guesses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from skyrl_train.config import ConfigError, load_config
from skyrl_train.entrypoints.build import engine_over
from skyrl_train.entrypoints.build_speculation import draft_source, method_of
from tests.tiny import make_model, make_tokenizer

KEY = "generator.speculative_decoding"
ON = f"{KEY}.enabled=true"


def refused(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config([ON, *argv])
    return str(caught.value)


def test_ngram_needs_nothing_more() -> None:
    config = load_config([ON, f"{KEY}.num_draft_tokens=5", f"{KEY}.ngram.max_trie_depth=6"]).config
    engine = engine_over(make_model(), config, make_tokenizer())
    speculation = engine.core.speculation
    assert speculation is not None and speculation.auto is None
    assert (speculation.drafter.name, speculation.drafter.max_tokens) == ("ngram", 4)
    assert "speculation" in engine.info.capabilities


def test_without_it_nobody_guesses() -> None:
    engine = engine_over(make_model(), load_config([]).config, make_tokenizer())
    assert engine.core.speculation is None and "speculation" not in engine.info.capabilities


def test_auto_is_ngram_that_is_measured() -> None:
    source = draft_source(make_model(), load_config([ON, f"{KEY}.algorithm=auto"]).config)
    assert source is not None and source.measures and source.make(8, 2).name == "ngram"


@pytest.mark.parametrize(
    ("architecture", "method"),
    [("Qwen2ForCausalLM", "standalone"), ("LlamaForCausalLMEagle", "eagle"), ("LlamaForCausalLMEagle3", "eagle3")],
)
def test_auto_takes_the_draft_that_it_is_given(tmp_path: Path, architecture: str, method: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    config = load_config([ON, f"{KEY}.algorithm=auto", f"{KEY}.draft_model_path={tmp_path}"]).config
    assert method_of(config.generator.speculative_decoding) == method


def test_a_standalone_draft_is_loaded_from_its_folder(tmp_path: Path) -> None:
    make_model(num_hidden_layers=1, seed=4).save_pretrained(tmp_path)
    config = load_config([ON, f"{KEY}.algorithm=standalone", f"{KEY}.draft_model_path={tmp_path}"]).config
    source = draft_source(make_model(), config)
    assert source is not None and source.bytes_per_token > 0 and source.make(8, 2).max_tokens == 4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trainer.placement.policy_num_gpus_per_node=1"], "is built for the CPU in the embedded engine"),
        ([f"{KEY}.accept_threshold_acc=0.9"], "accepts exactly what the model would have sampled"),
        ([f"{KEY}.accept_threshold_single=0.5"], "accepts exactly what the model would have sampled"),
        ([f"{KEY}.num_draft_tokens=1"], "leaves no guess beside the known token"),
        ([f"{KEY}.eagle_topk=2"], "is for eagle and eagle3"),
        ([f"{KEY}.num_steps=3", f"{KEY}.num_draft_tokens=3"], "disagree: a chain has num_steps + 1 = 4"),
        ([f"{KEY}.algorithm=standalone"], "needs generator.speculative_decoding.draft_model_path"),
        ([f"{KEY}.ngram.max_bfs_breadth=4"], "trees of n-grams in the embedded engine; use 1"),
        ([f"{KEY}.ngram.external_corpus_path=a.jsonl"], "a server's own way of drafting"),
        (
            [f"{KEY}.algorithm=eagle3", f"{KEY}.draft_model_path=d", "generator.lora.enabled=true"],
            "does not go with LoRA in the embedded engine",
        ),
        (
            [f"{KEY}.algorithm=standalone", f"{KEY}.draft_model_path=d", "generator.lora.enabled=true"],
            "standalone does not go with LoRA",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(argv: list[str], message: str) -> None:
    assert message in refused(*argv)


def test_on_a_server_nothing_is_measured() -> None:
    assert "measuring where drafts lose on a server" in refused("generator.backend=sglang", f"{KEY}.algorithm=auto")


def test_a_tree_of_heads_is_as_large_as_its_branches() -> None:
    head = (f"{KEY}.algorithm=eagle", f"{KEY}.draft_model_path=d", f"{KEY}.num_steps=2", f"{KEY}.eagle_topk=2")
    load_config([ON, *head, f"{KEY}.num_draft_tokens=7"])
    assert "is more than the tree has" in refused(*head, f"{KEY}.num_draft_tokens=8")


ASYNC = ("trainer.fully_async.enabled=true", "trainer.fully_async.max_staleness_steps=2")


@pytest.mark.parametrize(("algorithm", "said"), [("auto", "can't be repeated"), ("ngram", "a resumed run")])
def test_a_run_that_guesses_make_unrepeatable_says_so(algorithm: str, said: str) -> None:
    def warnings(*argv: str) -> list[str]:
        found = load_config([ON, f"{KEY}.algorithm={algorithm}", *argv]).warnings
        return [warning for warning in found if KEY in warning]

    (warning,) = warnings(*ASYNC)
    assert said in warning
    assert not warnings() and not warnings(*ASYNC, "trainer.fully_async.deterministic=false")
