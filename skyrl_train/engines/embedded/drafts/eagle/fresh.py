"""A new EAGLE-3 head for a model: what it can take over from the model it has, the rest is random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig

from skyrl_train.engines.embedded.drafts.eagle.head import Eagle3Head, Target
from skyrl_train.engines.embedded.drafts.eagle.layout import default_taps
from skyrl_train.errors import ConfigError

INITIAL_SPREAD = 0.02


@torch.no_grad()
def fresh_eagle3(
    model: Any, *, seed: int, word_ids: Sequence[int] | None = None, taps: tuple[int, ...] | None = None
) -> Eagle3Head:
    """In the model's shape, dtype and device; it drafts the tokens `word_ids`, or all.

    The last matrix and the norm before it start as the model's, `fc` as the highest tapped layer alone: the head begins
    near to what the model says without its last layers. The global random state is not touched.
    Raises ConfigError for token ids that the model doesn't have.
    """
    target = Target.of(model)
    config = model.config.get_text_config()
    taps = default_taps(target.num_layers) if taps is None else taps
    ids = None if word_ids is None else torch.tensor(sorted(set(word_ids)))
    if ids is not None and not (len(ids) and 0 <= int(ids[0]) <= int(ids[-1]) < target.vocab_size):
        raise ConfigError(f"a head's words must be some of the model's token ids, below {target.vocab_size}")
    if ids is not None and len(ids) == target.vocab_size:
        ids = None
    weight = target.lm_head.weight
    assert isinstance(weight, torch.Tensor)
    head_config = LlamaConfig(
        vocab_size=target.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=getattr(config, "rms_norm_eps", 1e-6),
        rope_parameters=_plain_rope(config),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = Eagle3Head(head_config, taps=taps, num_words=None if ids is None else len(ids))
        for parameter in head.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=INITIAL_SPREAD)
    head.to(device=weight.device, dtype=weight.dtype)
    size = config.hidden_size
    head.fc.weight[:, -size:] += torch.eye(size, device=weight.device, dtype=weight.dtype)
    # What the norm makes of ones is its weights, however it stores them.
    head.norm.weight.copy_(target.norm(torch.ones(size, device=weight.device, dtype=weight.dtype)))
    assert head.lm_head is not None
    head.lm_head.weight.copy_(weight if ids is None else weight[ids])
    if ids is not None:
        assert head.d2t is not None and head.t2d is not None
        head.d2t.copy_(ids - torch.arange(len(ids)))
        head.t2d[ids] = True
    return head


def _plain_rope(config: Any) -> dict[str, Any]:
    """The model's base of rotary angles; scaling for long contexts is not taken over."""
    rope = getattr(config, "rope_parameters", None) or {}
    return {"rope_type": "default", "rope_theta": float(rope.get("rope_theta", 10_000.0))}
