"""The models `builtin:arithmetic` and `builtin:calculator`: made on this machine, so a first run needs no download.

Each is a Qwen2 of 0.4 million weights with Qwen2's own kind of tokenizer (bytes, a few words, ChatML). It is made from
a seed, taught the form of an answer, or of a call of the tool, by a short supervised warm start (see warm_start), and
kept in the cache.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from skyrl_train.cache import cache_root
from skyrl_train.data import conversations
from skyrl_train.environments import arithmetic, calculator
from skyrl_train.errors import ConfigError
from skyrl_train.rollout import samples
from skyrl_train.training import warm_start
from skyrl_train.training.model import export_hf

PREFIX = "builtin:"

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
WORDS = ("What", "Ġis", "Ġ+", "system", "user", "assistant")
"""One token each (Ġ is a space in byte-level vocabularies); other text is spelled in bytes: anything can be asked."""
CALL_WORDS = (*WORDS, "Ġ*", "<calc", "</", "calc")

MODELS: dict[str, tuple[tuple[str, ...], warm_start.Lesson, tuple[ModuleType, ...]]] = {
    "builtin:arithmetic": (WORDS, warm_start.ARITHMETIC, (arithmetic,)),
    "builtin:calculator": (CALL_WORDS, warm_start.CALCULATOR, (arithmetic, calculator, conversations, samples)),
}
"""Name -> its words, what it is taught, and the modules that this depends on."""
NAMES = tuple(MODELS)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}


def is_builtin(path: str) -> bool:
    """Whether a model path names a model that is made here."""
    return path.startswith(PREFIX)


def prepare_builtin(path: str, *, seed: int, on_progress: warm_start.OnProgress) -> Path:
    """The model's folder, made and warm-started at the first call with this seed and this code, then from the cache.

    The global random state is the same afterwards, made or found. Raises ConfigError for an unknown name.
    """
    if path not in NAMES:
        raise ConfigError(f"no built-in model {path!r}; there is {', '.join(NAMES)}")
    words, lesson, sources = MODELS[path]
    folder = cache_root() / f"{path.removeprefix(PREFIX)}-{_fingerprint(seed, sources)}"
    if not folder.exists():
        tokenizer = make_tokenizer(words)
        model = make_model(tokenizer, seed=seed)
        warm_start.teach_form(model, tokenizer, lesson, seed=seed, on_progress=on_progress)
        # Written beside and renamed: an interrupted warm start leaves nothing that looks like a model.
        beside = folder.with_name(f"{folder.name}.{os.getpid()}")
        export_hf(model, tokenizer, beside)
        try:
            beside.rename(folder)
        except OSError:
            shutil.rmtree(beside)
            if not folder.exists():
                raise
            # Otherwise another process made the same model meanwhile.
    return folder


def make_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> Qwen2ForCausalLM:
    """Random weights that the seed fixes."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SHAPE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


@functools.cache
def make_tokenizer(words: tuple[str, ...] = WORDS) -> PreTrainedTokenizerFast:
    """ "What is 23 + 48?" is `What|Ġis|Ġ|2|3|Ġ+|Ġ|4|8|?`.

    For a Qwen2 folder AutoTokenizer rebuilds Qwen2's tokenizer from vocabulary and merges, whatever tokenizer.json
    says: one of another kind would train well and come back from disk as something else.
    """
    merges = list(dict.fromkeys((word[:i], word[i]) for word in words for i in range(1, len(word))))
    tokens = [PAD, START, END, *sorted(ByteLevel.alphabet()), *(left + right for left, right in merges)]
    tokenizer: PreTrainedTokenizerFast = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,  # type: ignore[arg-type]
        unk_token=None,  # type: ignore[arg-type]
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
    )
    return tokenizer


def _fingerprint(seed: int, modules: tuple[ModuleType, ...]) -> str:
    """Changes with everything that the weights depend on: this code, the libraries, the seed."""
    here: ModuleType = inspect.getmodule(_fingerprint)  # type: ignore[assignment]
    sources = "".join(inspect.getsource(module) for module in (here, warm_start, *modules))
    versions = f"{torch.__version__} {transformers.__version__} {torch.get_num_threads()}"
    return hashlib.sha256(f"{seed} {versions} {sources}".encode()).hexdigest()[:16]
