"""How a matrix is cut into groups, and what may become a quantized one. What its numbers mean stands in `WeightFormat` (custom_ops/contract.py).

A matrix [M, K] (outputs, inputs) is cut along K into groups of g. Each group of a row has one scale and, where it is asymmetric, one zero
point (uint8) or one minimum (float, as in GGUF's Q4_1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ...custom_ops.contract import ZeroPoint
from ...custom_ops.packing import QuantizedWeight
from ...errors import ModelError, OptionError

Bits = Literal[4, 8]
GroupSize = Literal[32, 64, 128]

# Elements that a quantizer works on at once: its temporaries then stay in the second-level cache.
CHUNK = 1 << 17


@dataclass(frozen=True)
class Scheme:
    """How to quantize: 4 or 8 bits, groups of 32, 64 or 128, and what a group has besides its scale."""

    bits: Bits
    group_size: GroupSize
    zero_point: ZeroPoint = "none"

    def __post_init__(self) -> None:
        for name, known in (("bits", get_args(Bits)), ("group_size", get_args(GroupSize)), ("zero_point", get_args(ZeroPoint))):
            if getattr(self, name) not in known:
                raise OptionError(f"{name}={getattr(self, name)!r} is not one of {', '.join(map(repr, known))}")

    @property
    def top(self) -> int:
        """The largest q."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The q that means 0 in a symmetric group."""
        return 1 << (self.bits - 1)

    def __str__(self) -> str:
        kind = {"none": "symmetric", "uint8": "with zero points", "float": "with minimums"}[self.zero_point]
        return f"int{self.bits} in groups of {self.group_size}, {kind}"


def scheme_of(weight: QuantizedWeight) -> Scheme:
    """The scheme that a quantized matrix has."""
    return Scheme(weight.bits, weight.group_size, weight.zero_point)


def stacked(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """The rows of several matrices of one scheme, one after the other. Scales become float32 if one's are."""
    assert len({(scheme_of(part), part.q.shape[1]) for part in parts}) == 1, "rows of different schemes"

    def rows(found: list[NDArray[Any] | None]) -> NDArray[Any] | None:
        return None if found[0] is None else np.concatenate([part for part in found if part is not None])

    q, scales = rows([part.q for part in parts]), rows([part.scales for part in parts])
    assert q is not None and scales is not None
    zero_points, minimums = rows([part.zero_points for part in parts]), rows([part.minimums for part in parts])
    return replace(parts[0], q=q, scales=scales, zero_points=zero_points, minimums=minimums)


def taken(weight: QuantizedWeight, rows: NDArray[np.intp]) -> QuantizedWeight:
    """Some rows of a matrix, in an order of their own."""
    zero_points, minimums = (None if found is None else found[rows] for found in (weight.zero_points, weight.minimums))
    return replace(weight, q=weight.q[rows], scales=weight.scales[rows], zero_points=zero_points, minimums=minimums)


def check_weight(weight: NDArray[Any], scheme: Scheme, name: str) -> NDArray[np.float32]:
    """`weight` [M, K] as contiguous float32. ModelError: NaN or infinity; OptionError: the groups don't divide K. Both name the tensor."""
    assert weight.ndim == 2, f"{name} is no matrix: {weight.shape}"
    check_groups(weight.shape[1], scheme.group_size, name)
    floats = np.ascontiguousarray(weight, dtype=np.float32)
    # In float64 a sum of finite float32 numbers is finite, and it is quicker to look at than all of them.
    if not np.isfinite(floats.sum(dtype=np.float64)):
        row, column = np.argwhere(~np.isfinite(floats))[0]
        hint = "the checkpoint is damaged: export it again"
        raise ModelError(f"{name} holds {floats[row, column]} at output {row}, input {column}: it can't be quantized", hint=hint)
    return floats


def check_groups(K: int, group_size: int, name: str) -> None:
    """OptionError, naming the tensor, where K inputs are no whole number of groups."""
    if K % group_size:
        fitting = [str(size) for size in get_args(GroupSize) if K % size == 0]
        hint = f"group_size={' or '.join(fitting)} would, or leave it in fp32" if fitting else "leave it in fp32: name it in the map of weights"
        raise OptionError(f"groups of {group_size} don't divide the {K} inputs of {name}", hint=hint)
