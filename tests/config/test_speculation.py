"""What speculative decoding goes with, by algorithm and release."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from skyrl_train.config import ConfigError, load_config

ON = ("generator.backend=sglang", "generator.speculative_decoding.enabled=true")
KEY = "generator.speculative_decoding"
DRAFT = f"{KEY}.draft_model_path=draft"


def refused(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config([*ON, *argv])
    return str(caught.value)


def interpreter_with_sglang(folder: Path, release: str) -> str:
    """A program that is this Python with the metadata of an SGLang release beside its packages."""
    info = folder / "site" / f"sglang-{release}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {release}\n")
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={folder / "site"} exec {sys.executable} "$@"\n')
    os.chmod(program, 0o755)
    return str(program)


@pytest.mark.parametrize("algorithm", ["standalone", "eagle", "eagle3"])
def test_a_draft_path_is_needed_but_for_ngram(algorithm: str) -> None:
    assert f"algorithm={algorithm} needs {KEY}.draft_model_path" in refused(f"{KEY}.algorithm={algorithm}")
    load_config([*ON, f"{KEY}.algorithm={algorithm}", DRAFT])
    load_config([*ON, f"{KEY}.algorithm=ngram"])


def test_ngram_has_no_draft_model() -> None:
    assert "algorithm ngram has no draft model" in refused(DRAFT)


@pytest.mark.parametrize("algorithm", [(), (f"{KEY}.algorithm=standalone", DRAFT), (f"{KEY}.algorithm=eagle3", DRAFT)])
def test_pipeline_parallel_is_refused(algorithm: tuple[str, ...]) -> None:
    assert "does not go with speculative decoding" in refused(
        *algorithm, "generator.inference_engine_pipeline_parallel_size=2"
    )


@pytest.mark.parametrize("algorithm", [("ngram",), ("standalone", DRAFT)])
def test_data_parallel_attention_is_refused_with_ngram_and_standalone(algorithm: tuple[str, ...]) -> None:
    assert "enable_dp_attention" in refused(
        f"{KEY}.algorithm={algorithm[0]}", *algorithm[1:], "generator.attention.enable_dp_attention=true"
    )
    load_config([*ON, f"{KEY}.algorithm=eagle", DRAFT, "generator.attention.enable_dp_attention=true"])


def test_lora_is_refused_with_standalone_and_fine_with_ngram() -> None:
    lora = "generator.lora.enabled=true"
    assert "standalone does not go with LoRA" in refused(f"{KEY}.algorithm=standalone", DRAFT, lora)
    load_config([*ON, lora])


def test_lora_with_eagle_depends_on_the_installed_release(tmp_path: Path) -> None:
    settings = (f"{KEY}.algorithm=eagle3", DRAFT, "generator.lora.enabled=true")
    old = interpreter_with_sglang(tmp_path / "old", "0.5.17")
    new = interpreter_with_sglang(tmp_path / "new", "0.5.23.post1")
    assert "does not go with LoRA in SGLang 0.5.17" in refused(*settings, f"generator.engine_python={old}")
    assert load_config([*ON, *settings, f"generator.engine_python={new}"]).engine_release == "0.5.23.post1"


def test_a_chain_verifies_one_token_more_than_it_drafts() -> None:
    chain = (f"{KEY}.algorithm=eagle", DRAFT, f"{KEY}.num_steps=3", f"{KEY}.eagle_topk=1")
    assert "num_steps + 1 = 4, found 6" in refused(*chain, f"{KEY}.num_draft_tokens=6")
    load_config([*ON, *chain, f"{KEY}.num_draft_tokens=4"])


def test_a_tree_has_only_so_many_tokens() -> None:
    # 2 branches, 2 steps: 2 at the first step, 2 x 2 at the second, and the verified root: 7.
    tree = (f"{KEY}.algorithm=eagle", DRAFT, f"{KEY}.num_steps=2", f"{KEY}.eagle_topk=2")
    assert "make 7" in refused(*tree, f"{KEY}.num_draft_tokens=8")
    load_config([*ON, *tree, f"{KEY}.num_draft_tokens=7"])


def test_the_three_sizes_go_together() -> None:
    assert "num_steps set without eagle_topk, num_draft_tokens" in refused(
        f"{KEY}.algorithm=eagle", DRAFT, f"{KEY}.num_steps=3"
    )


@pytest.mark.parametrize(
    ("kernel", "page", "works"), [("fa3", 16, True), ("flashmla", 16, False), ("flashmla", 1, True)]
)
def test_a_tree_needs_a_kernel_that_can(kernel: str, page: int, works: bool) -> None:
    tree = (
        f"{KEY}.algorithm=eagle3",
        DRAFT,
        f"{KEY}.num_steps=3",
        f"{KEY}.eagle_topk=4",
        f"{KEY}.num_draft_tokens=8",
        f"generator.attention.backend={kernel}",
        f"generator.kv_cache.page_size={page}",
    )
    if works:
        load_config([*ON, *tree])
    else:
        assert "flashinfer, fa3, triton" in refused(*tree)


def test_trtllm_mha_verifies_chains_only() -> None:
    assert "trtllm_mha" in refused(
        f"{KEY}.algorithm=eagle",
        DRAFT,
        f"{KEY}.num_steps=3",
        f"{KEY}.eagle_topk=2",
        f"{KEY}.num_draft_tokens=4",
        "generator.attention.backend=trtllm_mha",
    )


def test_ngrams_breadth_has_one_key() -> None:
    assert "keep that one" in refused(f"{KEY}.eagle_topk=2")


def test_broad_ngram_drafts_over_pages_need_flashinfer() -> None:
    page = "generator.kv_cache.page_size=64"
    assert "needs generator.attention.backend=flashinfer" in refused(page)
    load_config([*ON, page, f"{KEY}.ngram.max_bfs_breadth=1"])
    load_config([*ON, page, "generator.attention.backend=flashinfer"])


def test_ngram_options_are_ngrams() -> None:
    assert "is read with" in refused(f"{KEY}.algorithm=eagle", DRAFT, f"{KEY}.ngram.capacity=1000")
    assert "min_bfs_breadth=9 is over max_bfs_breadth=4" in refused(
        f"{KEY}.ngram.min_bfs_breadth=9", f"{KEY}.ngram.max_bfs_breadth=4"
    )


def test_an_external_corpus_needs_a_share_of_the_drafts() -> None:
    corpus = f"{KEY}.ngram.external_corpus_path=c.jsonl"
    assert "between 1 and num_draft_tokens - 1 = 11, found 0" in refused(corpus)
    assert "= 7, found 8" in refused(corpus, f"{KEY}.num_draft_tokens=8", f"{KEY}.ngram.external_sam_budget=8")
    load_config([*ON, corpus, f"{KEY}.ngram.external_sam_budget=4"])


def test_thresholds_under_one_warn_that_rollouts_are_off_policy() -> None:
    warnings = load_config([*ON, f"{KEY}.accept_threshold_acc=0.9"]).warnings
    assert any("off-policy" in warning for warning in warnings)


def test_rejection_sampling_is_for_eagle_chains_without_thresholds() -> None:
    on = f"{KEY}.use_rejection_sampling=true"
    eagle = (f"{KEY}.algorithm=eagle", DRAFT, on)
    assert "is for eagle and eagle3, found ngram" in refused(on)
    assert "is not read with use_rejection_sampling" in refused(*eagle, f"{KEY}.accept_threshold_acc=0.9")
    assert "needs eagle_topk=1, found 2" in refused(
        *eagle, f"{KEY}.num_steps=3", f"{KEY}.eagle_topk=2", f"{KEY}.num_draft_tokens=4"
    )


def test_rules_sleep_while_speculation_is_off() -> None:
    load_config(["generator.backend=sglang", f"{KEY}.algorithm=eagle3"])
