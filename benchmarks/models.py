"""Models by the name of their shape, with random weights, and what one forward pass of them must read and compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

PAD_ID = 0
NUM_POSITIONS = 4096
FIRST_WORD_ID = 1
"""Prompts are drawn from [FIRST_WORD_ID, vocab_size)."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A Qwen2 architecture: grouped-query attention, SwiGLU, biases on q, k and v."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    tied: bool

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_layer_weights(self) -> int:
        """Weights of all layers that a token is multiplied with."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def num_head_weights(self) -> int:
        return self.hidden_size * self.vocab_size

    @property
    def num_step_weights(self) -> int:
        """Weights that a decode step must read whatever the batch: the layers and the head."""
        return self.num_layer_weights + self.num_head_weights

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype.itemsize

    def attention_flops(self, context_len: int) -> int:
        """Of one new token that looks at `context_len` tokens: scores and values, a multiply and an add each."""
        return 4 * self.num_layers * self.num_heads * self.head_dim * context_len


SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape(
            name="tiny",
            hidden_size=256,
            intermediate_size=1024,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            vocab_size=4096,
            tied=True,
        ),
        ModelShape(
            name="small",
            hidden_size=512,
            intermediate_size=2048,
            num_layers=8,
            num_heads=8,
            num_kv_heads=2,
            vocab_size=16384,
            tied=True,
        ),
        ModelShape(
            name="0.5b",
            hidden_size=896,
            intermediate_size=4864,
            num_layers=24,
            num_heads=14,
            num_kv_heads=2,
            vocab_size=151936,
            tied=True,
        ),
        ModelShape(
            name="7b",
            hidden_size=3584,
            intermediate_size=18944,
            num_layers=28,
            num_heads=28,
            num_kv_heads=4,
            vocab_size=152064,
            tied=False,
        ),
    )
}


def build_model(
    shape: ModelShape, *, attn_implementation: str, device: str, dtype: torch.dtype, seed: int = 0
) -> PreTrainedModel:
    """In eval mode. Equal arguments give equal weights, whatever the attention implementation.

    No end token: every completion has the length that was asked for.
    """
    config = Qwen2Config(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=NUM_POSITIONS,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD_ID,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    return model.eval()


def twin_on_same_weights(model: PreTrainedModel, *, attn_implementation: str) -> PreTrainedModel:
    """A second module with another attention over the very same parameters: no peer runs on other weights."""
    twin = AutoModelForCausalLM.from_config(
        type(model.config).from_dict(model.config.to_dict()), dtype=model.dtype, attn_implementation=attn_implementation
    )
    twin.to(model.device)
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.tie_weights()
    assert all(
        a is b or a.data_ptr() == b.data_ptr() for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )
    return twin.eval()


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Word `t17` is token 17. The end token's id is `vocab_size`: no model here can sample it.

    So a library that insists on an end token makes completions of the full length, without paying for a processor
    that suppresses it.
    """
    words = {f"t{i}": i for i in range(vocab_size)}
    words["<pad>"] = words.pop(f"t{PAD_ID}")
    words["<end>"] = vocab_size
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )


BYTE_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\\n{% endfor %}"


def build_byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Text is read byte by byte, one token each; token i >= 259 is the word `w<i>`, which only a model writes.

    Vocabulary and merges are of Qwen2's kind, so a folder of a Qwen2 model gives this tokenizer back.
    """
    words = [*_byte_alphabet(), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words += [f"w{i}" for i in range(len(words), vocab_size)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        chat_template=BYTE_CHAT_TEMPLATE,
    )


def _byte_alphabet() -> list[str]:
    """The printable character that byte-level tokenizers use for each byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


def to_text(token_ids: tuple[int, ...]) -> str:
    """The text that `build_tokenizer` reads back as these ids."""
    return " ".join(f"t{i}" for i in token_ids)
