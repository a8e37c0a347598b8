"""Where an operand of a direct site comes from: back through transposes, repeated heads and scales, proved on index numbers.

What the walk passes is not computed any more: keys that were transposed for a product need not be, and repeated heads are read once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .chain import SCALES, Chain
from .direct import DirectLayout, Operand
from .laboratory import Array, Laboratory


@dataclass(frozen=True)
class Traced:
    """`operand` times `factor` is what was asked about."""

    operand: Operand
    factor: float


def traced_operands(
    lab: Laboratory, scale: float, query: Operand, key: Operand, value: Operand,
) -> tuple[float, Operand, Operand, Operand]:
    """The operands where they come from, and the scale with the factors on the way. They stay where heads would not divide."""
    q, k, v = (trace(lab, operand) for operand in (query, key, value))
    if v.factor != 1 or q.operand.heads != query.heads or k.operand.heads != v.operand.heads:
        return scale, query, key, value
    return scale * q.factor * k.factor, q.operand, k.operand, v.operand


def trace(lab: Laboratory, operand: Operand) -> Traced:
    """The earliest value that holds the same heads; the operand itself where nothing before it does."""
    best = Traced(operand, 1.0)
    if operand.layout not in ("BHSD", "BHDS"):
        return best
    for computed, chain in lab.graph.walk(operand.value, SCALES):
        if len(computed) == 1 and chain.leaves == computed and chain.nodes:
            found = _place(lab, chain, operand)
            best = best if found is None else found
    return best


def _place(lab: Laboratory, chain: Chain, operand: Operand) -> Traced | None:
    places = {_at(lab, chain, operand, index) for index in range(len(lab.probes))}
    found = next(iter(places))
    if len(places) != 1 or found is None:
        return None
    layout, heads, factor = found
    return Traced(Operand(chain.leaves[0], layout, heads, operand.size), factor)


def _at(lab: Laboratory, chain: Chain, operand: Operand, index: int) -> tuple[DirectLayout, int, float] | None:
    """Layout and heads of the leaf and the factor on it at one probe."""
    probe = lab.probes[index]
    shape = lab.shape(chain.leaves[0], probe)
    if shape is None or 0 in shape:
        return None
    ones = lab.run(chain, [np.ones(shape)], probe)
    count = int(np.prod(shape))
    moved = lab.run(chain, [np.arange(count, dtype=np.float64).reshape(shape)], probe)
    if ones is None or moved is None or ones.ndim != 4 or ones.size == 0 or not np.all(ones == ones.flat[0]) or ones.flat[0] == 0:
        return None
    factor = float(ones.flat[0])
    indices = np.rint(moved / factor)
    indices = indices.swapaxes(2, 3) if operand.layout == "BHDS" else indices
    batch, total, length, size = indices.shape
    heads, rest = divmod(count, batch * length * size)
    if rest or heads == 0 or total % heads or size != operand.size:
        return None
    for layout, tokens_first in _layouts(shape, batch, length, heads, size):
        expected = np.arange(count).reshape((batch, length, heads, size) if tokens_first else (batch, heads, length, size))
        expected = expected.transpose(0, 2, 1, 3) if tokens_first else expected
        if _equal(indices, np.repeat(expected, total // heads, axis=1)):
            return layout, heads, factor
    return None


def _layouts(shape: tuple[int, ...], batch: int, length: int, heads: int, size: int) -> list[tuple[DirectLayout, bool]]:
    found: list[tuple[DirectLayout, bool]] = []
    if shape == (batch, length, heads * size):
        found.append(("BSH", True))
    if shape == (batch, length, heads, size):
        found.append(("BSHD", True))
    if shape == (batch, heads, length, size):
        found.append(("BHSD", False))
    return found


def _equal(a: Array, b: Array) -> bool:
    return a.shape == b.shape and bool(np.array_equal(a, b))
