"""The two published heads as modules whose state dicts have the published names.

Both predict the token after next from the hidden state of a position and the token that follows it, and go on from
their own hidden states where the model's are not known yet:

    row t:   token t + 1 , hidden t  ──►  hidden' t  ──►  token t + 2
    row t+1: token t + 2 , hidden' t ──►  ...

EAGLE   (arXiv:2401.15077, section 3; arXiv:2406.16858): fc over (embedding, the model's last hidden state after its
        norm), one decoder layer without an input norm; embedding and last matrix are the model's.
EAGLE-3 (arXiv:2503.01840, section 3): fc over the outputs of a low, a middle and a high layer; a layer whose attention
        reads (normed embedding, normed hidden state); a norm and a last matrix of its own over a smaller vocabulary.

Names and shapes: SafeAILab/EAGLE (eagle/model/cnets1.py and cnets.py), as SGLang (models/llama_eagle.py,
llama_eagle3.py) and vLLM (the files of the same names) load them; all of them are Llama's layers.

Shapes: T rows, H hidden size, V words of the model, W words of the head, G layers that are tapped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from skyrl_train.attention import ATTENTION_NAME, AttentionContext
from skyrl_train.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Target:
    """Of the model that a head drafts for. `embed` and `lm_head` are its modules: their weights change with it."""

    embed: nn.Module
    norm: nn.Module
    lm_head: nn.Module
    hidden_size: int
    vocab_size: int
    num_layers: int

    @classmethod
    def of(cls, model: Any) -> Target:
        """Raises ConfigError for a model whose parts are not where transformers' decoders have them."""
        body = model.base_model
        embed, lm_head = model.get_input_embeddings(), model.get_output_embeddings()
        norm = getattr(body, "norm", None)
        if not isinstance(norm, nn.Module) or not isinstance(lm_head, nn.Linear):
            raise ConfigError(
                f"{type(model).__name__} has no final norm and linear head where EAGLE heads need them; use "
                "generator.speculative_decoding.algorithm ngram or standalone"
            )
        config = model.config.get_text_config()
        return cls(
            embed=embed,
            norm=norm,
            lm_head=lm_head,
            hidden_size=config.hidden_size,
            vocab_size=lm_head.weight.shape[0],
            num_layers=config.num_hidden_layers,
        )


class _Layer(nn.Module):
    """One Llama decoder layer; a head decides what goes into its attention."""

    def __init__(self, config: LlamaConfig, *, qkv_size: int, qkv_bias: bool) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx=0)
        for name in ("q_proj", "k_proj", "v_proj"):
            size = getattr(self.self_attn, name).out_features
            setattr(self.self_attn, name, nn.Linear(qkv_size, size, bias=qkv_bias))
        self.mlp = LlamaMLP(config)  # type: ignore[no-untyped-call]
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def attend(
        self,
        residual: torch.Tensor,
        inputs: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        context: AttentionContext,
    ) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=inputs, position_embeddings=rotary, attention_context=context)
        hidden = residual + attended
        out: torch.Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class _Eagle3Layer(_Layer):
    def __init__(self, config: LlamaConfig, *, qkv_bias: bool) -> None:
        super().__init__(config, qkv_size=2 * config.hidden_size, qkv_bias=qkv_bias)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class EagleHead(nn.Module):
    """EAGLE and EAGLE-2 (the same head; EAGLE-2 is how its tree is grown)."""

    algorithm = "eagle"

    def __init__(self, config: LlamaConfig, *, taps: tuple[int, ...], fc_bias: bool, qkv_bias: bool) -> None:
        """`taps`: what the model's final norm makes of its last layer (see base.Drafter)."""
        super().__init__()
        config._attn_implementation = ATTENTION_NAME
        self.config = config
        self.taps = taps
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=fc_bias)
        self.layers = nn.ModuleList([_Layer(config, qkv_size=config.hidden_size, qkv_bias=qkv_bias)])
        self.rotary_emb = LlamaRotaryEmbedding(config)

    def fuse(self, tapped: torch.Tensor) -> torch.Tensor:
        """What was tapped [T, H] -> what `forward` takes as the hidden states [T, H]."""
        return tapped

    def forward(
        self,
        embeds: torch.Tensor,
        hidden: torch.Tensor,
        position_ids: torch.Tensor,
        attention_context: AttentionContext,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """embeds and hidden [1, T, H], position_ids [1, T] -> (hidden states to go on from, those that the logits are
        taken of), both [1, T, H]."""
        rotary = self.rotary_emb(embeds, position_ids)
        inputs = self.fc(torch.cat((embeds, hidden), dim=-1))
        out = self.layers[0].attend(inputs, inputs, rotary, attention_context)  # type: ignore[operator]
        return out, out


class Eagle3Head(nn.Module):
    """EAGLE-3. Without `d2t` its vocabulary is the model's; without `lm_head` its last matrix is the model's.

    `d2t[i] + i` is the model's id of the head's word i, rising with i; `t2d` marks those words among the model's.
    """

    algorithm = "eagle3"
    d2t: torch.Tensor | None
    t2d: torch.Tensor | None

    def __init__(
        self,
        config: LlamaConfig,
        *,
        taps: tuple[int, ...],
        num_words: int | None,
        has_lm_head: bool = True,
        fc_bias: bool = False,
        qkv_bias: bool = False,
    ) -> None:
        """`taps`: layers of the model whose outputs are read, -1 is the input of the first. `num_words` W where the
        vocabulary is smaller than the model's, else None."""
        super().__init__()
        config._attn_implementation = ATTENTION_NAME
        self.config = config
        size, vocab = config.hidden_size, config.vocab_size
        assert vocab is not None
        self.taps = taps
        self.fc = nn.Linear(len(taps) * size, size, bias=fc_bias)
        self.midlayer = _Eagle3Layer(config, qkv_bias=qkv_bias)
        self.norm = LlamaRMSNorm(size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(size, num_words or vocab, bias=False) if has_lm_head else None
        self.register_buffer("d2t", None if num_words is None else torch.zeros(num_words, dtype=torch.int64))
        self.register_buffer("t2d", None if num_words is None else torch.zeros(vocab, dtype=torch.bool))
        self.rotary_emb = LlamaRotaryEmbedding(config)

    def fuse(self, tapped: torch.Tensor) -> torch.Tensor:
        """Outputs of the tapped layers [T, G * H] -> what `forward` takes as the hidden states [T, H]."""
        fused: torch.Tensor = self.fc(tapped)
        return fused

    def forward(
        self,
        embeds: torch.Tensor,
        hidden: torch.Tensor,
        position_ids: torch.Tensor,
        attention_context: AttentionContext,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As EagleHead's."""
        rotary, layer = self.rotary_emb(embeds, position_ids), self.midlayer
        inputs = torch.cat((layer.input_layernorm(embeds), layer.hidden_norm(hidden)), dim=-1)
        out = layer.attend(hidden, inputs, rotary, attention_context)
        return out, self.norm(out)


Head = EagleHead | Eagle3Head


def word_ids(head: Head) -> torch.Tensor | None:
    """The model's ids [W] of the head's words, rising; None where the words are the model's own."""
    if not isinstance(head, Eagle3Head) or head.d2t is None:
        return None
    return head.d2t + torch.arange(len(head.d2t), device=head.d2t.device)


def logits_of(head: Head, target: Target, words: torch.Tensor | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """From the second of `forward`'s results [T, H] to logits [T, W]. `words` [W] keeps those of the model's head."""
    own = head.lm_head if isinstance(head, Eagle3Head) else None
    if own is not None:
        return lambda hidden: own(hidden)
    if words is None:
        return lambda hidden: target.lm_head(hidden)
    kept = target.lm_head.weight[words].detach().clone()  # type: ignore[index]
    return lambda hidden: nn.functional.linear(hidden, kept)
