"""Rules of speculative decoding in the embedded engine."""

from __future__ import annotations

from collections.abc import Iterator

from skyrl_train.config.findings import Checked, Finding, Rule, error, warning

_GROUP = "generator.speculative_decoding"


def _speculates(checked: Checked) -> bool:
    generator = checked.config.generator
    return generator.backend == "embedded" and generator.speculative_decoding.enabled


def where_it_is_built(checked: Checked) -> Iterator[Finding]:
    if not _speculates(checked):
        return
    name = checked.show(f"{_GROUP}.enabled")
    if checked.config.trainer.placement.policy_num_gpus_per_node:
        yield error(
            f"{name} is built for the CPU in the embedded engine, found "
            f"{checked.show('trainer.placement.policy_num_gpus_per_node')}; set 0, use generator.backend=sglang, or "
            "leave it out"
        )
    algorithm = checked.config.generator.speculative_decoding.algorithm
    if checked.config.generator.lora.enabled and algorithm in ("eagle", "eagle3"):
        yield error(f"{checked.show(f'{_GROUP}.algorithm')} does not go with LoRA in the embedded engine; use ngram")


def exactness(checked: Checked) -> Iterator[Finding]:
    if not _speculates(checked):
        return
    keys = checked.config.generator.speculative_decoding
    for name in ("accept_threshold_single", "accept_threshold_acc"):
        if getattr(keys, name) < 1:
            yield error(
                f"{checked.show(f'{_GROUP}.{name}')}: the embedded engine accepts exactly what the model would have "
                "sampled; leave it out"
            )


def sizes(checked: Checked) -> Iterator[Finding]:
    """How many guesses there are; num_draft_tokens counts the known token that is verified with them."""
    if not _speculates(checked):
        return
    keys = checked.config.generator.speculative_decoding
    tokens, steps, topk = keys.num_draft_tokens, keys.num_steps, keys.eagle_topk
    is_head = keys.algorithm in ("eagle", "eagle3") or (keys.algorithm == "auto" and keys.draft_model_path)
    if tokens is not None and tokens < 2:
        yield error(f"{_GROUP}.num_draft_tokens={tokens} leaves no guess beside the known token; give 2 or more")
    if topk is not None and topk > 1 and not is_head:
        yield error(f"{_GROUP}.eagle_topk={topk} is for eagle and eagle3, found {keys.algorithm}; leave it out")
    if steps is not None and tokens is not None and topk in (None, 1) and tokens != steps + 1:
        yield error(
            f"{_GROUP}.num_draft_tokens={tokens} and num_steps={steps} disagree: a chain has num_steps + 1 = "
            f"{steps + 1} tokens to verify; give one of them"
        )
    if steps is not None and topk is not None and topk > 1 and tokens is not None:
        largest = topk + (steps - 1) * topk * topk + 1
        if tokens > largest:
            yield error(
                f"{_GROUP}.num_draft_tokens={tokens} is more than the tree has: eagle_topk={topk} and "
                f"num_steps={steps} make {largest}"
            )


def head_training(checked: Checked) -> Iterator[Finding]:
    """The head follows the policy where both are in this process, one after the other."""
    config, name = checked.config, f"{_GROUP}.head_train_steps"
    keys = config.generator.speculative_decoding
    if not keys.head_train_steps:
        if checked.is_set(f"{_GROUP}.head_lr"):
            yield error(f"{checked.show(f'{_GROUP}.head_lr')} is read with {name} of 1 or more only; leave it out")
        return
    shown = checked.show(name)
    if config.generator.backend != "embedded":
        yield error(
            f"{shown} is for generator.backend=embedded, found {config.generator.backend}, whose server keeps the head "
            "that it started with; leave it out, and train one with skyrl_train.recipes.eagle3"
        )
    elif not keys.enabled or keys.algorithm != "eagle3":
        yield error(f"{shown} trains the head of {_GROUP}.algorithm=eagle3, with enabled=true; leave it out otherwise")
    if config.trainer.fully_async.enabled:
        yield error(f"{shown}: with trainer.fully_async.enabled=true the engine drafts while it trains; leave it out")
    if config.trainer.policy.model.lora.rank:
        yield error(f"{shown} does not go with trainer.policy.model.lora.rank; leave one of them out")


def repeats(checked: Checked) -> Iterator[Finding]:
    """Right guesses move a request on by several tokens a step: how far it is when an update lands depends on them."""
    keys = checked.config.trainer.fully_async
    if not (_speculates(checked) and keys.enabled and keys.deterministic and keys.max_staleness_steps):
        return
    algorithm = checked.config.generator.speculative_decoding.algorithm
    name = checked.show(f"{_GROUP}.algorithm")
    asked = "trainer.fully_async.deterministic=true"
    if algorithm == "auto":
        yield warning(
            f"{name} goes by the clock, and where updates meet running answers depends on the guesses: with "
            f"{asked} too this run can't be repeated or resumed to the bit; name the algorithm"
        )
    elif algorithm == "ngram":
        yield warning(
            f"{name} learns from answers, and no checkpoint keeps that: after a resume there are other guesses, and "
            f"where updates meet running answers depends on them; with {asked} too a resumed run does not end with "
            "the bits of one that was never stopped"
        )


DRAFT_RULES: tuple[Rule, ...] = (where_it_is_built, exactness, sizes, head_training, repeats)
