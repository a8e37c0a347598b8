"""Seeded inputs for a graph that is no decoder, made from the types, shapes and roles of its own interface."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedError
from ..models.interface import GraphInterface, GraphPort

BATCH = 2
# Ids below this are in every vocabulary, and in the small tables of token types there is at least id 0.
FEW_IDS = 16
_YOURSELF = "compare model.run of both sides on inputs of your own"


def seeded_inputs(interface: GraphInterface, length: int, seed: int) -> dict[str, NDArray[Any]]:
    """One array for each input. A symbol has one size wherever it stands: the first of a shape is BATCH, every other `length`.

    The mask hides the end of the last row, so that padding is part of what is compared. UnsupportedError: an input of unknown shape.
    """
    rng = np.random.default_rng(seed)
    sizes: dict[str, int] = {}
    return {port.name: _array(port, _shape(port, length, sizes), rng) for port in interface.inputs}


def _shape(port: GraphPort, length: int, sizes: dict[str, int]) -> tuple[int, ...]:
    if port.shape is None:
        raise UnsupportedError(f"the shape of the input {port.name} is not known", hint=_YOURSELF)
    for axis, size in enumerate(port.shape):
        if isinstance(size, str):
            sizes.setdefault(size, BATCH if axis == 0 and len(port.shape) > 1 else length)
    return tuple(size if isinstance(size, int) else length if size is None else sizes[size] for size in port.shape)


def _array(port: GraphPort, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[Any]:
    dtype = np.dtype(port.dtype)
    if port.role == "attention_mask":
        mask = np.ones(shape, dtype)
        mask[-1, ..., -(shape[-1] // 4) :] = 0
        return mask
    if port.role == "position_ids":
        return np.broadcast_to(np.arange(shape[-1], dtype=dtype), shape).copy()
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    if dtype.kind in "iu":
        return rng.integers(0, FEW_IDS, shape).astype(dtype) if port.role == "input_ids" else np.zeros(shape, dtype)
    if dtype.kind == "b":
        return np.ones(shape, dtype)
    raise UnsupportedError(f"the input {port.name} is of type {port.dtype}", hint=_YOURSELF)
