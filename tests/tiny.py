"""Tiny random models and a byte-level tokenizer, made from a configuration and a seed: nothing is downloaded.

Token id b < 256 is the byte b; then <|endoftext|> (padding), <|im_start|>, <|im_end|> (end of sequence), filler.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from skyrl_train.attention import ATTENTION_NAME

VOCAB_SIZE = 300
EOS_ID = 258
PAD_ID = 256
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
}
ARCHITECTURES = ("qwen2", "qwen3", "llama", "mistral", "olmo2", "phi3", "gemma3_text")


def make_model(
    arch: str = "qwen2", *, seed: int = 0, attn_implementation: str = ATTENTION_NAME, **overrides: Any
) -> PreTrainedModel:
    """A float32 causal language model in eval mode; equal arguments give equal weights."""
    shape = {**SHAPE, **overrides}
    if arch in {"qwen3", "gemma3_text"}:
        shape.setdefault("head_dim", shape["hidden_size"] // shape["num_attention_heads"])
    torch.manual_seed(seed)
    config = AutoConfig.for_model(arch, **shape)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation, dtype=torch.float32)
    return model.eval()


def make_tokenizer(vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Text is encoded byte by byte; filler words are only ever produced by the model."""
    words = [*_byte_alphabet(), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words += [f"w{i}" for i in range(len(words), vocab_size)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _byte_alphabet() -> list[str]:
    """The printable character that byte-level tokenizers use for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    chars = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [chars[b] for b in range(256)]
