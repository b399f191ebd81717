"""Models from and to HF folders, and what the trainer needs to know about one.

`load_model` gives the module that trainer and embedded engine both run: transformers' own, with the attention of
`skyrl_train.attention`. `PolicyHead` is its head, proven by a probe to give the model's logits.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from skyrl_train.attention import ATTENTION_NAME, AttentionContext
from skyrl_train.data.pack import MicroBatch
from skyrl_train.errors import ConfigError
from skyrl_train.training.attention import packed_attention
from skyrl_train.training.logprobs import LogitTransform, TokenLogprobs, token_logprobs

PROBE_TOKENS = 5


def load_model(path: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> PreTrainedModel:
    """The causal language model in an HF folder, in eval mode. Raises ConfigError if it uses dropout or isn't there."""
    if not (Path(path) / "config.json").is_file():
        raise ConfigError(f"no model at {path}: an HF folder with config.json and weights is needed")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation=ATTENTION_NAME, local_files_only=True
    )
    refuse_dropout(model)
    model.to(device).eval()  # type: ignore[arg-type]
    return model


def export_hf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    also: Callable[[Path], None] | None = None,
) -> Path:
    """Write an HF folder that transformers loads. It appears whole: written beside and renamed.

    An export already there is replaced. `also` writes more into it.
    """
    folder = Path(folder)
    beside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    model.save_pretrained(beside)
    if tokenizer is not None:
        tokenizer.save_pretrained(beside)
    if also is not None:
        also(beside)
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
        os.rename(beside, folder)
        shutil.rmtree(old)
    else:
        os.rename(beside, folder)
    return folder


def check_same_tokens(other: str | Path, policy: str | Path, *, role: str = "reference model") -> None:
    """The policy's ids mean something to the other model only where they are the same tokens. Raises ConfigError."""
    if Path(other) == Path(policy):
        return
    try:
        ours, theirs = (
            AutoTokenizer.from_pretrained(folder, local_files_only=True).get_vocab() for folder in (policy, other)
        )
    except (OSError, ValueError) as exc:
        raise ConfigError(f"the tokenizers of {policy} and of the {role} {other} can't be compared: {exc}") from exc
    different = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    if different:
        token = different[0]
        raise ConfigError(
            f"the {role} {other} has another tokenizer than the policy {policy}: {len(different)} tokens "
            f"differ, {token!r} is {theirs.get(token)} there and {ours.get(token)} here; take one of its family"
        )


def refuse_dropout(model: torch.nn.Module) -> None:
    """Dropout makes old and new log-probabilities differ by chance. Raises ConfigError naming the modules."""
    active = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    active += [
        f"{name}.attention_dropout"
        for name, m in model.named_modules()
        if isinstance(p := getattr(m, "attention_dropout", 0.0), float) and p > 0
    ]
    if active:
        raise ConfigError(
            f"{type(model).__name__} uses dropout in {active[0]} and {len(active) - 1} more modules; "
            "set the dropout entries of its config.json to 0"
        )


class PolicyHead:
    """Hidden states and log-probabilities of one model; knows how its logits come from its head."""

    def __init__(self, model: PreTrainedModel, *, temperature: float) -> None:
        """Probes the model with `temperature` checked too. Raises ConfigError for an architecture not understood."""
        if temperature <= 0:
            raise ConfigError(f"training needs a sampling temperature > 0, found {temperature}")
        self.model = model
        self.temperature = temperature
        self._head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if not isinstance(self._head, torch.nn.Linear):
            raise ConfigError(f"{type(model).__name__} has no linear language-model head")
        self._transform = _discover_transform(model, self._head)

    def over(self, model: PreTrainedModel) -> PolicyHead:
        """The same for another module of this architecture, which is not probed: somebody else may be running it."""
        other = copy.copy(self)
        other.model, other._head = model, model.get_output_embeddings()  # type: ignore[no-untyped-call]
        return other

    def at_temperature(self, temperature: float) -> PolicyHead:
        """The same model, read at another temperature."""
        other = copy.copy(self)
        other.temperature = temperature
        return other

    def attention(self, micro_batch: MicroBatch) -> AttentionContext:
        """How the rows of this micro-batch, and of no other, look at each other."""
        return packed_attention(micro_batch, device=self.model.device, dtype=self.model.dtype)

    def __call__(
        self,
        token_ids: torch.Tensor,
        position_ids: torch.Tensor,
        predict_rows: torch.Tensor,
        target_ids: torch.Tensor,
        attention_context: AttentionContext,
    ) -> TokenLogprobs:
        """token_ids and position_ids [T]; rows and targets [N] on the model's device."""
        hidden = hidden_states(self.model, token_ids, position_ids, attention_context)
        return token_logprobs(
            hidden.index_select(0, predict_rows),
            self._head.weight,
            target_ids,
            bias=self._head.bias,
            temperature=self.temperature,
            transform=self._transform,
        )


def hidden_states(
    model: torch.nn.Module, token_ids: torch.Tensor, position_ids: torch.Tensor, context: AttentionContext
) -> torch.Tensor:
    """Last hidden states [T, H] of one packed row [T], after the model's final norm."""
    base: Any = model.base_model
    out = base(input_ids=token_ids[None], position_ids=position_ids[None], use_cache=False, attention_context=context)
    hidden: torch.Tensor = out.last_hidden_state[0]
    return hidden


@torch.no_grad()
def hidden_size(model: PreTrainedModel) -> int:
    """H, seen by running the model on a few tokens. Raises ConfigError where it can't run packed rows."""
    token_ids = torch.arange(1, 1 + PROBE_TOKENS, device=model.device)
    try:
        hidden = hidden_states(model, token_ids, token_ids - 1, _CausalProbe())
    except (NotImplementedError, AttributeError, TypeError) as exc:
        raise ConfigError(f"{type(model).__name__} can't be trained here: {exc}") from exc
    return hidden.shape[-1]


class _CausalProbe:
    """Plain causal attention over one short sequence."""

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out[0].transpose(0, 1)


@torch.no_grad()
def _discover_transform(model: PreTrainedModel, head: torch.nn.Linear) -> LogitTransform:
    """What the model does after its head, seen by running it with a ramp in the place of the head's output.

    Gemma caps (`final_logit_softcapping`), Cohere multiplies (`logit_scale`), Granite divides (`logits_scaling`).
    Raises ConfigError if none of these gives the model's logits, or if the head reads something else than the
    last hidden state.
    """
    name = type(model).__name__
    weight = head.weight
    token_ids = torch.arange(1, 1 + PROBE_TOKENS, device=weight.device) % weight.shape[0]
    positions = torch.arange(PROBE_TOKENS, device=weight.device)
    ramp = torch.linspace(-100, 100, weight.shape[0], device=weight.device).to(weight.dtype)
    seen: list[torch.Tensor] = []

    def replace(_: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        seen.append(inputs[0])
        return ramp.expand_as(output)

    hook = head.register_forward_hook(replace)
    try:
        logits = (
            model(
                input_ids=token_ids[None],
                position_ids=positions[None],
                use_cache=False,
                attention_context=_CausalProbe(),
            )
            .logits[0, -1]
            .float()
        )
    except NotImplementedError as exc:
        raise ConfigError(f"{name} can't be trained here: {exc}") from exc
    finally:
        hook.remove()
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 3e-2
    hidden = hidden_states(model, token_ids, positions, _CausalProbe())
    if len(seen) != 1 or not torch.allclose(seen[0][0].float(), hidden.float(), rtol=tolerance, atol=tolerance):
        raise ConfigError(f"{name}: its head does not read the last hidden state; it can't be trained here")
    config = model.config.get_text_config()
    scales = {
        1.0,
        float(getattr(config, "logit_scale", None) or 1),
        1 / float(getattr(config, "logits_scaling", None) or 1),
    }
    caps = {None, getattr(config, "final_logit_softcapping", None)}
    for transform in (LogitTransform(scale=scale, softcap=cap) for scale in scales for cap in caps):
        if torch.allclose(transform(ramp.float()), logits, rtol=tolerance, atol=tolerance):
            return transform
    raise ConfigError(
        f"{name}: its logits are not its head's output, and no known scaling or capping explains the difference; "
        "this architecture can't be trained here"
    )
