"""All layers of a step in one call of C: native/decoder.c, for decoders of the common form.

A step of a small model spends more time between its kernels, in Python, than in them when few requests run. Whether a
model has the form is seen by `fused_decoder.recognise`; what it can't take (tapped layers, other forms) goes through
the twin, which computes the same with the same kernels. In a step with adapters C calls back after each product.

Shapes: T rows, n of them with logits, H hidden size, Hq query heads, Hkv key/value heads, D head size, V words.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from skyrl_train.engines.embedded.adapters.in_native import Additions
from skyrl_train.engines.embedded.adapters.rows import Form
from skyrl_train.engines.embedded.attention import AttentionBackend, PagedBatch
from skyrl_train.engines.embedded.cpu_attention import CpuAttention
from skyrl_train.engines.embedded.fused import LANES, Kernels
from skyrl_train.engines.embedded.fused_decoder import FusedDecoder, Layer, NotThisForm, recognise
from skyrl_train.engines.embedded.kv_pool import KVPool
from skyrl_train.engines.embedded.packed_linear import PackedMatrix, Packing, can_pack, version
from skyrl_train.engines.embedded.twin import InferenceModel

NORMS = ("input_norm", "mlp_norm", "query_norm", "key_norm")
MAPS = ("query", "key", "value", "output", "gated", "down")
HALVES = ("gate", "up")
"""Of "gated", one by one in steps in which adapters may add to them; such a step packs these and not the pair."""


class _Layer(ctypes.Structure):
    """`DecoderLayer` of decoder.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in NORMS),
        *((name, ctypes.c_float) for name in ("input_eps", "mlp_eps", "query_eps", "key_eps", "scaling")),
        ("window", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("keys", "values", *MAPS, *HALVES)),
    )


class _Step(ctypes.Structure):
    """`DecoderStep` of decoder.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("layers", "step", "cosine", "sine", "residual", "normed", "added")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "attended", "gated", "up", "changed")),
        *((name, ctypes.c_int64) for name in ("num_rows", "hidden")),
        *((name, ctypes.c_int32) for name in ("num_layers", "num_threads")),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Maps:
    """The products of one layer."""

    query: PackedMatrix
    key: PackedMatrix
    value: PackedMatrix
    output: PackedMatrix
    gated: PackedMatrix
    down: PackedMatrix
    gate: PackedMatrix
    up: PackedMatrix

    def used(self, *, adapted: bool) -> dict[str, PackedMatrix]:
        """By name, in a step with adapters or without."""
        names = (*(name for name in MAPS if name != "gated"), *HALVES) if adapted else MAPS
        return {name: getattr(self, name) for name in names}


class NativeDecoder:
    """Rows to logits. `packing` is that of the model's twin: an update of the weights marks these copies too."""

    def __init__(
        self,
        decoder: FusedDecoder,
        packing: Packing,
        native: ctypes.CDLL,
        attention: CpuAttention,
        pool: KVPool,
        additions: Additions | None = None,
    ) -> None:
        """`additions` where adapters may add to its maps."""
        self.packing = packing
        self._additions = additions
        self._decoder = decoder
        self._attention = attention
        self._pool = pool
        self._kernels = Kernels(native)
        self._decode = native.decode
        self._decode.argtypes, self._decode.restype = (ctypes.c_void_p,), None
        self._maps = [_maps(layer, packing) for layer in decoder.layers]
        self._head = packing.matrix(decoder.head)
        self._sources = [source for layer in decoder.layers for source in _sources(layer)]
        self._stamps: dict[bool, object] = {}
        """With adapters and without: how the parameters were when the layers were filled."""
        self._layers = (_Layer * len(decoder.layers))()
        self._step = _Step(layers=ctypes.addressof(self._layers), num_layers=len(decoder.layers))

    def logits(
        self, token_ids: torch.Tensor, batch: PagedBatch, sample_rows: torch.Tensor | int, form: Form | None = None
    ) -> torch.Tensor | None:
        """token_ids [T] -> [n, V]; `sample_rows` [n] are the rows that want logits, 0 is all. Writes the rows' keys and
        values to the pool. None, with nothing done, where the weights have come to be of another kind. `form` is what
        adapters add in this step.
        """
        decoder = self._decoder
        dtype = decoder.embedding.dtype
        if not self._head.is_ready(dtype) or not self._are_layers_ready(dtype, adapted=form is not None):
            return None
        shape, rows = self._pool.layers[decoder.layers[0].index], len(token_ids)
        q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        residual = decoder.embed(token_ids)
        hidden = residual.shape[1]
        cosine, sine = (table[batch.row_positions] for table in decoder.tables)
        widths = {"normed": hidden, "added": hidden, "q": q_size, "k": kv_size, "v": kv_size, "attended": q_size}
        widths["gated"] = widths["up"] = _width(decoder.layers[0])
        buffers = {name: torch.empty((rows, width), dtype=dtype) for name, width in widths.items()}
        step = self._step
        for name, buffer in buffers.items():
            setattr(step, name, buffer.data_ptr())
        step.residual, step.cosine, step.sine = residual.data_ptr(), cosine.data_ptr(), sine.data_ptr()
        step.step = self._attention.step_address(batch, rows, shape)
        step.num_rows, step.hidden, step.num_threads = rows, hidden, torch.get_num_threads()
        self._run(form, buffers)
        chosen = residual if isinstance(sample_rows, int) else residual[sample_rows]
        norm = decoder.final_norm
        return self._head(self._kernels.rms_norm(chosen, norm.weight, norm.eps, 0.0))

    def _run(self, form: Form | None, buffers: dict[str, torch.Tensor]) -> None:
        additions = self._additions
        if form is None or additions is None:
            self._step.changed = None
            self._decode(ctypes.addressof(self._step))
            return
        self._step.changed = ctypes.cast(additions.callback, ctypes.c_void_p)
        additions.begin(form, buffers)
        self._decode(ctypes.addressof(self._step))
        additions.end()

    def _are_layers_ready(self, dtype: torch.dtype, *, adapted: bool) -> bool:
        """As `is_ready` of each map, in one comparison where nothing changed."""
        parameters = [source[name] for source, name in self._sources]
        tensors = [*parameters, *self._pool.keys.values(), *self._pool.values.values()]
        stamp = (
            self.packing.generation,
            dtype,
            [id(parameter) for parameter in parameters],
            [0 if parameter is None else version(parameter) for parameter in parameters],
            [0 if tensor is None else tensor.data_ptr() for tensor in tensors],
        )
        if stamp != self._stamps.get(adapted):
            self._stamps[adapted] = stamp if self._fill_layers(dtype, adapted=adapted) else None
        return self._stamps[adapted] is not None

    def _fill_layers(self, dtype: torch.dtype, *, adapted: bool) -> bool:
        """Pointers to what the layers read now; False where some of it doesn't fit any more."""
        pool = self._pool
        for place, layer, maps in zip(self._layers, self._decoder.layers, self._maps, strict=True):
            used = maps.used(adapted=adapted)
            if not all(one.is_ready(dtype) for one in used.values()):
                return False
            for name, one in used.items():
                setattr(place, name, one.address)
            weights = [layer.input_norm.weight, layer.mlp_norm.weight]
            place.input_eps, place.mlp_eps = layer.input_norm.eps, layer.mlp_norm.eps
            if layer.norms is not None:
                query, place.query_eps, key, place.key_eps = layer.norms
                weights += [query, key]
            if any(weight.dtype != dtype or not weight.is_contiguous() for weight in weights):
                return False
            for name, weight in zip(NORMS, weights, strict=False):
                setattr(place, name, weight.data_ptr())
            place.scaling, place.window = layer.scaling, layer.sliding_window or 0
            place.keys, place.values = pool.keys[layer.index].data_ptr(), pool.values[layer.index].data_ptr()
        return True


def native_decoder(
    model: InferenceModel, native: ctypes.CDLL | None, backend: AttentionBackend, pool: KVPool, context_len: int
) -> NativeDecoder | None:
    """None where the model must go through its twin."""
    packing = model.packing
    if packing is None or native is None or not isinstance(backend, CpuAttention):
        return None
    shapes = {(shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.dtype) for shape in pool.layers.values()}
    hidden = model.original.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    if len(shapes) != 1 or next(iter(shapes))[2] % (2 * LANES) or hidden % LANES:
        return None
    try:
        decoder = recognise(model.original, context_len, pack=False)
    except NotThisForm:
        return None
    if not can_pack(decoder.head) or not all(_all_packable(layer) for layer in decoder.layers):
        return None
    if len({_width(layer) for layer in decoder.layers}) > 1:
        return None  # a step's buffers have one width for all layers
    sites = [[model.site_of(module) for module in _modules(layer)] for layer in decoder.layers]
    additions = Additions(sites) if any(site is not None for of_layer in sites for site in of_layer) else None
    return NativeDecoder(decoder, packing, native, backend, pool, additions)


def _maps(layer: Layer, packing: Packing) -> _Maps:
    query, key, value = layer.qkv.modules
    gate, up = layer.gate_up.modules
    return _Maps(
        query=packing.matrix(query),
        key=packing.matrix(key),
        value=packing.matrix(value),
        output=packing.matrix(layer.output),
        gated=packing.matrix(gate, up),
        down=packing.matrix(layer.down),
        gate=packing.matrix(gate),
        up=packing.matrix(up),
    )


def _sources(layer: Layer) -> list[tuple[Mapping[str, torch.Tensor | None], str]]:
    """Where all parameters of a layer are found."""
    maps = [*layer.qkv.modules, layer.output, *layer.gate_up.modules, layer.down]
    norms = [layer.input_norm, layer.mlp_norm, *(layer.head_norms or ())]
    modules = [*maps, *(norm.module for norm in norms)]
    return [(module._parameters, name) for module in modules for name in module._parameters]


def _modules(layer: Layer) -> list[nn.Module]:
    """In the order of `adapters.in_native.MAPS`."""
    return [*layer.qkv.modules, layer.output, *layer.gate_up.modules, layer.down]


def _width(layer: Layer) -> int:
    """Of the gated MLP."""
    weight = layer.down._parameters["weight"]
    assert weight is not None
    return weight.shape[1]


def _all_packable(layer: Layer) -> bool:
    gate, up = layer.gate_up.modules
    return (
        all(can_pack(module) for module in _modules(layer))
        and gate._parameters["bias"] is up._parameters["bias"] is None
    )
