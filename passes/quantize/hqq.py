"""Half-quadratic quantization: zero points that make the error sparse, without any data.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023 (github.com/mobiusml/hqq). With the scales of plain
rounding held, min Σ|w − ŵ|^p with p < 1 is split by an auxiliary error e: e follows by a shrinkage of w − ŵ, and the zero point is then the
mean of q − (w − e)/scale; β, which ties e to w − ŵ, grows. Errors are in steps of the group, so that the result doesn't depend on how large
the weights are, and a group keeps the best zero point it has had.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...custom_ops.packing import QuantizedWeight
from ...errors import OptionError
from .groups import Scheme, check_weight
from .rtn import Array, Fit, by_groups, decode, encode, fit_range, reciprocal, rounded

# The paper's p, β and growth of β.
NORM, BETA, GROWTH, ITERATIONS = 0.7, 10.0, 1.01, 20


def hqq(weight: NDArray[Any], scheme: Scheme, name: str = "weight") -> QuantizedWeight:
    """`weight` [M, K] with optimized zero points, stored as minimums: no group has a larger Σ|error|^0.7 than with `rtn`.

    Raises as `check_weight`, and OptionError where the scheme has no minimums.
    """
    if scheme.zero_point != "float":
        raise OptionError(f"half-quadratic zero points are floats, and the scheme is {scheme}", hint='zero_point="float"')
    return by_groups(check_weight(weight, scheme, name), scheme, fit_half_quadratic)


def fit_half_quadratic(groups: Array, scheme: Scheme, dtype: np.dtype[Any]) -> Fit:
    """Grids for groups [..., g]: the scales of `fit_range`, other minimums."""
    fit = fit_range(groups, scheme, dtype)
    inverse, beta = reciprocal(fit.scale)[..., None], np.float32(BETA)
    best, best_minimum = _sparse(groups, fit, inverse, scheme), fit.zero
    minimum = fit.zero
    for _ in range(ITERATIONS):
        current = Fit(fit.scale, minimum)
        q = encode(groups, current, scheme)
        error = (groups - decode(q, current, scheme)) * inverse
        # w ≈ scale·q + minimum + error: with the error held, the best minimum is a mean.
        minimum = rounded((groups - q * fit.scale[..., None] - _shrink(error, beta) * fit.scale[..., None]).mean(axis=-1), dtype)
        found = _sparse(groups, Fit(fit.scale, minimum), inverse, scheme)
        best_minimum, best = np.where(found < best, minimum, best_minimum), np.minimum(found, best)
        beta *= np.float32(GROWTH)
    return Fit(fit.scale, best_minimum)


def _shrink(error: Array, beta: np.float32) -> Array:
    """Generalized soft thresholding: sign(x)·max(|x| − |x|^(p−1)/β, 0)."""
    size = np.abs(error)
    with np.errstate(divide="ignore"):
        threshold = np.power(size, np.float32(NORM - 1)) / beta
    return np.copysign(np.maximum(size - threshold, np.float32(0)), error)


def _sparse(groups: Array, fit: Fit, inverse: Array, scheme: Scheme) -> Array:
    """Σ|error|^p of each group, in steps."""
    error = np.abs(groups - decode(encode(groups, fit, scheme), fit, scheme)) * inverse
    return np.power(error, np.float32(NORM)).sum(axis=-1)
