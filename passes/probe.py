"""Situations that a graph is run in, and sizes as formulas over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..errors import OctavoError
from ..models.interface import GraphInterface, GraphPort

# A size that only other inputs have, where a probe doesn't say.
OTHER_SIZE = 6

Letters = Mapping[str, str] | None
"""What the sizes of inputs that are no decoder's are called (`by_name`, `by_place`); None where every size of the graph is fixed."""

_NO_LETTERS: Letters = MappingProxyType({})

_DRIVEN = ("input_ids", "attention_mask", "position_ids", "cache_position", "write_indices", "past_key", "past_value")


class ObservationError(OctavoError):
    """The graph can't be run at a probe, or a value can't be evaluated. `probe` is the first that failed, None where it is about none."""

    def __init__(self, message: str, *, probe: Probe | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.probe = probe


@dataclass(frozen=True, eq=False)
class Probe:
    """One concrete situation: `batch` sequences, `length` new tokens each, over `past` cached ones.

    attention_mask [B, P+S] (None: ones) and position_ids [B, S] (None: P … P+S−1 in each row) are cast to the graph's own types.
    `others` gives sizes that only other inputs have (an encoder's length, an image's height), by name.
    """

    batch: int
    length: int
    past: int
    attention_mask: NDArray[Any] | None = None
    position_ids: NDArray[Any] | None = None
    others: Mapping[str, int] = field(default_factory=dict)

    def letter(self, letter: str) -> int:
        known = {"B": self.batch, "S": self.length, "P": self.past, "T": self.past + self.length}
        return known[letter] if letter in known else self.others.get(letter, OTHER_SIZE)

    def __str__(self) -> str:
        given = [name for name in ("attention_mask", "position_ids") if getattr(self, name) is not None]
        return f"batch {self.batch}, {self.length} tokens over {self.past}" + "".join(f", own {name}" for name in given)


@dataclass(frozen=True)
class Dim:
    """A dimension as `factor` × a product of letters out of B, S, P and T = P + S, sorted; a constant one has no letters.

    Sizes that only other inputs have count as letters too, under the names that the graph gives them.
    """

    factor: int
    letters: tuple[str, ...] = ()

    def at(self, probe: Probe) -> int:
        return self.factor * prod(probe.letter(letter) for letter in self.letters)

    def __str__(self) -> str:
        return "·".join((*((str(self.factor),) if self.factor != 1 or not self.letters else ()), *self.letters))


def port_of(interface: GraphInterface, value: ir.Value) -> GraphPort:
    return next(port for port in interface.inputs if port.name == value.name)


def is_static(interface: GraphInterface) -> bool:
    """Whether every input has fixed sizes: such a graph runs in one situation only."""
    return all(port.shape is not None and all(isinstance(size, int) for size in port.shape) for port in interface.inputs)


def by_name(interface: GraphInterface) -> dict[str, str]:
    """What the named sizes of other inputs are: B, S, P or T where an input of a decoder has the same name there, else letters of their own."""
    letters: dict[str, str] = {}
    places = {"input_ids": "BS", "position_ids": "BS", "attention_mask": "BT", "past_key": "B P ", "past_value": "B P "}
    for role, axes in places.items():
        for port in interface.inputs:
            for size, letter in zip(port.shape or (), axes) if port.role == role else ():
                if isinstance(size, str) and letter != " ":
                    letters.setdefault(size, letter)
    if interface.input("input_ids") is None:
        first = next((port.shape[0] for port in interface.inputs if port.shape and not isinstance(port.shape[0], int)), None)
        if first is not None:
            letters.setdefault(first, "B")
    for port in interface.inputs:
        for axis, size in enumerate(port.shape or ()):
            if port.role == "other" and not isinstance(size, int):
                letters.setdefault(symbol(port, axis), symbol(port, axis))
    return letters


def by_place(interface: GraphInterface) -> dict[str, str]:
    """As above for exporters that name each size anew: the first is the batch, and rows of integers go with the ids."""
    letters = by_name(interface)
    for port in interface.inputs:
        shape = port.shape or ()
        for axis, letter in enumerate("BS"[: 2 if len(shape) == 2 and port.dtype.startswith("int") else 1]):
            if port.role == "other" and axis < len(shape) and not isinstance(shape[axis], int):
                letters[symbol(port, axis)] = letter
    return letters


def symbol(port: GraphPort, axis: int) -> str:
    """The name of a size that is not fixed, made up where the exporter gives none."""
    size = None if port.shape is None else port.shape[axis]
    return size if isinstance(size, str) and size else f"{port.name}.{axis}"


def input_shape(port: GraphPort, probe: Probe, letters: Letters = _NO_LETTERS) -> tuple[int, ...]:
    """The shape in which an input is fed."""
    shape = port.shape
    if port.role not in _DRIVEN or letters is None:
        if shape is None:
            raise ObservationError(f"graph input {port.name} has no role that a decoder's input can have, and no known shape")
        named = ((letters or {}).get(symbol(port, axis), symbol(port, axis)) for axis in range(len(shape)))
        return tuple(size if isinstance(size, int) else probe.letter(letter) for size, letter in zip(shape, named))
    if port.role == "attention_mask":  # beside a cache of fixed places it may have one for each
        return (probe.batch, shape[1] if shape and len(shape) == 2 and isinstance(shape[1], int) else probe.past + probe.length)
    if port.role in ("cache_position", "write_indices"):
        return (probe.length if port.role == "cache_position" else probe.batch,)
    if port.role == "input_ids":
        return (probe.batch, probe.length)
    if port.role == "position_ids":  # some graphs have one row of positions for all sequences
        return (1 if shape and shape[0] == 1 else probe.batch, probe.length)
    if shape is None or len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int):
        raise ObservationError(f"graph input {port.name}, a cache, has no fixed number of heads and head size: {shape}")
    return (probe.batch, shape[1], shape[2] if isinstance(shape[2], int) else probe.past, shape[3])


def feed_of(port: GraphPort, value: ir.Value, probe: Probe, letters: Letters = _NO_LETTERS) -> NDArray[Any]:
    """What an input is fed at a probe: zeros, but for masks and positions."""
    dtype = value.dtype
    assert dtype is not None, f"graph input {value.name} has no type"
    if dtype == ir.DataType.STRING:
        raise ObservationError(f"graph input {port.name} takes text")
    shape = input_shape(port, probe, letters)
    array: NDArray[Any] = np.zeros(shape)
    if port.role == "attention_mask":
        array = np.ones(shape)
        if probe.attention_mask is not None:
            array[:, : probe.attention_mask.shape[1]] = probe.attention_mask
    elif port.role == "cache_position":
        array = np.arange(probe.length) + probe.past
    elif port.role == "write_indices":
        array = np.full(shape, probe.past)
    elif port.role == "position_ids":
        counted = np.broadcast_to(np.arange(shape[-1]) + probe.past, shape)
        array = counted if probe.position_ids is None else np.asarray(probe.position_ids)
    assert array.shape == shape, f"{port.role} of the probe has shape {array.shape}, not {shape}"
    return array.astype(dtype.numpy())


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:400] if str(error).strip() else type(error).__name__
