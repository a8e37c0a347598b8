"""Where a value's tokens lie: the vocabulary of the locality proof.

The proof looks at one sequence (B = 1): that is how the rewritten graph runs, all tokens of a step in one row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from .observe import Dim


@dataclass(frozen=True)
class TokenAxis:
    """Token t holds, along dimension `axis` of size outer·S·inner, the indices (o·S + t)·inner + i for all o < outer, i < inner."""

    axis: int
    outer: int = 1
    inner: int = 1

    def moved(self, axis: int) -> TokenAxis:
        return TokenAxis(axis, self.outer, self.inner)

    @property
    def alone(self) -> bool:
        """Whether the dimension holds nothing but tokens."""
        return self.outer == self.inner == 1

    def __str__(self) -> str:
        return f"axis {self.axis}" + ("" if self.alone else f" ({self.outer}·S·{self.inner})")


class Sideways(Exception):
    """A row would see another one, or it can't be shown that it doesn't. Caught by the proof, never seen outside."""

    def __init__(self, reason: str, nearest: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.nearest = nearest


Dims = tuple[Dim, ...]


def for_one_sequence(dims: Dims) -> Dims:
    """`dims` at B = 1."""
    return tuple(Dim(dim.factor, tuple(letter for letter in dim.letters if letter != "B")) for dim in dims)


def token_dimension(dims: Dims) -> int | None:
    """The one dimension that counts tokens; None where there is none. Sideways where a length goes in any other way (S·S, P, T)."""
    found = [index for index, dim in enumerate(dims) if dim.letters]
    if not found:
        return None
    if len(found) > 1 or dims[found[0]].letters != ("S",):
        raise Sideways("its size follows from lengths other than one count of tokens", f"shape [{', '.join(map(str, dims))}]")
    return found[0]


@dataclass(frozen=True)
class View:
    """A node as its rule sees it. Per input: `axes` (None: no tokens in it) and `shapes` (None: absent); per output: `results`.

    `constant(i)` gives the contents of a small input that is the same in every situation.
    """

    node: ir.Node
    axes: tuple[TokenAxis | None, ...]
    shapes: tuple[Dims | None, ...]
    results: tuple[Dims, ...]
    opset: int
    constant: Callable[[int], NDArray[Any]]

    def rank(self, index: int) -> int:
        shape = self.shapes[index]
        assert shape is not None
        return len(shape)

    def only(self, index: int = 0) -> TokenAxis:
        """The axis of input `index`, where no other input may have tokens."""
        axis = self.axes[index]
        others = [i for i, other in enumerate(self.axes) if other is not None and i != index]
        if axis is None or others:
            raise Sideways("tokens enter through an input that can't have them", f"inputs {others or 'none'}, expected {index} alone")
        return axis

    def has(self, index: int) -> bool:
        return index < len(self.shapes) and self.shapes[index] is not None

    def axis_attribute(self, default: int | None, rank: int) -> int:
        """Attribute `axis` as a non-negative number."""
        axis = self.node.attributes.get_int("axis", default)
        if axis is None:
            raise Sideways("its axis is not given")
        return axis % rank if rank else 0

    def aligned(self, indices: tuple[int, ...] | None = None, rank: int | None = None) -> TokenAxis:
        """The common axis of inputs that are broadcast against each other to `rank` (the first output's, where it is not given)."""
        rank = len(self.results[0]) if rank is None else rank
        found: set[TokenAxis] = set()
        chosen = range(len(self.axes)) if indices is None else indices
        for index in chosen:
            axis = self.axes[index]
            if axis is not None:
                found.add(axis.moved(axis.axis + rank - self.rank(index)))
        if len(found) != 1:
            raise Sideways("tokens meet tokens along different axes", " against ".join(sorted(map(str, found))))
        axis = found.pop()
        for index in chosen:
            shape = self.shapes[index] if self.axes[index] is None else None
            place = axis.axis - rank + len(shape) if shape is not None else -1
            if shape is not None and place >= 0 and shape[place] != Dim(1):
                raise Sideways(f"input {index} has its own values along the tokens", f"{shape[place]} of them along {axis}")
        return axis


def relaid(before: Dims, axis: TokenAxis, after: Dims) -> TokenAxis:
    """The token axis after elements stay in order and the shape changes from `before` to `after`."""
    ahead = axis.outer * prod(dim.factor for dim in before[: axis.axis])
    behind = axis.inner * prod(dim.factor for dim in before[axis.axis + 1 :])
    place = token_dimension(after)
    if place is None:
        raise Sideways("tokens are laid into dimensions of fixed size", f"shape [{', '.join(map(str, after))}]")
    outside, inside = prod(dim.factor for dim in after[:place]), prod(dim.factor for dim in after[place + 1 :])
    if (ahead // outside) * (behind // inside) != after[place].factor:  # equal only where both divide: elements are neither made nor lost
        raise Sideways("tokens are laid across other dimensions", f"{axis} of [{', '.join(map(str, before))}]")
    return TokenAxis(place, ahead // outside, behind // inside)
