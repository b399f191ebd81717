"""Triton's kernels on the CPU, under Triton's interpreter: import this before anything that has kernels."""

import os

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patch_with_index(tensor: Any, scope: Any) -> None:
    """A scalar is an array of one number there, which numpy 2.4 no longer takes for an int."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_with_index

_dot = interpreter.InterpreterBuilder.create_dot


def _widened(x: Any) -> Any:
    """A bfloat16 block, which is kept as its bits, in float32."""
    if x.dtype.scalar != tl.bfloat16:
        return x
    return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _dot_of_numbers(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    """Else bfloat16 blocks are multiplied as the integers that their bits are."""
    return _dot(self, _widened(a), _widened(b), *rest)


interpreter.InterpreterBuilder.create_dot = _dot_of_numbers
IS_ON = True
"""For who wants to use what this module does by being imported."""
