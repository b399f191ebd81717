"""Triton's kernels on the CPU, under Triton's interpreter: import this before anything that has kernels."""

import os

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patch_with_index(tensor: Any, scope: Any) -> None:
    """A scalar is an array of one number there, which numpy 2.4 no longer takes for an int."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_with_index
IS_ON = True
"""For who wants to use what this module does by being imported."""
