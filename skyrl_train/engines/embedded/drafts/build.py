"""From settings to what an engine is given for speculation."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from skyrl_train.engines.embedded.backends import native_or_warn
from skyrl_train.engines.embedded.config import AttentionName
from skyrl_train.engines.embedded.drafts.base import Drafter, DraftSource
from skyrl_train.engines.embedded.drafts.ngram import NgramDrafter, NgramSettings
from skyrl_train.engines.embedded.drafts.standalone import StandaloneDrafter
from skyrl_train.engines.embedded.runner import probe_layers
from skyrl_train.engines.embedded.twin import InferenceModel
from skyrl_train.errors import ConfigError

CPU = torch.device("cpu")


def ngram_source(settings: NgramSettings) -> DraftSource:
    def make(num_slots: int, num_seats: int) -> Drafter:
        return NgramDrafter(settings, num_seats, native_or_warn(CPU))

    return DraftSource(bytes_per_token=0, make=make)


def standalone_source(
    draft: PreTrainedModel,
    model: PreTrainedModel,
    *,
    max_guesses: int,
    attention_backend: AttentionName = "auto",
    packs_weights: bool = False,
) -> DraftSource:
    """For an engine over `model`. Raises ConfigError where `draft` has other words or layers that can't be served."""
    words, wanted = (_num_words(each) for each in (draft, model))
    if words != wanted:
        raise ConfigError(
            f"the draft model {draft.config.name_or_path} has {words} words, the model that it drafts for {wanted}; "
            "take a smaller model of the same family, or algorithm ngram, which needs none"
        )
    native = native_or_warn(CPU)
    inference_model = InferenceModel(draft, native, packs_weights=packs_weights)
    layers = probe_layers(inference_model)

    def make(num_slots: int, num_seats: int) -> Drafter:
        return StandaloneDrafter(
            inference_model,
            layers,
            max_guesses=max_guesses,
            num_slots=num_slots,
            num_seats=num_seats,
            native=native,
            attention_backend=attention_backend,
        )

    return DraftSource(bytes_per_token=sum(shape.bytes_per_token for shape in layers.values()) + 9, make=make)


def _num_words(model: PreTrainedModel) -> int:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return len(weight)
