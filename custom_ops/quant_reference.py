"""What QuantLinear and QuantEmbedding mean, in NumPy, bit for bit.

Every float32 operation here is the one that the contract names, in its order: fused multiply-adds are emulated exactly. Only the gates are
computed in float64 and rounded once: the kernels' polynomials may differ from them in the last places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .contract import GATES
from .packing import QuantizedWeight, fused_multiply_add

Array = np.ndarray
_LANES = 16
_TINY = np.float32(2.0**-120)


@dataclass(frozen=True)
class QuantLinearResult:
    """`output` (..., M) and `sum` (..., K) = input + skip."""

    output: Array
    sum: Array


def quant_linear(
    weight: QuantizedWeight,
    *,
    input: Array,
    norm_weight: Array | None = None,
    skip: Array | None = None,
    bias: Array | None = None,
    residual: Array | None = None,
    activation_scale: Array | None = None,
    activation_bits: int = 8,
    gate: int = 0,
    norm_epsilon: float = 1e-5,
) -> QuantLinearResult:
    K, N = weight.q.shape[1], weight.q.shape[0]
    total = input if skip is None else input + skip
    x = total.reshape(-1, K)
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, norm_epsilon)
    y = int8_product(weight, x, activation_scale) if activation_bits == 8 else float_product(weight, x)
    if bias is not None:
        y = y + bias
    if gate:
        M = N // 2
        y = activate(GATES[gate], y[:, :M]) * y[:, M:]
    y = y.reshape(*input.shape[:-1], y.shape[1])
    return QuantLinearResult(y if residual is None else y + residual, total)


def quant_embedding(weight: QuantizedWeight, ids: Array) -> Array:
    return weight.dequantize()[ids]


def rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    """(rows, K): lane i takes the elements i, i + 16, …; then lanes i and i + 8 are joined, then + 4, + 2, + 1."""
    lanes = np.zeros((x.shape[0], _LANES), np.float32)
    for k in range(0, x.shape[1], _LANES):
        part = x[:, k : k + _LANES]
        lanes = fused_multiply_add(part, part, lanes)
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    mean = lanes / np.float32(x.shape[1])
    inverse = np.float32(1) / np.sqrt(mean + np.float32(epsilon))
    return (x * inverse) * weight


def quantize_rows(x: Array, group_size: int, given: Array | None = None) -> tuple[Array, Array]:
    """Rows (R, K) as int8 q (R, groups, group_size) and float32 scales (R, groups): `given` (groups), or the rows' own."""
    groups = x.reshape(x.shape[0], x.shape[1] // group_size, group_size)
    sound = np.isfinite(groups).all(axis=2)
    if given is not None:
        with np.errstate(over="ignore"):
            scaled = np.where(sound[:, :, None], groups, np.float32(0)) * (np.float32(1) / given)[:, None]
        return np.rint(np.clip(scaled, -127, 127)).astype(np.int8), np.where(sound, given, np.float32(np.nan))
    most = np.abs(groups).max(axis=2)
    some = sound & (most >= _TINY)
    divisor = np.where(some, most, np.float32(1))
    scale = np.where(sound, np.where(some, most / np.float32(127), np.float32(0)), np.float32(np.nan))
    with np.errstate(invalid="ignore"):
        scaled = groups * (np.float32(127) / divisor)[:, :, None]
    q = np.where(some[:, :, None], np.rint(scaled), np.float32(0)).astype(np.int8)
    return q, scale.astype(np.float32)


def int8_product(weight: QuantizedWeight, x: Array, activation_scale: Array | None = None) -> Array:
    g = weight.group_size
    q, scale = quantize_rows(x, g, activation_scale)
    f = np.zeros((x.shape[0], weight.q.shape[0]), np.float32)
    for group in range(scale.shape[1]):
        w = weight.q[:, group * g : (group + 1) * g].astype(np.int64)
        if weight.zero_points is not None:
            w = w - weight.zero_points[:, group, None]
        elif weight.minimums is None:
            w = w - (1 << (weight.bits - 1))
        integers = q[:, group].astype(np.int64)
        row = scale[:, group, None]
        f = fused_multiply_add((integers @ w.T).astype(np.float32) * row, weight.scales[None, :, group].astype(np.float32), f)
        if weight.minimums is not None:
            total = integers.sum(axis=1, keepdims=True).astype(np.float32) * row
            f = fused_multiply_add(total, weight.minimums[None, :, group].astype(np.float32), f)
    return f


def float_product(weight: QuantizedWeight, x: Array) -> Array:
    values = weight.dequantize()
    f = np.zeros((x.shape[0], values.shape[0]), np.float32)
    for k in range(x.shape[1]):
        f = fused_multiply_add(x[:, k, None], values[None, :, k], f)
    return f


def activate(gate: str, x: Array) -> Array:
    wide = x.astype(np.float64)
    with np.errstate(over="ignore"):
        if gate == "silu":
            y = wide / (1 + np.exp(-wide))
        elif gate == "gelu":
            y = 0.5 * wide * np.vectorize(math.erfc, otypes=[np.float64])(-wide / math.sqrt(2))
        else:
            assert gate == "gelu_tanh", gate
            y = wide / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
    return y.astype(np.float32)
