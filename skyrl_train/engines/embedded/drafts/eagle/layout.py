"""Heads from and to folders in the published layout.

    config.json                                        of Llama's form; what EAGLE-3 adds is below
    model.safetensors (or several with an index), or pytorch_model.bin as the first releases have it

    EAGLE     fc.{weight, bias}   layers.0.{self_attn.*, mlp.*, post_attention_layernorm}
    EAGLE-3   fc.weight   midlayer.{self_attn.*, mlp.*, input_layernorm, hidden_norm, post_attention_layernorm}
              norm.weight   lm_head.weight   d2t   t2d          (midlayer is layers.0 in newer ones)

An `embed_tokens.weight` in the file is the model's own, saved beside, and is not read; nor is EAGLE's `lm_head.weight`.
Sources: SafeAILab/EAGLE; sgl-project/sglang models/llama_eagle.py and llama_eagle3.py; vllm models/llama_eagle.py and
llama_eagle3.py; sgl-project/SpecForge for `eagle_config`.

Which layers are tapped: `eagle_config.eagle_aux_hidden_state_layer_ids` counts outputs of layers from 0 (SGLang,
SpecForge); a key of that name at the top counts hidden states, of which 0 is the embedding (vLLM, speculators). Both
are written. Without them it is the inputs of layers 2, n / 2 and n - 3 of n, as both servers take it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig

from skyrl_train.engines.embedded.drafts.eagle.head import Eagle3Head, EagleHead, Head, Target, word_ids
from skyrl_train.errors import ConfigError

Algorithm = Literal["eagle", "eagle3"]
MAX_NAMES_SHOWN = 3
VARIANTS = ("norm_before_fc", "fc_norm", "use_aux_norm", "norm_before_residual", "norm_output")
"""Later variants of EAGLE-3, each a key of the config that is not false: none is built."""
OF_THE_MODEL = ("embed_tokens.weight",)


def load_head(folder: str | Path, algorithm: Algorithm, target: Target, *, dtype: torch.dtype) -> Head:
    """The head in `folder`, for this model, in eval mode. Raises ConfigError naming what doesn't fit."""
    root = Path(folder)
    tensors = {_present_name(name, algorithm): tensor for name, tensor in _read(root).items()}
    if algorithm == "eagle3" and "d2t" in tensors and "t2d" not in tensors:
        tensors["t2d"] = _marked(tensors["d2t"], target.vocab_size)
    config = _read_config(root)
    _check_fits(root, config, target)
    build = _eagle if algorithm == "eagle" else _eagle3
    head = build(root, config, tensors, target)
    head.to(dtype).eval()
    _compare(root, algorithm, head, tensors)
    head.load_state_dict({name: tensors[name] for name in head.state_dict()})
    if isinstance(head, Eagle3Head):
        _check_words(root, head)
    return head.requires_grad_(False)


def save_head(head: Eagle3Head, folder: str | Path, *, num_layers: int) -> Path:
    """Write a folder that the servers load as well; the model has `num_layers`. Files already there are replaced."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    taps, config = head.taps, head.config
    words = word_ids(head)
    values = {
        **config.to_dict(),
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
        "draft_vocab_size": config.vocab_size if words is None else len(words),
        "num_aux_hidden_states": len(taps),
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(taps), "use_aux_hidden_state": True},
        "eagle_aux_hidden_state_layer_ids": [tap + 1 for tap in taps],
        "target_num_hidden_layers": num_layers,
        "dtype": str(head.fc.weight.dtype).removeprefix("torch."),
    }
    (root / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    save_file(state, root / "model.safetensors", metadata={"format": "pt"})
    return root


def default_taps(num_layers: int) -> tuple[int, ...]:
    """Where the config names none: outputs of layers 1, n / 2 - 1 and n - 4.

    A model of fewer than 7 layers has no three such ones: then first, middle and next to last, each once.
    """
    usual = (1, num_layers // 2 - 1, num_layers - 4)
    if num_layers >= 7:
        return usual
    last = num_layers - 2
    return tuple(sorted({-1 if last < 2 else 0, (last - 1) // 2 if last < 2 else last // 2, last}))


def _read_config(root: Path) -> LlamaConfig:
    try:
        values = json.loads((root / "config.json").read_text())
        kind = values.get("model_type", "llama")
        if kind != "llama":
            raise ConfigError(
                f"{root}: a draft head of model_type {kind!r} is not built here, only Llama's form; `python "
                "-m skyrl_train.recipes.eagle3` makes a head for a model, algorithm=standalone drafts with a whole one"
            )
        return LlamaConfig.from_pretrained(root, local_files_only=True)
    except (OSError, ValueError, TypeError, AttributeError) as exc:
        raise ConfigError(f"can't read the draft head's config in {root}: {exc}") from exc


def _check_fits(root: Path, config: LlamaConfig, target: Target) -> None:
    found = {"hidden_size": config.hidden_size, "vocab_size": config.vocab_size}
    for name, value in found.items():
        wanted = getattr(target, name)
        if value != wanted:
            raise ConfigError(f"{root}: the head's {name} is {value}, the model's {wanted}; it is for another model")
    if config.num_hidden_layers != 1:
        raise ConfigError(f"{root}: the head has {config.num_hidden_layers} layers, heads of one layer are built here")
    tapped_size = getattr(config, "target_hidden_size", target.hidden_size)
    if tapped_size != target.hidden_size:
        raise ConfigError(f"{root}: target_hidden_size is {tapped_size}, the model's hidden size {target.hidden_size}")
    nested = getattr(config, "eagle_config", None) or {}
    for name in VARIANTS:
        if getattr(config, name, None) or nested.get(name):
            raise ConfigError(f"{root}: {name} makes it a variant of EAGLE-3 that is not built here")


def _eagle(root: Path, config: LlamaConfig, tensors: Mapping[str, torch.Tensor], target: Target) -> EagleHead:
    return EagleHead(
        config,
        taps=(target.num_layers,),
        fc_bias="fc.bias" in tensors,
        qkv_bias="layers.0.self_attn.q_proj.bias" in tensors,
    )


def _eagle3(root: Path, config: LlamaConfig, tensors: Mapping[str, torch.Tensor], target: Target) -> Eagle3Head:
    words = getattr(config, "draft_vocab_size", None) or target.vocab_size
    if words < target.vocab_size and "d2t" not in tensors:
        raise ConfigError(
            f"{root}: {words} of the model's {target.vocab_size} words are drafted, and no d2t says which"
        )
    has_lm_head = "lm_head.weight" in tensors
    if not has_lm_head and words < target.vocab_size:
        raise ConfigError(f"{root}: there is no lm_head.weight for the head's own {words} words")
    return Eagle3Head(
        config,
        taps=_taps(root, config, target),
        num_words=words if "d2t" in tensors else None,
        has_lm_head=has_lm_head,
        fc_bias="fc.bias" in tensors,
        qkv_bias="midlayer.self_attn.q_proj.bias" in tensors,
    )


def _taps(root: Path, config: LlamaConfig, target: Target) -> tuple[int, ...]:
    nested = (getattr(config, "eagle_config", None) or {}).get("eagle_aux_hidden_state_layer_ids")
    at_top = getattr(config, "eagle_aux_hidden_state_layer_ids", None)
    if nested:
        taps = tuple(int(i) for i in nested)
    elif at_top:
        taps = tuple(int(i) - 1 for i in at_top)
    else:
        taps = default_taps(target.num_layers)
    if any(not -1 <= tap < target.num_layers for tap in taps) or list(taps) != sorted(set(taps)):
        raise ConfigError(
            f"{root}: the head reads the outputs of layers {list(taps)}, the model has layers 0 to "
            f"{target.num_layers - 1}; name rising ones in eagle_config.eagle_aux_hidden_state_layer_ids"
        )
    return taps


def _compare(root: Path, algorithm: Algorithm, head: Head, tensors: Mapping[str, torch.Tensor]) -> None:
    """Every name and shape, and whether numbers are of the right kind."""
    wanted = head.state_dict()
    ignored = {*OF_THE_MODEL, *(("lm_head.weight",) if algorithm == "eagle" else ())}
    different = []
    for name in sorted(wanted.keys() & tensors.keys()):
        mine, theirs = wanted[name], tensors[name]
        same_kind = theirs.dtype == mine.dtype if not mine.is_floating_point() else theirs.is_floating_point()
        if mine.shape != theirs.shape or not same_kind:
            kinds = [str(tensor.dtype).removeprefix("torch.") for tensor in (mine, theirs)]
            different.append(f"{name} (wanted {kinds[0]} {list(mine.shape)}, found {kinds[1]} {list(theirs.shape)})")
    problems = [
        f"{len(names)} {what}: {', '.join(names[:MAX_NAMES_SHOWN])}"
        for what, names in (
            ("missing", sorted(wanted.keys() - tensors.keys())),
            ("unknown", sorted(tensors.keys() - wanted.keys() - ignored)),
            ("different", different),
        )
        if names
    ]
    if problems:
        raise ConfigError(f"the weights in {root} are not those of an {algorithm} head: {'; '.join(problems)}")


def _marked(d2t: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """t2d, which says no more than d2t does, and which not every file has."""
    ids = d2t + torch.arange(len(d2t))
    return torch.isin(torch.arange(vocab_size), ids)


def _check_words(root: Path, head: Eagle3Head) -> None:
    ids = word_ids(head)
    if ids is None:
        return
    assert head.t2d is not None
    rising = bool((ids[1:] > ids[:-1]).all())
    if not rising or not 0 <= int(ids[0]) <= int(ids[-1]) < len(head.t2d):
        raise ConfigError(f"{root}: d2t does not name rising token ids below {len(head.t2d)}")
    if not torch.equal(head.t2d.nonzero()[:, 0], ids):
        raise ConfigError(f"{root}: d2t and t2d name different tokens")


def _present_name(name: str, algorithm: Algorithm) -> str:
    if algorithm == "eagle3" and name.startswith("layers.0."):
        return f"midlayer.{name.removeprefix('layers.0.')}"
    return name


def _read(root: Path) -> dict[str, torch.Tensor]:
    try:
        return dict(_tensors(root))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as exc:
        raise ConfigError(f"can't read the draft head's weights in {root}: {exc}") from exc


def _tensors(root: Path) -> Iterator[tuple[str, torch.Tensor]]:
    index, single = root / "model.safetensors.index.json", root / "model.safetensors"
    pickled = root / "pytorch_model.bin"
    if index.is_file():
        files = [root / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    elif single.is_file():
        files = [single]
    elif pickled.is_file():
        found: dict[str, Any] = torch.load(pickled, map_location="cpu", weights_only=True)
        yield from found.items()
        return
    else:
        raise OSError("neither model.safetensors, nor its index, nor pytorch_model.bin is there")
    for path in files:
        with safe_open(path, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - no mapping: it has nothing but this
                yield name, stored.get_tensor(name)
