"""GPTQ: weights are rounded one input after the other, and those not yet rounded make up for the error.

Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022
(github.com/IST-DASLab/gptq). With H = XᵀX of the inputs seen, the error of a row is (w − ŵ) H (w − ŵ)ᵀ. Column k is rounded, and its error,
divided by the diagonal, is taken off the later columns along row k of the upper Cholesky factor of H⁻¹. A group's grid is fitted to what its
columns have become when their turn comes. Rows don't depend on each other, and a row for which that came out worse than without is kept without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...custom_ops.packing import QuantizedWeight
from ...errors import ModelError
from .groups import Scheme, check_weight
from .rtn import Array, Fit, assembled, decode, encode, rtn, scale_dtype
from .search import fit_least_squares, search

# What is added to the diagonal, as a share of its mean: the paper's.
DAMPING = 0.01
# Rows that are worked on at once: their updates stay in the cache.
_ROWS = 1024


def gptq(weight: NDArray[Any], scheme: Scheme, hessian: NDArray[Any], name: str = "weight") -> QuantizedWeight:
    """`weight` [M, K] rounded for inputs whose XᵀX is `hessian` [K, K]: no row has a larger error there than with `rtn` or `search`.

    Raises as `check_weight`, and ModelError where the calibration has NaN or infinity.
    """
    floats = check_weight(weight, scheme, name)
    assert hessian.shape == (floats.shape[1],) * 2, f"{name} has {floats.shape[1]} inputs, its calibration {hessian.shape}"
    if not np.isfinite(hessian).all():
        raise ModelError(f"the inputs of {name} are not finite on the calibration text", hint="check the model in fp32 first")
    factor, dtype = inverse_factor(hessian), scale_dtype(floats, scheme)
    parts = [_rounded_in_turn(floats[start : start + _ROWS], factor, scheme, dtype) for start in range(0, len(floats), _ROWS)]
    q, scale, zero = (np.concatenate(part) for part in zip(*((q, fit.scale, fit.zero) for q, fit in parts)))
    in_turn = assembled(q, Fit(scale, zero), scheme, dtype)
    return _best_rows(floats, hessian, [in_turn, search(floats, scheme, name), rtn(floats, scheme, name)])


def calibration_error(weight: NDArray[Any], quantized: QuantizedWeight, hessian: NDArray[Any]) -> NDArray[np.float64]:
    """Each row's squared error of outputs over the inputs seen: (w − ŵ) H (w − ŵ)ᵀ, float64 [M]."""
    error = weight.astype(np.float64) - quantized.dequantize()
    return np.einsum("mk,mk->m", error @ hessian.astype(np.float64), error)


def inverse_factor(hessian: NDArray[Any]) -> Array:
    """The upper Cholesky factor of the damped inverse of XᵀX."""
    H = hessian.astype(np.float64)
    diagonal = np.arange(len(H))
    dead = H[diagonal, diagonal] <= 0  # an input that is never anything but 0: it takes no error from others, and gives none
    H[dead, dead] = 1.0
    H[diagonal, diagonal] += DAMPING * H[diagonal, diagonal].mean()
    # With H = RRᵀ and R upper triangular, which is the lower factor of H turned around, H⁻¹ = (R⁻¹)ᵀR⁻¹.
    return np.linalg.inv(np.linalg.cholesky(H[::-1, ::-1])[::-1, ::-1]).astype(np.float32)


def _rounded_in_turn(weight: Array, factor: Array, scheme: Scheme, dtype: np.dtype[Any]) -> tuple[NDArray[np.uint8], Fit]:
    """q [M, K] and grids [M, K/g] of some rows. Errors are carried at once inside a group, and group by group beyond it."""
    M, K = weight.shape
    size, left = scheme.group_size, weight.copy()
    q, scale, zero = np.empty((M, K), np.uint8), np.empty((M, K // size), np.float32), np.empty((M, K // size), np.float32)
    for start in range(0, K, size):
        stop = start + size
        fit = fit_least_squares(left[:, start:stop], scheme, dtype)
        columns, errors = np.ascontiguousarray(left[:, start:stop].T), np.empty((size, M), np.float32)
        for k in range(size):
            row = factor[start + k, start:stop]
            levels = encode(columns[k][:, None], fit, scheme)
            q[:, start + k] = levels[:, 0]
            errors[k] = (columns[k] - decode(levels, fit, scheme)[:, 0]) / row[k]
            columns[k + 1 :] -= row[k + 1 :, None] * errors[k]
        left[:, stop:] -= errors.T @ factor[start:stop, stop:]
        scale[:, start // size], zero[:, start // size] = fit.scale, fit.zero
    return q, Fit(scale, zero)


def _best_rows(weight: Array, hessian: NDArray[Any], candidates: Sequence[QuantizedWeight]) -> QuantizedWeight:
    errors = np.stack([calibration_error(weight, candidate, hessian) for candidate in candidates])
    chosen = errors.argmin(axis=0)

    def rows(name: str) -> NDArray[Any] | None:
        parts = [getattr(candidate, name) for candidate in candidates]
        if parts[0] is None:
            return None
        return np.asarray(np.choose(chosen[:, None], parts))

    q, scales = rows("q"), rows("scales")
    assert q is not None and scales is not None
    return replace(candidates[0], q=q, scales=scales, zero_points=rows("zero_points"), minimums=rows("minimums"))
