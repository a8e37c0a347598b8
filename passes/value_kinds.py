"""What each value of a graph follows from, read off the operators between it and the inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Literal

import onnx_ir as ir

from ..models.interface import GraphInterface
from .extract import LARGE, reads

Kind = Literal["constant", "structural", "data"]

# Which inputs decide an op's output *shape* by their content (none, where a standard op is not listed).
_SHAPE_OPERANDS: dict[str, tuple[int, ...]] = {
    "Reshape": (1,), "Expand": (1,), "Tile": (1,), "ConstantOfShape": (0,), "Range": (0, 1, 2), "Slice": (1, 2, 3, 4), "Squeeze": (1,),
    "Unsqueeze": (1,), "Split": (1,), "SplitToSequence": (1,), "SequenceAt": (1,), "Pad": (1, 3), "TopK": (1,), "OneHot": (1,),
    "Resize": (1, 2, 3), "Upsample": (1,), "CenterCropPad": (1,), "MaxUnpool": (2,), "NonZero": (0,), "Compress": (1,), "Unique": (0,),
    "NonMaxSuppression": (0, 1, 2, 3, 4), "StringSplit": (0,), "If": (0,), "Loop": (0, 1), "AffineGrid": (1,), "Col2Im": (1, 2),
    "BlackmanWindow": (0,), "HannWindow": (0,), "HammingWindow": (0,), "DFT": (1, 2), "STFT": (1, 3), "MelWeightMatrix": (0, 1),
    **dict.fromkeys(
        ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp",
         "ReduceSumSquare"), (1,)),
}
_CONTRIB_SHAPE_OPERANDS: dict[str, tuple[int, ...]] = {"GroupQueryAttention": (5, 6)}
_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
_STRUCTURAL_ROLES = ("attention_mask", "position_ids", "cache_position", "write_indices")


class Kinds:
    """Kind of every value of the main graph, and whether its shape follows from content (`loose`) that a probe of zeros can't stand for."""

    def __init__(self, graph: ir.Graph, interface: GraphInterface) -> None:
        roles = {port.name: port.role for port in interface.inputs}
        self.kind: dict[ir.Value, Kind] = {}
        self.loose: set[ir.Value] = set()
        self._unread: set[ir.Value] = set()  # computed from a constant that the probes replace by zeros
        for value in graph.initializers.values():
            self.kind[value] = "constant"
            if is_stood_for(value):
                self._unread.add(value)
        for value in graph.inputs:
            if value not in self.kind:
                self.kind[value] = "structural" if roles.get(str(value.name)) in _STRUCTURAL_ROLES else "data"
        for node in graph:
            self._node(node)

    def _node(self, node: ir.Node) -> None:
        operands = list(reads(node))
        kinds = {self.kind[value] for value in operands}
        kind: Kind = "data" if "data" in kinds or node.op_type in _RANDOM else "structural" if "structural" in kinds else "constant"
        loose = any(value in self.loose for value in operands)
        unread = any(value in self._unread for value in operands)
        if node.op_type in ("Shape", "Size") and node.domain in ("", "ai.onnx"):
            # the dims themselves are what is asked for: loose ones are as bad as data, others follow from the probe alone
            kind, unread = ("data" if loose else "constant" if kind == "constant" else "structural"), False
            loose = False
        elif any(self.kind[value] == "data" or value in self._unread for value in _shape_operands(node)):
            loose = True
        for output in node.outputs:
            self.kind[output] = kind
            if loose:
                self.loose.add(output)
            if unread or (kind == "constant" and is_stood_for(output)):
                self._unread.add(output)


def _shape_operands(node: ir.Node) -> Iterable[ir.Value]:
    if node.domain in ("", "ai.onnx"):
        places: Sequence[int] = _SHAPE_OPERANDS.get(node.op_type, ())
    elif node.domain == "com.microsoft":
        places = _CONTRIB_SHAPE_OPERANDS.get(node.op_type, ())
    else:
        return list(reads(node))  # nothing is known about it
    return [value for place in places if place < len(node.inputs) and (value := node.inputs[place]) is not None]


def extent(value: ir.Value) -> tuple[ir.DataType, tuple[int, ...]] | None:
    """Type and shape of a constant, as far as they are known without computing it."""
    source = value.const_value if value.const_value is not None else value
    dtype, shape = source.dtype, source.shape
    if dtype is None or dtype == ir.DataType.STRING or shape is None or not all(isinstance(size, int) for size in shape):
        return None
    return dtype, tuple(int(size) for size in shape)


def is_stood_for(value: ir.Value) -> bool:
    """Whether zeros stand for a constant while shapes are learned: it is a weight, or takes as long to compute as one."""
    known = extent(value)
    return known is not None and prod(known[1]) * known[0].itemsize >= LARGE
