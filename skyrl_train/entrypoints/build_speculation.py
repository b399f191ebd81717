"""generator.speculative_decoding for the embedded engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from skyrl_train.config.schema import Config
from skyrl_train.config.schema_engine import SpeculativeDecoding
from skyrl_train.engines.embedded.drafts.base import DraftSource
from skyrl_train.engines.embedded.drafts.build import ngram_source, standalone_source
from skyrl_train.engines.embedded.drafts.eagle.head import Eagle3Head, Target
from skyrl_train.engines.embedded.drafts.eagle.layout import load_head
from skyrl_train.engines.embedded.drafts.eagle.source import eagle_settings, eagle_source, load_eagle
from skyrl_train.engines.embedded.drafts.ngram import NgramSettings
from skyrl_train.errors import ConfigError
from skyrl_train.training.eagle3 import Eagle3Settings, Eagle3Trainer
from skyrl_train.training.model import load_model
from skyrl_train.training.optimizer import OptimizerSettings

Method = Literal["ngram", "standalone", "eagle", "eagle3"]

DEFAULT_DRAFT_TOKENS = {"ngram": 12, "standalone": 5}
"""The known token that is verified with the guesses included."""


def draft_source(model: PreTrainedModel, config: Config, head: Eagle3Head | None = None) -> DraftSource | None:
    """Who guesses for an engine over `model`; None where nobody is asked to. `head` is one that is trained in this run.

    Raises ConfigError for a draft model that doesn't fit.
    """
    keys, generator = config.generator.speculative_decoding, config.generator
    if not keys.enabled:
        return None
    if next(model.parameters()).device.type != "cpu":
        raise ConfigError(
            "generator.speculative_decoding.enabled=true: the embedded engine speculates on the CPU only; leave it out"
        )
    source = _source(model, keys, generator.engine_init_kwargs, head)
    return replace(source, measures=keys.algorithm == "auto", follows_model=head is not None)


def _source(
    model: PreTrainedModel, keys: SpeculativeDecoding, engine: dict[str, Any], head: Eagle3Head | None
) -> DraftSource:
    method = method_of(keys)
    if method == "ngram":
        plain = NgramSettings()
        return ngram_source(
            NgramSettings(
                max_guesses=_max_guesses(keys, method),
                longest=keys.ngram.max_trie_depth or plain.longest,
                shortest=min(plain.shortest, keys.ngram.max_trie_depth or plain.longest),
                capacity=keys.ngram.capacity or plain.capacity,
            )
        )
    assert keys.draft_model_path is not None
    attention = engine.get("attention_backend", "auto")
    packs = engine.get("pack_weights") is not False
    if method == "standalone":
        draft = load_model(keys.draft_model_path, dtype=next(model.parameters()).dtype)
        guesses = _max_guesses(keys, method)
        return standalone_source(draft, model, max_guesses=guesses, attention_backend=attention, packs_weights=packs)
    settings = eagle_settings(keys.num_steps, keys.eagle_topk, keys.num_draft_tokens)
    if head is not None:
        source = eagle_source(model, head, settings, attention_backend=attention, packs_weights=packs)
        return replace(source, follows_model=True)
    return load_eagle(
        model,
        keys.draft_model_path,
        method,
        settings,
        attention_backend=attention,
        packs_weights=packs,
        token_map=keys.token_map,
    )


def head_trainer(config: Config, model: PreTrainedModel) -> Eagle3Trainer | None:
    """What trains the head that drafts for `model` during the run; None where it stays as it is.

    Raises ConfigError for a head that doesn't fit.
    """
    keys = config.generator.speculative_decoding
    if not keys.enabled or not keys.head_train_steps:
        return None
    assert keys.draft_model_path is not None
    head = load_head(keys.draft_model_path, "eagle3", Target.of(model), dtype=model.dtype)
    assert isinstance(head, Eagle3Head)
    longest = config.trainer.max_tokens_per_micro_batch
    settings = Eagle3Settings(
        optimizer=OptimizerSettings(lr=keys.head_lr),
        num_unrolled=eagle_settings(keys.num_steps, keys.eagle_topk, keys.num_draft_tokens).num_steps,
        **({} if longest is None else {"max_tokens": longest}),
    )
    return Eagle3Trainer(model, head, settings)


def method_of(keys: SpeculativeDecoding) -> Method:
    """How is guessed: `auto` takes what there is, and leaves it out where it loses."""
    if keys.algorithm != "auto":
        return keys.algorithm
    if keys.draft_model_path is None:
        return "ngram"
    config = Path(keys.draft_model_path) / "config.json"
    try:
        names = " ".join(json.loads(config.read_text()).get("architectures") or ())
    except (OSError, ValueError) as exc:
        raise ConfigError(f"generator.speculative_decoding.draft_model_path: {config} can't be read: {exc}") from exc
    if "eagle3" in names.lower():
        return "eagle3"
    return "eagle" if "eagle" in names.lower() else "standalone"


def _max_guesses(keys: SpeculativeDecoding, method: str) -> int:
    if keys.num_draft_tokens is None and keys.num_steps is not None:
        return keys.num_steps
    return (keys.num_draft_tokens or DEFAULT_DRAFT_TOKENS[method]) - 1
