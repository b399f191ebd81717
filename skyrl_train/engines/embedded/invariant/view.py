"""The trainer's module with every part that computes replaced by an invariant one; the same parameters.

Parts are recognised by what they compute on random numbers, as in `fused`. What isn't recognised is refused by name:
a model is invariant as a whole or not at all. What stands between the parts (additions, products, gathers) is torch's:
exact in each element, whatever the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import nn

from skyrl_train.attention import ATTENTION_NAME
from skyrl_train.engines.embedded.fused import Rotary
from skyrl_train.engines.embedded.invariant import operations
from skyrl_train.engines.embedded.invariant.kernels import invariant_kernels
from skyrl_train.engines.embedded.native.build import load_native
from skyrl_train.engines.embedded.packed_linear import PackedMatrix, Packing
from skyrl_train.engines.embedded.twin import ROTARY, InferenceModel, TwinBuilder
from skyrl_train.errors import ConfigError

TOLERANCE = 2e-6
ANGLES_TOGETHER = 64
"""Positions whose angles are computed in one call: always this shape, so always the same bits."""

NUM_TRIED = 14
"""Tokens: more than a tile of the linear maps has rows."""

HARMLESS = (nn.Embedding, nn.Dropout, nn.Identity)


class InvariantModel(InferenceModel):
    """Differentiable, unlike its parent: the trainer runs it too. Raises ConfigError for a model it can't take over."""

    def __init__(self, original: nn.Module, *, packs_weights: bool = False) -> None:
        """`packs_weights`: keep copies of them as the kernels like them; every update must end in `weights_changed`."""
        invariant_kernels()
        super().__init__(original, load_native(), packs_weights=packs_weights)

    def _new_packing(self) -> Packing | None:
        return InvariantPacking(load_native()) if self._packs_weights else None

    def _twin(self, original: nn.Module) -> nn.Module:
        other = sorted({f"{p.dtype} on {p.device}" for p in original.parameters()} - {"torch.float32 on cpu"})
        if other:
            raise ConfigError(
                "deterministic inference is built for float32 weights on the CPU, found "
                f"{', '.join(other)}; set trainer.policy.model.dtype=float32 and train on the CPU, or leave it out"
            )
        twin = _InvariantBuilder(original, self.packing).twin(original)
        _try(twin)
        return twin


class InvariantPacking(Packing):
    """In the invariant kernels' own layout."""

    def pack(self, weight: torch.Tensor, up: torch.Tensor | None, packed: torch.Tensor) -> None:
        assert up is None
        invariant_kernels().pack(weight, packed)


class _InvariantBuilder(TwinBuilder):
    def __init__(self, original: nn.Module, packing: Packing | None) -> None:
        super().__init__(None, packing)
        self._names = {id(module): name for name, module in original.named_modules()}
        self._model = type(original).__name__

    def _build(self, module: nn.Module) -> nn.Module:
        part = _as_invariant(module, self._packing)
        if part is not None:
            part.training = False
            return part
        own = [name for name, parameter in module._parameters.items() if parameter is not None]
        if not isinstance(module, HARMLESS) and (own or not module._modules):
            raise ConfigError(
                f"deterministic inference does not know {type(module).__name__} ({self._names[id(module)]} of "
                f"{self._model}): it has invariant linear maps, RMSNorm, SiLU, GELU by tanh and rotary embeddings "
                "in halves; leave generator.deterministic_inference out for this model"
            )
        return super()._build(module)

    def _rotary(self, forward: FunctionType) -> Rotary:
        """What stands for `apply_rotary_pos_emb` in an attention module's forward."""
        original = forward.__globals__[ROTARY]
        if not _rotates_halves(original):
            raise ConfigError(
                f"deterministic inference does not know the rotary embedding of {self._model} "
                f"({forward.__module__}.{ROTARY}); leave generator.deterministic_inference out for this model"
            )
        return _rotary


class InvariantLinear(nn.Module):
    def __init__(self, original: nn.Linear, matrix: PackedMatrix | None) -> None:
        super().__init__()
        self._parameters = original._parameters  # the dictionary itself: what the trainer puts there is seen here
        self._matrix = matrix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._parameters["weight"]
        assert weight is not None
        matrix = self._matrix
        packed = matrix.packed if matrix is not None and matrix.is_ready(x.dtype) else None
        return operations.linear(x, weight, self._parameters["bias"], packed)

    __call__ = forward  # nobody can hook what only we know


class InvariantRMSNorm(nn.Module):
    """(weight + offset) * x / rms(x)."""

    def __init__(self, original: nn.Module, eps: float, offset: float) -> None:
        super().__init__()
        self._parameters = original._parameters
        self._eps, self._offset = eps, offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._parameters["weight"]
        assert weight is not None
        return operations.rms_norm(x, weight, self._eps, self._offset)

    __call__ = forward


class InvariantSiLU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return operations.silu(x)

    __call__ = forward


class InvariantGELU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return operations.gelu_tanh(x)

    __call__ = forward


class _EachAlone:
    """Attention of sequences of one token each: the value of its head."""

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
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)


@torch.inference_mode()
def _try(twin: Any) -> None:
    """What stands between the parts is seen by nobody: some tokens together must give the bits that each gives alone.

    Raises ConfigError where they don't, as where a layer looks at the mean of its batch.
    """
    config = twin.config.get_text_config()
    if config._attn_implementation != ATTENTION_NAME:
        return  # it can't run here, and its owner says why
    ids = torch.arange(NUM_TRIED) * 7919 % twin.get_input_embeddings().weight.shape[0]

    def logits(rows: slice) -> torch.Tensor:
        some = ids[rows][None]
        output = twin(
            input_ids=some, position_ids=torch.zeros_like(some), use_cache=False, attention_context=_EachAlone()
        )
        result: torch.Tensor = output.logits[0]
        return result.view(torch.int32)  # NaN has bits too

    together = logits(slice(None))
    for rows in (slice(0, 1), slice(NUM_TRIED - 1, None), slice(3, 9)):
        if not torch.equal(logits(rows), together[rows]):
            raise ConfigError(
                f"deterministic inference was tried and failed: what {type(twin).__name__} computes for a token "
                "depends on the tokens beside it; leave generator.deterministic_inference out for this model"
            )


class AnglesByPosition(nn.Module):
    """A rotary module's cosines and sines, computed for `ANGLES_TOGETHER` positions at a time and kept."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._original = [original]  # in a list: no submodule of this one
        self._tables: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids [1, T] -> cosines and sines [1, T, D]."""
        assert position_ids.dim() == 2 and len(position_ids) == 1, position_ids.shape
        cosines, sines = self._table(int(position_ids.max()) + 1, more)
        return cosines[position_ids], sines[position_ids]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _table(self, num_positions: int, more: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        known = self._tables.get(more)
        have = 0 if known is None else len(known[0])
        if known is None or have < num_positions:
            like = torch.zeros((1, 1, 1))
            parts = [] if known is None else [known]
            # At least twice as many as before, so that growing costs little.
            for start in range(have, max(num_positions, 2 * have), ANGLES_TOGETHER):
                positions = torch.arange(start, start + ANGLES_TOGETHER)[None]
                cosine, sine = self._original[0](like, positions, *more)
                parts.append((cosine[0], sine[0]))
            known = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
            self._tables[more] = known
        return known


@torch.no_grad()
def _as_invariant(module: nn.Module, packing: Packing | None) -> nn.Module | None:
    """The invariant form of one part, None if it isn't one that is known."""
    if type(module) is nn.Linear:
        return InvariantLinear(module, packing.matrix(module) if packing is not None else None)
    if module._modules:
        return None
    if list(module._parameters) == ["weight"]:
        return _as_rms_norm(module)
    if module._parameters:
        return None
    if "inv_freq" in module._buffers or any(name.endswith("_inv_freq") for name in module._buffers):
        return AnglesByPosition(module)
    return _as_activation(module)


def _as_activation(module: nn.Module) -> nn.Module | None:
    kinds: dict[str, tuple[Callable[..., torch.Tensor], Callable[[], nn.Module]]] = {
        "SiLU": (nn.functional.silu, InvariantSiLU),
        "SiLUActivation": (nn.functional.silu, InvariantSiLU),
        "GELUTanh": (partial(nn.functional.gelu, approximate="tanh"), InvariantGELU),
    }
    expected, make = kinds.get(type(module).__name__, (None, None))
    trial = torch.linspace(-30, 30, 97)
    if expected is None or make is None or not _agree(module(trial), expected(trial)):
        return None
    return make()


def _as_rms_norm(module: nn.Module) -> InvariantRMSNorm | None:
    weight = module._parameters["weight"]
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or weight.dim() != 1 or not isinstance(eps, float):
        return None
    generator = torch.Generator().manual_seed(0)
    # Weights of its own, as fresh ones say little; rows down to where eps matters.
    trial = object.__new__(type(module))
    trial.__dict__ = {**module.__dict__, "_parameters": {"weight": torch.randn(weight.shape, generator=generator)}}
    x = torch.randn((4, len(weight)), generator=generator) * torch.tensor([[10.0], [1.0], [0.01], [eps**0.5]])
    expected = trial(x)
    for offset in (0.0, 1.0):
        mine = operations.rms_norm(x, trial._parameters["weight"], eps, offset)  # type: ignore[arg-type]
        if _agree(mine, expected):
            return InvariantRMSNorm(module, eps, offset)
    return None


def _rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' `apply_rotary_pos_emb` over one row of tokens."""
    if cos.shape[-1] != q.shape[-1]:
        raise ConfigError(
            f"deterministic inference does not know a rotary embedding of {cos.shape[-1]} of a head's "
            f"{q.shape[-1]} numbers; leave generator.deterministic_inference out for this model"
        )
    assert cos.shape == sin.shape == (1, q.shape[2], q.shape[3]) and not args, (cos.shape, q.shape, args)
    return operations.rotate(q, cos, sin), operations.rotate(k, cos, sin)


@torch.no_grad()
def _rotates_halves(original: Any) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn((1, 3, heads, 8), generator=generator).transpose(1, 2) for heads in (4, 2))
    cos, sin = (torch.randn((1, 3, 8), generator=generator) for _ in range(2))
    try:
        expected = original(q, k, cos, sin)
    except TypeError:  # another signature: not the function that we know
        return False
    return all(_agree(mine, theirs) for mine, theirs in zip(_rotary(q, k, cos, sin), expected, strict=True))


def _agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * float(b.abs().max()))
