"""Floats that were quantized once, as what they were: scale·(q − zero point), by groups, exactly.

Exporters unpack GPTQ and AWQ checkpoints by shifts and masks, and fold that where they can; Q/DQ graphs quantize constants that are still floats. What
is left of all of them are floats of which each group lies on a grid through 0. The grid is found again from the numbers alone: the smallest
magnitude of a group is n steps for some whole n, the largest then m, and the right pair explains all the others to the bit.
"""

from __future__ import annotations

from typing import get_args

import numpy as np
from numpy.typing import NDArray

from ...custom_ops.packing import QuantizedWeight
from .groups import CHUNK, Bits, GroupSize

Array = NDArray[np.float32]
# Groups that are tried first: of weights that were never quantized none fits.
_SAMPLE = 64
# Elements of a group that are looked at before all of it is.
_FEW = 8
# The largest magnitude was rounded as a product: the scale is its quotient by m, or a float next to that.
_BESIDE = (None, np.float32(0), np.float32(np.inf))


def on_grid(weight: Array) -> QuantizedWeight | None:
    """`weight` [M, K] as int4, or else int8, in the largest groups in which it is exactly that; None where it is not.

    The values are the same to the bit (0 may have either sign). Symmetric where every group allows it.
    """
    M, K = weight.shape
    sizes = [size for size in sorted(get_args(GroupSize), reverse=True) if K % size == 0]
    for bits in sorted(get_args(Bits)):
        for block in (K, *sizes) if sizes else ():      # a row may have one scale: its largest magnitude then tells it sooner
            size = sizes[0] if block == K else block
            groups = np.ascontiguousarray(weight, np.float32).reshape(-1, block)
            if _steps(groups[:: max(1, len(groups) // _SAMPLE)], bits) is None:
                continue
            step = max(1, CHUNK // block)
            found = [_steps(groups[start : start + step], bits) for start in range(0, len(groups), step)]
            if all(part is not None for part in found):
                scale, n = (np.concatenate(part) for part in zip(*(part for part in found if part is not None)))
                return _assembled(np.repeat(scale, block // size), n.reshape(-1, size), (M, K), bits, size)
    return None


def _steps(groups: Array, bits: Bits) -> tuple[Array, NDArray[np.int16]] | None:
    """Scales [n] and whole numbers [n, g] whose products are `groups`, if all have them."""
    top, magnitude = (1 << bits) - 1, np.abs(groups)
    largest = magnitude.max(axis=1)
    if not np.isfinite(largest).all():
        return None
    smallest = np.where(magnitude > 0, magnitude, np.float32(np.inf)).min(axis=1)
    scale, left = np.ones(len(groups), np.float32), np.flatnonzero(largest)
    for n in range(1, top + 1):
        if not len(left):
            break
        m = np.rint(largest[left] * (np.float32(n) / smallest[left]))
        if m.max() > top:
            return None     # and with a larger n even more
        for towards in _BESIDE:
            candidate = largest[left] / m
            if towards is not None:
                candidate = np.nextafter(candidate, towards)
            some = np.flatnonzero(_exact(groups[left, :_FEW], candidate, top))
            fits = some[_exact(groups[left[some]], candidate[some], top)]
            scale[left[fits]] = candidate[fits]
            left, m = np.delete(left, fits), np.delete(m, fits)
    return None if len(left) else (scale, np.rint(groups / scale[:, None]).astype(np.int16))


def _exact(groups: Array, scale: Array, top: int) -> NDArray[np.bool_]:
    """Of each group, whether it is whole multiples of its scale, and these and 0 span no more than `top`."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        n = np.rint(groups / scale[:, None])
        same = (n * scale[:, None] == groups).all(axis=1)
        return same & (np.maximum(n.max(axis=1), 0) - np.minimum(n.min(axis=1), 0) <= top)


def _assembled(scale: Array, n: NDArray[np.int16], shape: tuple[int, ...], bits: Bits, size: GroupSize) -> QuantizedWeight:
    middle = 1 << (bits - 1)
    turned = (n.max(axis=1) >= middle) & (n.min(axis=1) > -middle)    # as Q4_0: the largest is −8 steps of a negative scale
    scale, n = np.where(turned, -scale, scale), np.where(turned[:, None], -n, n)
    few = (shape[0], shape[1] // size)
    if n.min() >= -middle and n.max() < middle:
        return QuantizedWeight((n + middle).astype(np.uint8).reshape(shape), scale.reshape(few), bits, size)
    zero = np.maximum(-n.min(axis=1), 0)
    return QuantizedWeight((n + zero[:, None]).astype(np.uint8).reshape(shape), scale.reshape(few), bits, size, zero.astype(np.uint8).reshape(few))
