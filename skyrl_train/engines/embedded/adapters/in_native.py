"""What adapters add, where all layers of a step are one call of C: native/decoder.c calls back after each product."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch

from skyrl_train.engines.embedded.adapters.rows import Form

MAPS = ("query", "key", "value", "output", "gate", "up", "down")
"""In decoder.c's order."""
BUFFERS = {
    "query": ("normed", "q"),
    "key": ("normed", "k"),
    "value": ("normed", "v"),
    "output": ("attended", "added"),
    "gate": ("normed", "gated"),
    "up": ("normed", "up"),
    "down": ("gated", "added"),
}
"""Which of a step's buffers a product reads and which it writes."""

Added = ctypes.CFUNCTYPE(None, ctypes.c_int32, ctypes.c_int32)
"""void added(int32_t layer, int32_t map)."""


class Additions:
    """`sites` [layers][len(MAPS)]: what each map is called as a site of adapters; None where they can't change it."""

    def __init__(self, sites: Sequence[Sequence[str | None]]) -> None:
        self._sites = sites
        self._form: Form | None = None
        self._tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._failure: Exception | None = None
        self.callback = Added(self._add)

    def begin(self, form: Form, buffers: Mapping[str, torch.Tensor]) -> None:
        """For one step. `buffers` [T, width]."""
        self._form, self._failure = form, None
        self._tensors = [(buffers[x], buffers[y]) for x, y in (BUFFERS[name] for name in MAPS)]

    def end(self) -> None:
        """Raises what went wrong meanwhile: through C it could not."""
        self._form, self._tensors = None, []
        if self._failure is not None:
            raise self._failure

    def _add(self, layer: int, which: int) -> None:
        site = self._sites[layer][which]
        if site is None or self._form is None or self._failure is not None:
            return
        x, y = self._tensors[which]
        try:
            self._form.add(site, x, y)
        except Exception as exc:  # raised again by `end`
            self._failure = exc
