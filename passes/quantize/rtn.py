"""Round to nearest: the range of each group decides its scale, and every weight goes to the level next to it.

A symmetric group has its weight of largest magnitude at q = 0, the level that has no counterpart (as GGUF's Q4_0 has it), so that its scale
may be negative. An asymmetric one spans its smallest and largest weight; with integer zero points 0 is always inside, and exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...custom_ops.packing import QuantizedWeight
from .groups import CHUNK, Scheme, check_weight

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Fit:
    """The grid of each group, float32 [...]: scale, and 2^(bits − 1), the zero point, or the minimum. Both as stored, rounded to `dtype`."""

    scale: Array
    zero: Array


Fitter = Callable[[Array, Scheme, np.dtype[Any]], Fit]


def rtn(weight: NDArray[Any], scheme: Scheme, name: str = "weight") -> QuantizedWeight:
    """`weight` [M, K] rounded to nearest. Raises as `check_weight`."""
    return by_groups(check_weight(weight, scheme, name), scheme, fit_range)


def by_groups(weight: Array, scheme: Scheme, fit: Fitter) -> QuantizedWeight:
    """Quantizes a checked matrix, a few rows at a time, on the grids that `fit` finds for groups [n, K/g, g]."""
    M, K = weight.shape
    few, dtype = (M, K // scheme.group_size), scale_dtype(weight, scheme)
    q, scale, zero = np.empty((M, K), np.uint8), np.empty(few, np.float32), np.empty(few, np.float32)
    step = max(1, CHUNK // K)
    for start in range(0, M, step):
        rows = slice(start, start + step)
        groups = weight[rows].reshape(-1, few[1], scheme.group_size)
        found = fit(groups, scheme, dtype)
        q[rows] = encode(groups, found, scheme).reshape(-1, K)
        scale[rows], zero[rows] = found.scale, found.zero
    return assembled(q, Fit(scale, zero), scheme, dtype)


def assembled(q: NDArray[np.uint8], fit: Fit, scheme: Scheme, dtype: np.dtype[Any]) -> QuantizedWeight:
    """A matrix out of its parts [M, K] and [M, K/g]."""
    zero_points = fit.zero.astype(np.uint8) if scheme.zero_point == "uint8" else None
    minimums = fit.zero.astype(dtype) if scheme.zero_point == "float" else None
    return QuantizedWeight(q, fit.scale.astype(dtype), scheme.bits, scheme.group_size, zero_points, minimums)


def scale_dtype(weight: Array, scheme: Scheme) -> np.dtype[Any]:
    """What scales and minimums are stored in: float16, unless the largest would overflow it or fall below its normal numbers.

    With the largest scale at 2⁻¹⁴ or above, rounding scales moves no weight by more than 2⁻¹¹ of the tensor's largest.
    """
    largest = max(float(weight.max(initial=0.0)), -float(weight.min(initial=0.0)))
    return np.dtype(np.float16) if largest == 0 or (largest / scheme.top >= 2.0**-14 and largest < 65504 / 2) else np.dtype(np.float32)


def rounded(values: Array, dtype: np.dtype[Any]) -> Array:
    """`values` as they are after storing them."""
    return values if dtype == np.float32 else values.astype(dtype).astype(np.float32)


def fit_range(groups: Array, scheme: Scheme, dtype: np.dtype[Any]) -> Fit:
    """Grids that span the groups [..., g]."""
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    if scheme.zero_point == "none":
        extreme = np.where(high > -low, high, low)
        return Fit(rounded(extreme / np.float32(-scheme.middle), dtype), np.full(low.shape, scheme.middle, np.float32))
    if scheme.zero_point == "uint8":
        low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
        # Halved, so that the range of the largest floats doesn't overflow.
        scale = rounded((high / 2 - low / 2) / np.float32(scheme.top / 2), dtype)
        return Fit(scale, np.clip(np.rint(-low * reciprocal(scale)), 0, scheme.top).astype(np.float32))
    minimum = rounded(low, dtype)
    return Fit(rounded((high / 2 - minimum / 2) / np.float32(scheme.top / 2), dtype), minimum)


def reciprocal(scale: Array) -> Array:
    """1/scale; 0 where the scale is 0 or so small that its inverse is not finite: such a group is all zeros (or its minimum)."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scale
    return np.where(np.isfinite(inverse), inverse, np.float32(0)).astype(np.float32)


def encode(groups: Array, fit: Fit, scheme: Scheme) -> NDArray[np.uint8]:
    """The levels of groups [..., g] that lie nearest, uint8 in the same shape."""
    inverse, zero = reciprocal(fit.scale)[..., None], fit.zero[..., None]
    if scheme.zero_point == "float":
        levels = (groups - zero) * inverse
        np.rint(levels, out=levels)
    else:
        levels = groups * inverse
        np.rint(levels, out=levels)
        levels += zero
    np.clip(levels, 0, scheme.top, out=levels)
    return levels.astype(np.uint8)


def decode(q: NDArray[np.uint8], fit: Fit, scheme: Scheme) -> Array:
    """The values of groups, float32; with minimums rounded twice, which is near enough for comparing errors."""
    scale, zero = fit.scale[..., None], fit.zero[..., None]
    return q * scale + zero if scheme.zero_point == "float" else (q - zero) * scale
