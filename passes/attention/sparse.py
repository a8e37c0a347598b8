"""Probing a long mask without a past at a few of its positions: the graph's own counting (`Range`) is replaced by positions with gaps.

Without a past a mask of n tokens has n² cells, and a window of 8192 shows at none shorter. Where every cell is computed from its two
positions alone, elementwise, cells can be asked for one by one. That is known by the operators: what else tells one position from another
(a triangle, a running sum, a table) must not be there, or all cells are computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from ..extract import cone
from ..observe import Dim, Observation, Probe
from ..token_rules import ELEMENTWISE
from .laboratory import Array
from .mask_source import Situation

# Beside elementwise ones: counting, sizes, and what lays values out. A Gather here reads sizes or rows of a mask by position.
_PLAIN = frozenset(ELEMENTWISE) | {
    "Range", "Shape", "Size", "Reshape", "Unsqueeze", "Squeeze", "Expand", "Concat", "ConstantOfShape", "Transpose", "Gather", "GatherND", "Identity",
}


def sparse_situations(observation: Observation, roots: Iterable[ir.Value], end: int, constants: Sequence[int]) -> Iterator[Situation]:
    """Ways of asking for positions below `end` around each of `constants`: none where the mask is not known to be elementwise.

    Each may fail to run, where the graph's sizes and positions then don't fit together.
    """
    ranges = _ranges(observation, list(roots))
    if not ranges or observation.cached:
        return
    near = {p for c in (0, *constants, end) for p in range(c - 3, c + 4)} | {end // 2}
    positions = np.array(sorted(p for p in near if 0 <= p < end))
    probe = Probe(1, len(positions), 0)
    given: dict[ir.Value, Array] = {value: positions.astype(value.dtype.numpy()) for value in ranges if value.dtype is not None}
    padding = observation.interface.input("attention_mask")
    if padding is not None:  # read by position, or laid beside the positions
        mask = next(value for value in observation.model.graph.inputs if value.name == padding.name)
        assert mask.dtype is not None
        yield Situation(probe, positions, positions, {**given, mask: np.ones((1, end), mask.dtype.numpy())})
    yield Situation(probe, positions, positions, given)


def _ranges(observation: Observation, roots: list[ir.Value]) -> list[ir.Value]:
    """The Range nodes of an elementwise cone, all of which must count 0 … S−1; empty where one does not."""
    piece = cone(roots, observation.is_dims)
    for node in piece.nodes:
        if node.domain not in ("", "ai.onnx") or node.op_type not in _PLAIN or _mixes(observation, node):
            return []
    if any(leaf.const_value is not None and leaf.const_value.size > 64 for leaf in piece.leaves):
        return []
    if any((port := observation.interface.input("position_ids")) is not None and leaf.name == port.name for leaf in piece.leaves):
        return []
    ranges = [node.outputs[0] for node in piece.nodes if node.op_type == "Range"]
    counted = [value for value in ranges if observation.dims(value) == (Dim(1, ("S",)),)]
    others = [value for value in ranges if value not in counted and _grows(observation, value)]
    probe = Probe(1, 5, 0)
    if others or not counted or any(not np.array_equal(array, np.arange(5)) for array in observation.evaluate(counted, probe)):
        return []
    return counted


def _mixes(observation: Observation, node: ir.Node) -> bool:
    """Whether a length has a part in a cell's value, or a place in a cell's position: both would differ where positions have gaps."""
    if node.op_type == "Concat":
        dims, axis = observation.dims(node.outputs[0]), node.attributes.get_int("axis")
        return dims is None or (bool(dims) and bool(dims[axis].letters))
    if node.op_type not in ELEMENTWISE:
        return False
    operands = [value for value in node.inputs if value is not None]
    long = [_grows(observation, value) for value in operands]
    return any(long) and any(not grows and observation.kind(value) != "constant" for grows, value in zip(long, operands))


def _grows(observation: Observation, value: ir.Value) -> bool:
    """Whether a value has a size that follows from the tokens."""
    dims = observation.dims(value)
    return dims is None or any(letter != "B" for dim in dims for letter in dim.letters)
