"""Quantized weights in and out of the layout that the kernels read (WEIGHT_LAYOUT, drawn in src/kernels/quant.h). Needs NumPy only.

Packing is exact: what was quantized elsewhere comes in as it is, and `unpack(pack(w))` is `w`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import ModelError
from .contract import TILE_OUTPUTS, ScaleType, WeightFormat, ZeroPoint

Array = np.ndarray

def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """float32 a·b + c, rounded once, as the processor's instruction does.

    The product is exact in float64 and its sum with c is rounded there; were that rounded to float32 again, a sum that fell on a tie of
    float32 would go wrong. Rounding the first time to odd, in the direction of what was lost, keeps it off the ties.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        product, addend = a.astype(np.float64) * b, c.astype(np.float64)
        total = product + addend
        back = total - product
        lost = (product - (total - back)) + (addend - back)
        bits = total.view(np.int64)
        inexact_even = (lost != 0) & np.isfinite(lost) & (bits & 1 == 0)
        away = (lost > 0) == (total > 0)  # the exact sum is larger in magnitude
        odd = np.where(inexact_even, bits + np.where(away, 1, -1), bits).view(np.float64)
        return odd.astype(np.float32)


# Tiles are packed this many bytes at a time, so that temporary memory does not grow with the tensor.
_SLAB_BYTES = 1 << 22


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight by groups: `q` uint8 (N, K), `scales` float (N, K / group_size), and `zero_points` uint8 or `minimums` float of that shape, or none.

    WeightFormat says what the values are. Scales and minimums may be float16 or float32.
    """

    q: Array
    scales: Array
    bits: Literal[4, 8]
    group_size: Literal[32, 64, 128]
    zero_points: Array | None = None
    minimums: Array | None = None

    @property
    def zero_point(self) -> ZeroPoint:
        return "uint8" if self.zero_points is not None else "float" if self.minimums is not None else "none"

    @property
    def scale_type(self) -> ScaleType:
        """float16 where that holds every scale and minimum exactly."""
        numbers = [self.scales] if self.minimums is None else [self.scales, self.minimums]
        with np.errstate(over="ignore"):
            exact = all(n.dtype == np.float16 or (n.astype(np.float16).astype(np.float32) == n).all() for n in numbers)
        return "float16" if exact else "float32"

    def format(self, *, gated: bool = False) -> WeightFormat:
        """The format that holds this weight; with a gate, the first half of the outputs is the gate, the second its values."""
        N, K = self.q.shape
        return WeightFormat(K, N // 2 if gated else N, self.bits, self.group_size, self.zero_point, self.scale_type, gated)

    def dequantize(self) -> Array:
        """Float32 (N, K)."""
        values = np.empty(self.q.shape, np.float32)
        for rows in _slabs(self.q.shape[0], self.q.shape[1] * 16):
            q = self.q[rows].reshape(-1, self.scales.shape[1], self.group_size)
            scales = self.scales[rows].astype(np.float32)[:, :, None]
            if self.minimums is not None:
                minimums = self.minimums[rows].astype(np.float32)[:, :, None]
                values[rows] = fused_multiply_add(q.astype(np.float32), scales, minimums).reshape(-1, self.q.shape[1])
            else:
                zero = np.float32(1 << (self.bits - 1)) if self.zero_points is None else self.zero_points[rows].astype(np.float32)[:, :, None]
                values[rows] = ((q.astype(np.float32) - zero) * scales).reshape(-1, self.q.shape[1])
        return values


def pack(weight: QuantizedWeight, *, gated: bool = False, name: str = "weight") -> Array:
    """The packed bytes, uint8 (format.nbytes,). Raises ModelError, naming `name`, where the weight has NaN or infinite scales or doesn't fit its format."""
    _check(weight, gated, name)
    fmt = weight.format(gated=gated)
    packed = np.zeros((fmt.tiles, fmt.tile_bytes), np.uint8)
    parts = 2 if gated else 1
    for part in range(parts):
        first = part * fmt.M
        for tiles in _slabs(fmt.tiles // parts, fmt.tile_bytes):
            rows = slice(first + tiles.start * TILE_OUTPUTS, first + min(tiles.stop * TILE_OUTPUTS, fmt.M))
            _fill(packed[part::parts][tiles], weight, fmt, rows)
    return packed.reshape(-1)


def unpack(packed: Array, fmt: WeightFormat) -> QuantizedWeight:
    """What `pack` was given. Scales and minimums come back in the format's type."""
    if packed.dtype != np.uint8 or packed.shape != (fmt.nbytes,):
        raise ModelError(f"packed weight of {packed.nbytes} bytes, {fmt.nbytes} are expected")
    tiles = packed.reshape(fmt.tiles, fmt.tile_bytes)
    parts = [tiles[part :: 2 if fmt.gated else 1] for part in range(2 if fmt.gated else 1)]
    fields = [_read(part, fmt) for part in parts]
    q, scales, zeros = (None if fields[0][i] is None else np.concatenate([f[i] for f in fields]) for i in range(3))
    assert q is not None and scales is not None
    return QuantizedWeight(
        q, scales, fmt.bits, fmt.group_size,
        zero_points=zeros if fmt.zero_point == "uint8" else None,
        minimums=zeros if fmt.zero_point == "float" else None,
    )  # fmt: skip


def _slabs(count: int, item_bytes: int) -> Iterator[slice]:
    step = max(1, _SLAB_BYTES // max(item_bytes, 1))
    return (slice(at, min(at + step, count)) for at in range(0, count, step))


def _check(weight: QuantizedWeight, gated: bool, name: str) -> None:
    if weight.q.ndim != 2 or weight.q.dtype != np.uint8 or (gated and weight.q.shape[0] % 2):
        raise ModelError(f"{name}: quantized values are {weight.q.dtype} {weight.q.shape}, uint8 (outputs, inputs) is expected")
    N, K = weight.q.shape
    if reason := WeightFormat(K, N // 2 if gated else N, weight.bits, weight.group_size, gated=gated).refusal():
        raise ModelError(f"{name}: {reason}")
    for what, numbers in (("scales", weight.scales), ("minimums", weight.minimums)):
        if numbers is None:
            continue
        if numbers.dtype not in (np.float16, np.float32) or numbers.shape != (N, K // weight.group_size):
            raise ModelError(f"{name}: {what} are {numbers.dtype} {numbers.shape}, float {(N, K // weight.group_size)} is expected")
        if not np.isfinite(numbers).all():
            raise ModelError(f"{name}: {what} have NaN or infinite numbers", hint="export the model again from sound weights")
    if weight.zero_points is not None and weight.minimums is not None:
        raise ModelError(f"{name}: has both zero points and minimums")
    for what, integers in (("quantized values", weight.q), ("zero points", weight.zero_points)):
        if integers is not None and integers.dtype != np.uint8:
            raise ModelError(f"{name}: {what} are {integers.dtype}, uint8 is expected")
        if integers is not None and integers.size and weight.bits < 8 and int(integers.max()) >> weight.bits:
            raise ModelError(f"{name}: {what} reach {int(integers.max())}, beyond {weight.bits} bits")
    if weight.zero_points is not None and weight.zero_points.shape != weight.scales.shape:
        raise ModelError(f"{name}: zero points have shape {weight.zero_points.shape}, {weight.scales.shape} is expected")


def _by_tile(rows: Array, tiles: int) -> Array:
    """(rows, n) as (tiles, 16, n), zeros where rows end."""
    if rows.shape[0] == tiles * TILE_OUTPUTS:
        return rows.reshape(tiles, TILE_OUTPUTS, -1)
    padded = np.zeros((tiles * TILE_OUTPUTS, rows.shape[1]), rows.dtype)
    padded[: rows.shape[0]] = rows
    return padded.reshape(tiles, TILE_OUTPUTS, -1)


def _fill(out: Array, weight: QuantizedWeight, fmt: WeightFormat, rows: slice) -> None:
    tiles, at = out.shape[0], 0
    zeros = weight.minimums if weight.zero_points is None else weight.zero_points
    for numbers in (weight.scales, zeros):
        if numbers is None:
            continue
        typed = numbers[rows].astype(np.uint8 if numbers is weight.zero_points else fmt.scale_type)
        head = np.ascontiguousarray(_by_tile(typed, tiles).transpose(0, 2, 1)).reshape(tiles, -1).view(np.uint8)
        out[:, at : at + head.shape[1]] = head
        at += head.shape[1]
    # Four consecutive inputs of an output are one dword.
    quads = _by_tile(np.ascontiguousarray(weight.q[rows]), tiles).view("<u4")
    if fmt.bits == 4:
        quads = quads[:, :, ::2] | (quads[:, :, 1::2] << 4)
    out[:, fmt.head_bytes :] = np.ascontiguousarray(quads.transpose(0, 2, 1)).reshape(tiles, -1).view(np.uint8)


def _read(tiles: Array, fmt: WeightFormat) -> tuple[Array, Array, Array | None]:
    def numbers(at: int, dtype: str) -> Array:
        size = fmt.groups * TILE_OUTPUTS * np.dtype(dtype).itemsize
        head = np.ascontiguousarray(tiles[:, at : at + size]).view(dtype).reshape(-1, fmt.groups, TILE_OUTPUTS)
        return head.transpose(0, 2, 1).reshape(-1, fmt.groups)[: fmt.M]

    scale_bytes = fmt.groups * TILE_OUTPUTS * np.dtype(fmt.scale_type).itemsize
    zeros = None if fmt.zero_point == "none" else numbers(scale_bytes, "uint8" if fmt.zero_point == "uint8" else fmt.scale_type)
    lines = np.ascontiguousarray(tiles[:, fmt.head_bytes :]).view("<u4").reshape(tiles.shape[0], -1, TILE_OUTPUTS).transpose(0, 2, 1)
    if fmt.bits == 4:
        lines = np.stack([lines & 0x0F0F0F0F, lines >> 4 & 0x0F0F0F0F], axis=-1)
    q = np.ascontiguousarray(lines).reshape(-1, fmt.K // 4).view(np.uint8)
    return np.ascontiguousarray(q[: fmt.M]), numbers(0, fmt.scale_type), zeros
