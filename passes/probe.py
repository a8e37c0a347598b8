"""Situations that a graph is run in, and sizes as formulas over them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..errors import OctavoError
from ..models.interface import GraphInterface, GraphPort


class ObservationError(OctavoError):
    """The graph can't be run at a probe, or a value can't be evaluated. `probe` is the first that failed, None where it is about none."""

    def __init__(self, message: str, *, probe: Probe | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.probe = probe


@dataclass(frozen=True, eq=False)
class Probe:
    """One concrete situation: `batch` sequences, `length` new tokens each, over `past` cached ones.

    attention_mask [B, P+S] (None: ones) and position_ids [B, S] (None: P … P+S−1 in each row) are cast to the graph's own types.
    """

    batch: int
    length: int
    past: int
    attention_mask: NDArray[Any] | None = None
    position_ids: NDArray[Any] | None = None

    def letter(self, letter: str) -> int:
        return {"B": self.batch, "S": self.length, "P": self.past, "T": self.past + self.length}[letter]

    def __str__(self) -> str:
        given = [name for name in ("attention_mask", "position_ids") if getattr(self, name) is not None]
        return f"batch {self.batch}, {self.length} tokens over {self.past}" + "".join(f", own {name}" for name in given)


@dataclass(frozen=True)
class Dim:
    """A dimension as `factor` × a product of letters out of B, S, P and T = P + S, sorted; a constant one has no letters."""

    factor: int
    letters: tuple[str, ...] = ()

    def at(self, probe: Probe) -> int:
        return self.factor * prod(probe.letter(letter) for letter in self.letters)

    def __str__(self) -> str:
        return "·".join((*((str(self.factor),) if self.factor != 1 or not self.letters else ()), *self.letters))


def port_of(interface: GraphInterface, value: ir.Value) -> GraphPort:
    port = next((port for port in interface.inputs if port.name == value.name), None)
    if port is None or port.role not in ("input_ids", "attention_mask", "position_ids", "past_key", "past_value"):
        raise ObservationError(f"graph input {value.name} has no role that a decoder's input can have")
    return port


def input_shape(port: GraphPort, probe: Probe) -> tuple[int, ...]:
    if port.role == "attention_mask":
        return (probe.batch, probe.past + probe.length)
    shape = port.shape
    if port.role == "input_ids":
        return (probe.batch, probe.length)
    if port.role == "position_ids":  # some graphs have one row of positions for all sequences
        return (1 if shape and shape[0] == 1 else probe.batch, probe.length)
    if shape is None or len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int):
        raise ObservationError(f"graph input {port.name}, a cache, has no fixed number of heads and head size: {shape}")
    return (probe.batch, shape[1], probe.past, shape[3])


def feed_of(port: GraphPort, value: ir.Value, probe: Probe) -> NDArray[Any]:
    dtype = value.dtype
    assert dtype is not None, f"graph input {value.name} has no type"
    shape = input_shape(port, probe)
    if port.role == "attention_mask":
        array = np.ones(shape) if probe.attention_mask is None else np.asarray(probe.attention_mask)
    elif port.role == "position_ids":
        counted = np.tile(np.arange(probe.past, probe.past + probe.length), (shape[0], 1))
        array = counted if probe.position_ids is None else np.asarray(probe.position_ids)
    else:
        array = np.zeros(shape)
    assert array.shape == shape, f"{port.role} of the probe has shape {array.shape}, not {shape}"
    return array.astype(dtype.numpy())


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:400] if str(error).strip() else type(error).__name__
