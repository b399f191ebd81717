"""A decoder of the common form with its small parts fused, for inference on a GPU.

    x --norm-- qkv --rotate, store-- attend -- o --add, norm-- gate, up -- silu * -- down --add, norm-- next layer ...
               one product                                     one product

Whether a model has this form is seen from what it computes: its modules are run with random weights beside `forward`
here on the same weights, every layer with its own settings, and the logits must agree (`recognise`). Names only say
where to look for the parts. A model of another form (other norms, activations, multipliers, adapters) stays as it is.

Parameters are read through the modules' own dictionaries, so assigning a new Parameter there is seen.

Shapes: T rows, H hidden size, V words, Hq query heads, Hkv key/value heads, D head size, C positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from skyrl_train.engines.embedded.packed_weights import PackedLinears, shared_pointers

TOLERANCE = 5e-3
"""Of the largest logit. A trainer may have allowed tf32 products, whose error is 1e-3."""
TRIAL_WORDS = 32
TRIAL_POSITIONS = (0, 1, 2, 5, 11, 12)

Norms = tuple[torch.Tensor, float, torch.Tensor, float]
"""Weight and epsilon of the query's norm, then of the key's."""


class NotThisForm(Exception):
    """Why a model can't be served by `FusedDecoder`."""


class DecoderContext(Protocol):
    """Where rows come from and what they may look at."""

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        tables: tuple[torch.Tensor, torch.Tensor],
        norms: Norms | None,
        scaling: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Norm, rotate, store, attend. query [T, Hq, D] (may be written), key and value [T, Hkv, D] -> [T, Hq, D].

        `tables`: cosines and sines [C, D] of every position.
        """
        ...


class Operations(Protocol):
    """`triton_elementwise` has these names; `TorchOperations` says what they mean."""

    @property
    def rms_norm(self) -> Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]: ...

    @property
    def add_rms_norm(
        self,
    ) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]: ...

    @property
    def silu_times(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]: ...


class TorchOperations:
    """The definitions, in plain torch."""

    @staticmethod
    def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    @staticmethod
    def add_rms_norm(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = residual + x
        return TorchOperations.rms_norm(total, weight, eps), total

    @staticmethod
    def silu_times(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(gate) * up


@dataclass(frozen=True, kw_only=True, eq=False)
class Norm:
    module: nn.Module
    eps: float

    @property
    def weight(self) -> torch.Tensor:
        return _parameter(self.module, "weight")


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    index: int
    head_dim: int
    scaling: float
    sliding_window: int | None
    input_norm: Norm
    qkv: PackedLinears
    head_norms: tuple[Norm, Norm] | None
    output: nn.Module
    mlp_norm: Norm
    gate_up: PackedLinears
    down: nn.Module

    @property
    def norms(self) -> Norms | None:
        if self.head_norms is None:
            return None
        query, key = self.head_norms
        return query.weight, query.eps, key.weight, key.eps


class FusedDecoder:
    """`model` as `forward` computes it; `tables` are the cosines and sines [C, D] of its positions."""

    def __init__(self, model: nn.Module, settings: dict[int, LayerSettings], context_len: int, *, pack: bool) -> None:
        body, self._head = _child(model, "model"), _child(model, "lm_head")
        self._embedding = _child(body, "embed_tokens")
        self._final_norm = _norm(_child(body, "norm"))
        shared = shared_pointers(model) if pack else None
        layers = _child(body, "layers")
        self._layers = [_layer(layer, settings, shared) for layer in layers._modules.values() if layer is not None]
        weight = self.embedding
        positions = torch.arange(context_len, device=weight.device)[None]
        cosines, sines = _child(body, "rotary_emb")(weight[:1, None], positions)
        if cosines.shape != (1, context_len, self._layers[0].head_dim) or cosines.dtype != weight.dtype:
            raise NotThisForm(f"its rotary embedding gives {tuple(cosines.shape)} numbers of {cosines.dtype}")
        self.tables = (cosines[0].contiguous(), sines[0].contiguous())

    @property
    def embedding(self) -> torch.Tensor:
        """[V, H]."""
        return _parameter(self._embedding, "weight")

    @property
    def layers(self) -> Sequence[Layer]:
        return self._layers

    @property
    def final_norm(self) -> Norm:
        return self._final_norm

    @property
    def head(self) -> nn.Module:
        return self._head

    @property
    def num_words(self) -> int:
        """V."""
        return _parameter(self._head, "weight").shape[0]

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, H]."""
        return nn.functional.embedding(token_ids, self.embedding)

    def forward(self, hidden: torch.Tensor, context: DecoderContext, operations: Operations) -> torch.Tensor:
        """Embeddings [T, H] -> final hidden states [T, H], normed."""
        residual, num_rows = hidden, len(hidden)
        normed = operations.rms_norm(hidden, self._layers[0].input_norm.weight, self._layers[0].input_norm.eps)
        following = [*(layer.input_norm for layer in self._layers[1:]), self._final_norm]
        for layer, next_norm in zip(self._layers, following, strict=True):
            query, key, value = (x.view(num_rows, -1, layer.head_dim) for x in layer.qkv(normed))
            attended = context.attend(
                layer.index,
                query,
                key,
                value,
                tables=self.tables,
                norms=layer.norms,
                scaling=layer.scaling,
                sliding_window=layer.sliding_window,
            )
            out = _linear(layer.output, attended.reshape(num_rows, -1))
            normed, residual = operations.add_rms_norm(out, residual, layer.mlp_norm.weight, layer.mlp_norm.eps)
            gate, up = layer.gate_up(normed)
            out = _linear(layer.down, operations.silu_times(gate, up))
            normed, residual = operations.add_rms_norm(out, residual, next_norm.weight, next_norm.eps)
        return normed

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final hidden states [n, H] -> [n, V]."""
        return _linear(self._head, hidden)

    def separate_what_moved(self) -> int:
        """Where parameters have left the packed memory, compute their maps one by one; how many groups did."""
        moved = [group for layer in self._layers for group in (layer.qkv, layer.gate_up) if not group.is_intact()]
        for group in moved:
            group.separate()
        return len(moved)

    @property
    def num_packed(self) -> int:
        """Groups of maps that are one product now."""
        return sum(group.is_packed for layer in self._layers for group in (layer.qkv, layer.gate_up))


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """What a layer's attention asks for, as seen in a run."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float
    sliding_window: int | None


def recognise(model: nn.Module, context_len: int, *, pack: bool = True) -> FusedDecoder:
    """The model in fused form, its weights packed if `pack`. Raises NotThisForm, the model untouched, if it isn't one.

    Runs it once on a few rows with random float32 weights: one layer's worth of memory, freed again.
    """
    parameters = list(model.parameters())
    if len({(parameter.dtype, parameter.device) for parameter in parameters}) != 1:
        raise NotThisForm("its parameters are of several types or on several devices")
    _check_names(model)
    with torch.no_grad():
        trial = _RandomCopies(parameters[0].device).of(model)
        context = _TrialContext()
        ids = torch.arange(len(TRIAL_POSITIONS), device=parameters[0].device) * 5 % TRIAL_WORDS
        positions = torch.tensor([TRIAL_POSITIONS], device=ids.device)
        try:
            expected = trial(
                input_ids=ids[None], position_ids=positions, use_cache=False, attention_context=context
            ).logits[0]
            mine = FusedDecoder(trial, context.settings, 1 + max(TRIAL_POSITIONS), pack=False)
            mine_context = _TrialContext(positions[0])
            got = mine.logits(mine.forward(mine.embed(ids), mine_context, TorchOperations()))
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError, NotImplementedError) as exc:
            raise NotThisForm(f"it does not run as one: {exc}") from exc
        if context.settings != mine_context.settings or got.shape != expected.shape:
            raise NotThisForm("its attention is of another shape")
        error = float((got - expected).abs().max() / expected.abs().max())
        if not error < TOLERANCE:
            raise NotThisForm(f"on random weights its logits differ by {error:.1e} of the largest")
        return FusedDecoder(model, context.settings, context_len, pack=pack)


# -- where the parts are

_TOP = frozenset({"model", "lm_head"})
_BODY = frozenset({"embed_tokens", "layers", "norm", "rotary_emb"})
_LAYER = frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
_HEAD_NORMS = frozenset({"q_norm", "k_norm"})
_MLP = frozenset({"gate_proj", "up_proj", "down_proj", "act_fn"})


def _check_names(model: nn.Module) -> None:
    def check(module: nn.Module, where: str, *wanted: frozenset[str]) -> None:
        if set(module._modules) not in wanted or module._parameters:
            raise NotThisForm(f"{where} ({type(module).__name__}) consists of {sorted(module._modules)}")
        if module._forward_hooks or module._forward_pre_hooks:
            raise NotThisForm(f"{where} ({type(module).__name__}) has forward hooks")

    check(model, "the model", _TOP)
    body = _child(model, "model")
    check(body, "its body", _BODY)
    for number, layer in _child(body, "layers")._modules.items():
        assert layer is not None
        where = f"layer {number}"
        check(layer, where, _LAYER)
        check(_child(layer, "self_attn"), f"the attention of {where}", _ATTENTION, _ATTENTION | _HEAD_NORMS)
        check(_child(layer, "mlp"), f"the MLP of {where}", _MLP)
    for name, module in model.named_modules():
        if module._parameters and (module._modules or not set(module._parameters) <= {"weight", "bias"}):
            raise NotThisForm(f"{name} ({type(module).__name__}) holds {sorted(module._parameters)}")
        if module._parameters and (module._forward_hooks or module._forward_pre_hooks):
            raise NotThisForm(f"{name} ({type(module).__name__}) has forward hooks")


def _layer(layer: nn.Module, settings: dict[int, LayerSettings], shared: frozenset[int] | None) -> Layer:
    """`shared` None: pack nothing."""
    attention, mlp = _child(layer, "self_attn"), _child(layer, "mlp")
    index: Any = attention.layer_idx
    seen = settings[index]
    group = shared if shared is not None else _everything(layer)
    has_norms = "q_norm" in attention._modules
    return Layer(
        index=index,
        head_dim=seen.head_dim,
        scaling=seen.scaling,
        sliding_window=seen.sliding_window,
        input_norm=_norm(_child(layer, "input_layernorm")),
        qkv=PackedLinears([_child(attention, name) for name in ("q_proj", "k_proj", "v_proj")], shared=group),
        head_norms=(_norm(_child(attention, "q_norm")), _norm(_child(attention, "k_norm"))) if has_norms else None,
        output=_child(attention, "o_proj"),
        mlp_norm=_norm(_child(layer, "post_attention_layernorm")),
        gate_up=PackedLinears([_child(mlp, name) for name in ("gate_proj", "up_proj")], shared=group),
        down=_child(mlp, "down_proj"),
    )


def _everything(module: nn.Module) -> frozenset[int]:
    return frozenset(parameter.data_ptr() for parameter in module.parameters())


def _norm(module: nn.Module) -> Norm:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float) or list(module._parameters) != ["weight"]:
        raise NotThisForm(f"{type(module).__name__} is no RMSNorm with a weight and an epsilon")
    return Norm(module=module, eps=eps)


def _child(module: nn.Module, name: str) -> nn.Module:
    child = module._modules[name]
    assert child is not None
    return child


def _parameter(module: nn.Module, name: str) -> torch.Tensor:
    parameter = module._parameters[name]
    assert parameter is not None
    return parameter


def _linear(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, _parameter(module, "weight"), module._parameters.get("bias"))


# -- the trial


class _RandomCopies:
    """Modules with random weights in place of their own; one set of numbers serves all layers."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._generator = torch.Generator(device).manual_seed(0)
        self._numbers: dict[tuple[str, tuple[int, ...]], nn.Parameter] = {}

    def of(self, module: nn.Module, name: str = "") -> nn.Module:
        copy = object.__new__(type(module))
        children = {
            child_name: None if child is None else self.of(child, child_name)
            for child_name, child in module._modules.items()
        }
        words = isinstance(module, nn.Embedding) or name == "lm_head"
        parameters = {
            key: None if value is None else self._random(f"{name}.{key}", value, words)
            for key, value in module._parameters.items()
        }
        own = {key: value for key, value in module.__dict__.items() if key not in children}
        copy.__dict__ = {**own, "_modules": children, "_parameters": parameters, "training": False}
        if isinstance(copy, nn.Embedding):
            copy.padding_idx = None  # beyond the few words; it means nothing without gradients
        return copy

    def _random(self, key: str, like: torch.Tensor, words: bool) -> nn.Parameter:
        shape = (TRIAL_WORDS, *like.shape[1:]) if words else tuple(like.shape)
        if (key, shape) not in self._numbers:
            numbers = torch.randn(shape, generator=self._generator, device=self._device)
            if len(shape) > 1 and not key.startswith("embed"):
                numbers /= shape[-1] ** 0.5
            self._numbers[key, shape] = nn.Parameter(numbers, requires_grad=False)
        return self._numbers[key, shape]


class _TrialContext:
    """Causal attention over the rows as they come; notes what each layer asks for.

    With `positions` [T] it does what `DecoderContext` says, without them what the original's attention expects.
    """

    def __init__(self, positions: torch.Tensor | None = None) -> None:
        self.settings: dict[int, LayerSettings] = {}
        self._positions = positions

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        tables: tuple[torch.Tensor, torch.Tensor] | None = None,
        norms: Norms | None = None,
    ) -> torch.Tensor:
        if layer_idx in self.settings or key.shape != value.shape:
            raise NotThisForm(f"layer {layer_idx} attends twice, or to values of another shape")
        self.settings[layer_idx] = LayerSettings(
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_dim=query.shape[2],
            scaling=scaling,
            sliding_window=sliding_window,
        )
        if tables is not None and self._positions is not None:
            if norms is not None:
                query = TorchOperations.rms_norm(query, *norms[:2])
                key = TorchOperations.rms_norm(key, *norms[2:])
            cosines, sines = (table[self._positions][:, None] for table in tables)
            query, key = (x * cosines + _rotated_half(x) * sines for x in (query, key))
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        return out[0].transpose(0, 1)


def _rotated_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
