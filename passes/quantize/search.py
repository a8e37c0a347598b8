"""Scales searched for the least squared error, in which large weights count more: a few grids are tried for each group.

A grid that clips the largest weights a little has finer steps for all others. For each candidate the levels q are found, and with them held
the best scale is Σpwq/Σpq² (with a minimum: the regression of w on q). The candidate of least Σp(w − ŵ)² wins; plain rounding is one of them,
and stays where nothing is better. The idea is that of ggml's quantization of its K types (github.com/ggml-org/llama.cpp, ggml-quants.c).

The importance p = w² + the group's mean of w² matters: on SmolLM2 in groups of 64, with p = 1 the weights come nearer and the logits go away
(mean KL 0.65, plain rounding 0.55, this 0.52): the few large weights, which a search without it clips, meet large inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...custom_ops.packing import QuantizedWeight
from .groups import Scheme, check_weight
from .rtn import Array, Fit, by_groups, decode, encode, fit_range, reciprocal, rounded

# Symmetric int4: the level, counted from 0, on which the weight of largest magnitude lies. Beyond −8 and 7 it is clipped. The whole levels
# down to −4 are there so that weights that lie on such a grid already are found exactly.
_LEVELS_4 = (-8.8, -8.4, -8.0, -7.7, -7.4, -7.0, -6.6, -6.3, -6.0, -5.5, -5.0, -4.0, 7.4, 7.0, 6.6, 6.2)
# With eight bits there is little to gain: clipping costs more than the finer step brings.
_LEVELS_8 = (-130.0, -129.0, -128.0, -127.0, -126.0, 127.0)
# Asymmetric: how many steps the range has beyond those that fit into q (more: both ends are clipped).
_BEYOND = (-1.0, -0.5, 0.0, 0.4, 0.8, 1.2, 1.6, 2.0, 2.5, 3.0)

# What a candidate comes to: its scale and zero, and its error up to the constant Σpw².
_Found = tuple[Array, Array, Array]


def search(weight: NDArray[Any], scheme: Scheme, name: str = "weight") -> QuantizedWeight:
    """`weight` [M, K] with searched scales: no group has a larger error (as weighed here) than with `rtn`. Raises as `check_weight`."""
    return by_groups(check_weight(weight, scheme, name), scheme, fit_least_squares)


def fit_least_squares(groups: Array, scheme: Scheme, dtype: np.dtype[Any]) -> Fit:
    """The best grids found for groups [..., g]. None is worse than `fit_range`'s."""
    plain = fit_range(groups, scheme, dtype)
    magnitude = np.abs(plain.scale)
    # Squares of very small or large weights would leave float32: groups are brought near 1 by a power of two, which is exact.
    power = np.where(magnitude > 0, np.exp2(np.round(np.log2(np.where(magnitude > 0, magnitude, 1)))), 1).astype(np.float32)
    unit = groups * reciprocal(power)[..., None]
    weighed = _Weighed(unit, importance(unit))
    tried = {"none": _symmetric, "uint8": _integer, "float": _minimum}[scheme.zero_point](weighed, power, scheme, dtype)
    scale, zero, error = next(tried)
    for other_scale, other_zero, other_error in tried:
        better = other_error < error
        scale, zero = np.where(better, other_scale, scale), np.where(better, other_zero, zero)
        error = np.minimum(other_error, error)
    best = Fit(scale, zero)
    keep = _error(weighed, groups, plain, power, scheme) <= _error(weighed, groups, best, power, scheme)
    return Fit(np.where(keep, plain.scale, best.scale), np.where(keep, plain.zero, best.zero))


def importance(groups: Array) -> Array:
    """How much each weight's squared error counts."""
    squares = groups * groups
    return squares + squares.mean(axis=-1, keepdims=True)


@dataclass(frozen=True)
class _Weighed:
    """Groups [..., g] near 1, and how much their errors count."""

    unit: Array
    importance: Array


def _error(weighed: _Weighed, groups: Array, fit: Fit, power: Array, scheme: Scheme) -> Array:
    """Each group's error, in units of its power of two."""
    error = (groups - decode(encode(groups, fit, scheme), fit, scheme)) * reciprocal(power)[..., None]
    return _dot(weighed.importance * error, error)


def _dot(a: Array, b: Array) -> Array:
    return np.einsum("...g,...g->...", a, b)


def _ratio(above: Array, below: Array) -> Array:
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _symmetric(weighed: _Weighed, power: Array, scheme: Scheme, dtype: np.dtype[Any]) -> Iterator[_Found]:
    unit = weighed.unit
    low, high = unit.min(axis=-1), unit.max(axis=-1)
    inverse = reciprocal(np.where(high > -low, high, low))[..., None]
    middle, steps = np.full(power.shape, scheme.middle, np.float32), np.empty_like(unit)
    for level in _LEVELS_4 if scheme.bits == 4 else _LEVELS_8:
        np.multiply(unit, inverse * np.float32(level), out=steps)
        np.rint(steps, out=steps)
        np.clip(steps, -scheme.middle, scheme.middle - 1, out=steps)
        yield _scaled(weighed, steps, power, middle, dtype)


def _integer(weighed: _Weighed, power: Array, scheme: Scheme, dtype: np.dtype[Any]) -> Iterator[_Found]:
    unit = weighed.unit
    low, high = np.minimum(unit.min(axis=-1), np.float32(0)), np.maximum(unit.max(axis=-1), np.float32(0))
    steps = np.empty_like(unit)
    for beyond in _BEYOND:
        inverse = np.float32(scheme.top + beyond) * reciprocal(high - low)
        zero = np.clip(np.rint(-low * inverse - np.float32(max(beyond, 0) / 2)), 0, scheme.top).astype(np.float32)
        np.multiply(unit, inverse[..., None], out=steps)
        np.rint(steps, out=steps)
        np.clip(steps, -zero[..., None], scheme.top - zero[..., None], out=steps)
        yield _scaled(weighed, steps, power, zero, dtype)


def _scaled(weighed: _Weighed, steps: Array, power: Array, zero: Array, dtype: np.dtype[Any]) -> _Found:
    """The best scale for levels `steps`, counted from 0."""
    weighty = weighed.importance * steps
    both, squares = _dot(weighed.unit, weighty), _dot(steps, weighty)
    scale = rounded(_ratio(both, squares) * power, dtype)
    step = scale * reciprocal(power)
    return scale, zero, step * (step * squares - 2 * both)


def _minimum(weighed: _Weighed, power: Array, scheme: Scheme, dtype: np.dtype[Any]) -> Iterator[_Found]:
    unit = weighed.unit
    low, high = unit.min(axis=-1), unit.max(axis=-1)
    count, total, q = weighed.importance.sum(axis=-1), _dot(unit, weighed.importance), np.empty_like(unit)
    for beyond in _BEYOND:
        inverse = np.float32(scheme.top + beyond) * reciprocal(high - low)
        start = low + np.float32(max(beyond, 0) / 2) * reciprocal(inverse)
        np.subtract(unit, start[..., None], out=q)
        q *= inverse[..., None]
        np.rint(q, out=q)
        np.clip(q, 0, scheme.top, out=q)
        weighty = weighed.importance * q
        levels, squares, both = weighty.sum(axis=-1), _dot(q, weighty), _dot(unit, weighty)
        scale = rounded(_ratio(count * both - total * levels, count * squares - levels * levels) * power, dtype)
        step = scale * reciprocal(power)
        minimum = rounded(_ratio(total - step * levels, count) * power, dtype)
        floor = minimum * reciprocal(power)
        error = step * (step * squares - 2 * both) + floor * (count * floor + 2 * (step * levels - total))
        yield scale, minimum, error

