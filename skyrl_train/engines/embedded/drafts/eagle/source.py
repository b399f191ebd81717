"""What an engine is given to make its EAGLE drafter of."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from skyrl_train.engines.embedded.backends import native_or_warn
from skyrl_train.engines.embedded.config import AttentionName
from skyrl_train.engines.embedded.drafts.base import DraftSource
from skyrl_train.engines.embedded.drafts.eagle.drafter import EagleDrafter, EagleSettings, kv_shape
from skyrl_train.engines.embedded.drafts.eagle.head import Eagle3Head, Head, Target
from skyrl_train.engines.embedded.drafts.eagle.layout import Algorithm, load_head
from skyrl_train.errors import ConfigError

DEFAULT_STEPS = 3


def eagle_settings(num_steps: int | None, topk: int | None, num_draft_tokens: int | None) -> EagleSettings:
    """From the configuration's three keys. The last one counts the known token that is verified with the guesses.

    None is a chain of 3 guesses, or what follows from the others: a tree keeps two guesses a level and branch.
    """
    topk = topk or 1
    if num_steps is None:
        num_steps = DEFAULT_STEPS if num_draft_tokens is None or topk > 1 else max(num_draft_tokens - 1, 1)
    most = num_steps if topk == 1 else topk + (num_steps - 1) * topk * topk
    usual = num_steps if topk == 1 else 2 * num_steps
    wanted = usual if num_draft_tokens is None else num_draft_tokens - 1
    return EagleSettings(num_steps=num_steps, topk=topk, max_guesses=max(min(wanted, most), 1))


def load_eagle(
    model: Any,
    folder: str | Path,
    algorithm: Algorithm,
    settings: EagleSettings,
    *,
    attention_backend: AttentionName = "auto",
    packs_weights: bool = False,
    token_map: str | Path | None = None,
) -> DraftSource:
    """For an engine over `model`, with the head in `folder`. Raises ConfigError where it doesn't fit.

    `token_map` is a file of token ids as SGLang's speculative_token_map: eagle guesses among them.
    """
    head = load_head(folder, algorithm, Target.of(model), dtype=next(model.parameters()).dtype)
    head.to(next(model.parameters()).device)
    words = None if token_map is None else load_token_map(token_map)
    return eagle_source(
        model, head, settings, attention_backend=attention_backend, packs_weights=packs_weights, words=words
    )


def load_token_map(path: str | Path) -> torch.Tensor:
    """Token ids [W], rising, from a file that torch.save has made of a list or a tensor. Raises ConfigError."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        ids = torch.tensor(sorted({int(i) for i in found}), dtype=torch.int64)
    except (OSError, RuntimeError, ValueError, TypeError, pickle.UnpicklingError) as exc:
        raise ConfigError(f"can't read token ids from the token map {path}: {exc}") from exc
    if not len(ids) or int(ids[0]) < 0:
        raise ConfigError(f"the token map {path} holds no token ids, or negative ones")
    return ids


def eagle_source(
    model: Any,
    head: Head,
    settings: EagleSettings,
    *,
    attention_backend: AttentionName = "auto",
    packs_weights: bool = False,
    words: torch.Tensor | None = None,
) -> DraftSource:
    """For an engine over `model`, with a head that was loaded or made for it. `words` as in EagleDrafter.

    Raises ConfigError on a GPU, and for `words` beside a head that has its own.
    """
    target = Target.of(model)
    weight = head.fc.weight
    if weight.device.type != "cpu":
        raise ConfigError(
            f"embedded engine: {head.algorithm} heads draft on the CPU only, this one is on {weight.device}"
        )
    if words is not None and isinstance(head, Eagle3Head):
        raise ConfigError("a token map is for algorithm eagle; an eagle3 head has a vocabulary of its own")
    if words is not None and int(words[-1]) >= target.vocab_size:
        raise ConfigError(f"the token map names token {int(words[-1])}, the model has {target.vocab_size}")
    shape = kv_shape(head, weight.dtype)
    hidden_bytes = int(head.config.hidden_size) * weight.dtype.itemsize

    def make(num_slots: int, num_seats: int) -> EagleDrafter:
        return EagleDrafter(
            head,
            target,
            settings=settings,
            num_slots=num_slots,
            num_seats=num_seats,
            native=native_or_warn(weight.device),
            attention_backend=attention_backend,
            packs_weights=packs_weights,
            words=words,
        )

    return DraftSource(bytes_per_token=shape.bytes_per_token + hidden_bytes + 1, make=make)
