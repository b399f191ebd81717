"""A second view of the trainer's module, for inference: the same parameters, parts of it in faster form.

    trainer's module      Layer -- Attention -- q_proj ...      Norm          MLP
                            :         :           :    \\          :  \\          :  \\
    twin                  Layer'-- Attention'-- q_proj'  same   Fused  same   Fused same
                                                      parameters      weight       projections

The twin is always in evaluation mode, whatever mode the trainer's module is in. The original is never changed: not
its modules, its mode, or its globals. Parameters are found through the original's own dictionaries, so assigning a new
Parameter there is seen here; replacing whole submodules is not, until `refresh`. With packed copies of the weights
(see packed_linear) every update must end in `weights_changed`.
"""

from __future__ import annotations

import ctypes
from types import FunctionType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from skyrl_train.engines.embedded.adapters.rows import NOT_SELECTED, AdaptedMaps, Form
from skyrl_train.engines.embedded.drafts.taps import Taps
from skyrl_train.engines.embedded.fused import Kernels, Rotary, as_gated_mlp, as_rms_norm, as_rotary
from skyrl_train.engines.embedded.packed_linear import PackedMatrix, Packing, can_pack, can_pack_pair

ROTARY = "apply_rotary_pos_emb"
"""transformers' attention modules look this function up in their file's globals."""


class InferenceModel:
    """The trainer's module and its twin. Without native kernels the twin differs in mode only."""

    def __init__(
        self,
        original: nn.Module,
        native: ctypes.CDLL | None,
        *,
        packs_weights: bool = False,
        adapted: AdaptedMaps | None = None,
    ) -> None:
        """`adapted`: the linear maps to which adapters may add."""
        self.original = original
        self._adapted = adapted
        self._native = native
        self._packs_weights = packs_weights
        self._taps: Taps | None = None
        self._build()

    def __call__(self, **inputs: Any) -> Any:
        output = self.twin(**inputs)
        self.end_step()
        return output

    def end_step(self) -> None:
        """What `select_rows` said was of this forward alone."""
        if self._adapted is not None:
            self._adapted.rows.form = NOT_SELECTED

    def select_rows(self, row_seats: npt.NDArray[np.int32]) -> None:
        """Before each forward where adapters are served: row t is of the request in seat row_seats[t]."""
        if self._adapted is not None:
            self._adapted.rows.select(row_seats)

    @property
    def form(self) -> Form | None:
        """What adapters add in the next forward; None: nothing."""
        return None if self._adapted is None else self._adapted.rows.form

    def site_of(self, module: nn.Module) -> str | None:
        """What a module of the original is called as a site of adapters; None where they can't change it."""
        return None if self._adapted is None else self._adapted.site_of(module)

    def tap(self, layers: tuple[int, ...]) -> Taps:
        """Keep the outputs of these layers from now on; once only."""
        assert self._taps is None
        self._taps = Taps(layers)
        self._taps.install(self.twin)
        return self._taps

    def weights_changed(self) -> bool:
        """The weights were updated in place, and submodules perhaps replaced: whether they were."""
        replaced = self.refresh()
        if self.packing is not None:
            self.packing.mark_stale()
        return replaced

    def refresh(self) -> bool:
        """Build the twin again if submodules were replaced since; whether they were."""
        if _fingerprint(self.original) == self._fingerprint:
            return False
        self._build()
        return True

    def _build(self) -> None:
        self._fingerprint = _fingerprint(self.original)
        self.packing = self._new_packing()
        self.twin = self._twin(self.original)
        if self._taps is not None:
            self._taps.install(self.twin)

    def _new_packing(self) -> Packing | None:
        return Packing(self._native) if self._native is not None and self._packs_weights else None

    def _twin(self, original: nn.Module) -> nn.Module:
        if self._adapted is not None:
            self._adapted.find(original)
        kernels = None if self._native is None else Kernels(self._native)
        return TwinBuilder(kernels, self.packing, self._adapted).twin(original)


def _fingerprint(model: nn.Module) -> tuple[int, ...]:
    """Changes when a submodule is added, replaced or removed."""
    return tuple(id(module) for module in model.modules())


class TwinBuilder:
    """Makes one twin; `invariant.view` makes another kind of one."""

    def __init__(self, kernels: Kernels | None, packing: Packing | None, adapted: AdaptedMaps | None = None) -> None:
        self._kernels = kernels
        self._packing = packing
        self._adapted = adapted
        self._made: dict[int, nn.Module] = {}
        self._classes: dict[type[nn.Module], type[nn.Module]] = {}

    def twin(self, module: nn.Module) -> nn.Module:
        """Modules that are used twice have one twin."""
        if id(module) not in self._made:
            self._made[id(module)] = self._build(module)
        return self._made[id(module)]

    def _build(self, module: nn.Module) -> nn.Module:
        kernels = self._kernels
        fused_norm = None if kernels is None else as_rms_norm(module, kernels)
        if fused_norm is not None:
            fused_norm.training = False  # not eval(): that would reach the original inside
            return fused_norm
        copy = object.__new__(self._class_of(type(module)))
        children = {name: None if child is None else self.twin(child) for name, child in module._modules.items()}
        # The children stand in __dict__ too: nn.Module's own lookup is several times slower.
        copy.__dict__ = {**module.__dict__, **children, "_modules": children, "training": False}
        if type(module) is nn.Linear:
            copy.__dict__["packed"] = self._packing.matrix(module) if self._packing and can_pack(module) else None
        if self._adapted is not None and module in self._adapted:
            self._adapted.adopt(copy, module)
        fused_mlp = None if kernels is None else as_gated_mlp(copy, kernels)
        if fused_mlp is None:
            return copy
        fused_mlp.pair = self._packed_pair(module)
        fused_mlp.row_adapters = None if self._adapted is None else self._adapted.rows
        fused_mlp.training = False
        return fused_mlp

    def _packed_pair(self, mlp: nn.Module) -> PackedMatrix | None:
        gate, up = mlp._modules["gate_proj"], mlp._modules["up_proj"]
        if self._packing is None or gate is None or up is None or not can_pack_pair(gate, up):
            return None
        return self._packing.matrix(gate, up)

    def _class_of(self, kind: type[nn.Module]) -> type[nn.Module]:
        """A class with a shorter way into its forward, which calls the fused rotary embedding."""
        if kind not in self._classes:
            changes: dict[str, Any] = {"__module__": kind.__module__}
            if kind.__call__ is nn.Module.__call__:
                changes["__call__"] = _call_without_hooks
            if kind is nn.Linear:
                changes["forward"] = _linear_forward
            rotary_forward = self._forward_with_fused_rotary(kind)
            if rotary_forward is not None:
                changes["forward"] = rotary_forward
            self._classes[kind] = type(kind.__name__, (kind,), changes)
        return self._classes[kind]

    def _forward_with_fused_rotary(self, kind: type[nn.Module]) -> FunctionType | None:
        forward: Any = kind.forward
        if not isinstance(forward, FunctionType) or ROTARY not in forward.__code__.co_names:
            return None
        fused = self._rotary(forward)
        if fused is None:
            return None
        scope = {**forward.__globals__, ROTARY: fused}
        changed = FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
        changed.__kwdefaults__ = forward.__kwdefaults__
        return changed

    def _rotary(self, forward: FunctionType) -> Rotary | None:
        """What stands for the rotary embedding in an attention module's forward; None leaves it as it is."""
        return None if self._kernels is None else as_rotary(forward.__globals__[ROTARY], self._kernels)


def _call_without_hooks(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """nn.Module's __call__ looks for eight kinds of hooks and costs as much as a small kernel."""
    if self._forward_hooks or self._forward_pre_hooks:
        return nn.Module.__call__(self, *args, **kwargs)
    return self.forward(*args, **kwargs)


def _linear_forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    packed: PackedMatrix | None = self.__dict__["packed"]
    if packed is not None and (product := packed(x)) is not None:
        return product
    parameters = self._parameters
    weight = parameters["weight"]
    assert weight is not None
    return nn.functional.linear(x, weight, parameters["bias"])
