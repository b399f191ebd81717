"""Uniform numbers from a seed and a counter: no state, so no order of calls and no batch can change them.

The mixing function is SplitMix64's finaliser (Steele, Lea, Flood: "Fast splittable pseudorandom number
generators", 2014), applied to the seed and to the counter and again to both.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInt64s = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MUL_1 = np.uint64(0xBF58476D1CE4E5B9)
_MUL_2 = np.uint64(0x94D049BB133111EB)
_MASK = 0xFFFF_FFFF_FFFF_FFFF
_SEED_SALT = np.uint64(0x5851F42D4C957F2D)


def mix64(x: UInt64s) -> UInt64s:
    """A bijection of 64-bit words in which every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * _MUL_1
    x = (x ^ (x >> np.uint64(27))) * _MUL_2
    return x ^ (x >> np.uint64(31))


def key_of_seed(seed: int) -> int:
    """What `uniforms` takes for a seed; any int, negative ones too."""
    return _mix64_int((seed & _MASK) ^ int(_SEED_SALT))


def uniforms(keys: UInt64s, counters: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """keys [n], counters [n] -> numbers in [0, 1) with 53 bits."""
    words = mix64(keys ^ mix64((counters.astype(np.uint64) + np.uint64(1)) * _GOLDEN))
    result: npt.NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return result


def derived_seed(seed: int, index: int) -> int:
    """The `index`-th seed of a sequence that starts from `seed`."""
    return _mix64_int(key_of_seed(seed) ^ _mix64_int((index * int(_GOLDEN)) & _MASK))


def _mix64_int(x: int) -> int:
    """`mix64` of one word; Python's integers are much faster here than an array of one."""
    x = ((x ^ (x >> 30)) * int(_MUL_1)) & _MASK
    x = ((x ^ (x >> 27)) * int(_MUL_2)) & _MASK
    return x ^ (x >> 31)
