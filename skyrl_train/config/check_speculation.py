"""Rules of speculative decoding, as the installed release of SGLang has them."""

from __future__ import annotations

from collections.abc import Iterator

from skyrl_train.config.findings import Checked, Finding, Rule, error, warning
from skyrl_train.config.keys import schema_keys
from skyrl_train.engines.sglang.releases import release_number

_GROUP = "generator.speculative_decoding"
TREE_BACKENDS = ("flashinfer", "fa3", "triton")
"""Attention kernels that verify a tree of drafts over pages of more than one token."""
DEFAULT_NGRAM_BREADTH = 10
DEFAULT_NGRAM_DRAFT_TOKENS = 12


def _on(checked: Checked) -> bool:
    return checked.config.generator.speculative_decoding.enabled


def draft_model(checked: Checked) -> Iterator[Finding]:
    if not _on(checked):
        return
    keys = checked.config.generator.speculative_decoding
    if keys.algorithm in ("standalone", "eagle", "eagle3") and keys.draft_model_path is None:
        what = "a small model of the same family" if keys.algorithm == "standalone" else "a head trained for this model"
        yield error(f"{_GROUP}.algorithm={keys.algorithm} needs {_GROUP}.draft_model_path: {what}; ngram needs none")
    if keys.algorithm == "ngram":
        for name in ("draft_model_path", "draft_model_revision", "draft_load_format", "draft_window_size"):
            if checked.is_set(f"{_GROUP}.{name}"):
                yield error(f"{checked.show(f'{_GROUP}.{name}')}: algorithm ngram has no draft model; leave it out")


def parallelism(checked: Checked) -> Iterator[Finding]:
    if not _on(checked):
        return
    generator = checked.config.generator
    algorithm = generator.speculative_decoding.algorithm
    if generator.inference_engine_pipeline_parallel_size > 1:
        yield error(
            f"{checked.show('generator.inference_engine_pipeline_parallel_size')} does not go with speculative "
            "decoding; use tensor parallelism"
        )
    if generator.attention.enable_dp_attention and algorithm in ("ngram", "standalone"):
        yield error(
            f"{checked.show('generator.attention.enable_dp_attention')} does not go with {_GROUP}.algorithm="
            f"{algorithm}; use eagle or eagle3, or turn one of them off"
        )


def adapters(checked: Checked) -> Iterator[Finding]:
    config = checked.config
    uses_lora = bool(config.generator.lora.enabled)
    if not (_on(checked) and uses_lora):
        return
    algorithm = config.generator.speculative_decoding.algorithm
    if algorithm == "standalone":
        yield error(f"{_GROUP}.algorithm=standalone does not go with LoRA; use ngram")
    elif config.generator.backend == "embedded":
        return
    elif algorithm in ("eagle", "eagle3") and release_number(checked.engine_release) < (0, 5, 23):
        yield error(
            f"{_GROUP}.algorithm={algorithm} does not go with LoRA in SGLang {checked.engine_release}; "
            "use ngram, or SGLang 0.5.23"
        )


def draft_tree(checked: Checked) -> Iterator[Finding]:
    """SGLang's: vLLM has chains alone, the embedded engine rules of its own."""
    if not _on(checked) or checked.config.generator.backend != "sglang":
        return
    generator = checked.config.generator
    keys = generator.speculative_decoding
    page = generator.kv_cache.page_size or 1
    kernel = generator.attention.decode_backend or generator.attention.backend
    if keys.algorithm == "ngram":
        if keys.eagle_topk is not None:
            yield error(
                f"{checked.show(f'{_GROUP}.eagle_topk')}: with ngram the breadth is {_GROUP}.ngram.max_bfs_breadth, "
                "which writes the same server argument; keep that one"
            )
        breadth = keys.ngram.max_bfs_breadth or DEFAULT_NGRAM_BREADTH
        if breadth > 1 and page > 1 and kernel != "flashinfer":
            yield error(
                f"generator.kv_cache.page_size={page} with {_GROUP}.ngram.max_bfs_breadth={breadth} needs "
                f"generator.attention.backend=flashinfer, found {kernel}; or page_size 1, or breadth 1"
            )
        return
    together = {name: getattr(keys, name) for name in ("num_steps", "eagle_topk", "num_draft_tokens")}
    missing = [name for name, value in together.items() if value is None]
    if missing and len(missing) < len(together) and not keys.adaptive:
        given = [name for name in together if name not in missing]
        yield error(
            f"{_GROUP}.{', '.join(given)} set without {', '.join(missing)}: give all three, or none and leave them to "
            "SGLang"
        )
    topk, steps, tokens = keys.eagle_topk, keys.num_steps, keys.num_draft_tokens
    if topk is None or steps is None or tokens is None:
        return
    if topk == 1 and tokens != steps + 1:
        yield error(
            f"{_GROUP}.eagle_topk=1 is a chain: num_draft_tokens must be num_steps + 1 = {steps + 1}, found {tokens}"
        )
    largest = topk + (steps - 1) * topk * topk + 1
    if topk > 1 and tokens > largest:
        yield error(
            f"{_GROUP}.num_draft_tokens={tokens} is more than the tree has: eagle_topk={topk} and num_steps={steps} "
            f"make {largest}"
        )
    if topk > 1 and kernel == "trtllm_mha":
        yield error(f"{_GROUP}.eagle_topk={topk} does not go with attention kernel trtllm_mha; use eagle_topk 1")
    if topk > 1 and page > 1 and kernel not in TREE_BACKENDS:
        yield error(
            f"{_GROUP}.eagle_topk={topk} with generator.kv_cache.page_size={page} needs generator.attention.backend "
            f"{', '.join(TREE_BACKENDS)}, found {kernel}; or page_size 1, or eagle_topk 1"
        )


def ngram_options(checked: Checked) -> Iterator[Finding]:
    if not _on(checked):
        return
    keys = checked.config.generator.speculative_decoding
    own = [path for path in schema_keys() if path.startswith(f"{_GROUP}.ngram.")]
    if keys.algorithm not in ("ngram", "auto"):
        for path in own:
            if checked.is_set(path):
                yield error(f"{checked.show(path)} is read with {_GROUP}.algorithm=ngram only, found {keys.algorithm}")
        return
    ngram = keys.ngram
    low, high = ngram.min_bfs_breadth or 1, ngram.max_bfs_breadth or DEFAULT_NGRAM_BREADTH
    if low > high:
        yield error(f"{_GROUP}.ngram.min_bfs_breadth={low} is over max_bfs_breadth={high}")
    if ngram.external_corpus_path is not None:
        room = (keys.num_draft_tokens or DEFAULT_NGRAM_DRAFT_TOKENS) - 1
        budget = ngram.external_sam_budget or 0
        if not 1 <= budget <= room:
            yield error(
                f"{_GROUP}.ngram.external_corpus_path needs external_sam_budget between 1 and num_draft_tokens - 1 = "
                f"{room}, found {budget}"
            )


def acceptance(checked: Checked) -> Iterator[Finding]:
    if not _on(checked):
        return
    keys = checked.config.generator.speculative_decoding
    lowered = [
        f"{_GROUP}.{name}={getattr(keys, name)}"
        for name in ("accept_threshold_single", "accept_threshold_acc")
        if getattr(keys, name) < 1.0
    ]
    if keys.use_rejection_sampling:
        if keys.algorithm not in ("eagle", "eagle3"):
            yield error(f"{_GROUP}.use_rejection_sampling is for eagle and eagle3, found {keys.algorithm}")
        if keys.eagle_topk not in (None, 1):
            yield error(f"{_GROUP}.use_rejection_sampling needs eagle_topk=1, found {keys.eagle_topk}")
        if lowered:
            yield error(f"{', '.join(lowered)} is not read with use_rejection_sampling; keep one of them")
    elif lowered and checked.config.generator.backend != "embedded":
        yield warning(
            f"{', '.join(lowered)} under 1.0 accepts drafts that the model would not have sampled: rollouts become "
            "off-policy"
        )


SPECULATION_RULES: tuple[Rule, ...] = (draft_model, parallelism, adapters, draft_tree, ngram_options, acceptance)
