"""A *chain*: the part of a graph between a few data values (its leaves) and one target, made of ops that only move, scale or combine.

What a chain does is found by running it here, in NumPy, on arrays of our choice: index numbers show where every element goes, ones show
the factor on it, unit vectors show a rotation. That takes any spelling of a transpose, a repeated head or a rotary embedding for what it
does and not for how it is written. Everything else a chain's nodes read (shapes, masks, cosines) must not depend on data; its values
come from the observation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Array = NDArray[Any]

MOVES = frozenset({
    "Identity", "Cast", "Dropout", "Transpose", "Reshape", "Expand", "Unsqueeze", "Squeeze", "Flatten", "Concat", "Slice", "Split", "Tile",
    "Gather", "ScatterND", "ScatterElements", "TensorScatter",
})
SCALES = MOVES | {"Mul", "Div"}
LINEAR = SCALES | {"Add", "Sub", "Neg", "RotaryEmbedding"}
SCORES = SCALES | {"Add", "Sub", "Neg", "Where", "Tanh", "Max", "Min"}
PROBABILITIES = MOVES | {"Where", "IsNaN"}

_DOMAINS = {"": LINEAR | SCORES | PROBABILITIES, "com.microsoft": frozenset({"RotaryEmbedding"})}
_EXACT_TYPES = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """The value of an attribute, or `default` where the node has none."""
    found = node.attributes.get(name)
    return default if found is None else found.value


_ANY_OPERAND = {"Concat", "Add", "Sub", "Where", "Max", "Min"}
_ONE_OPERAND = {"Mul"}
_WRITES = {"ScatterND": 2, "ScatterElements": 2, "TensorScatter": 1}  # into the first operand, from this one


def passable(node: ir.Node, ops: Collection[str], is_data: Callable[[ir.Value], bool]) -> bool:
    """Whether a chain of `ops` may contain this node: an op known here, and data only where it is linear."""
    if node.op_type not in ops or node.op_type not in _DOMAINS.get(node.domain, ()):
        return False
    data = [i for i, value in enumerate(node.inputs) if value is not None and is_data(value)]
    if node.op_type in _WRITES:
        plain = attribute(node, "reduction", "none") == "none" and attribute(node, "mode", "linear") == "linear"
        return plain and data in ([0], [_WRITES[node.op_type]], [0, _WRITES[node.op_type]])
    if node.op_type not in _ANY_OPERAND and data != [0] and not (node.op_type in _ONE_OPERAND and len(data) == 1):
        return False
    if node.op_type == "Cast":  # a cast to half loses bits, which is no movement
        return attribute(node, "to", 0) in _EXACT_TYPES
    if node.op_type == "Dropout":
        training = node.inputs[2] if len(node.inputs) > 2 else None
        constant = None if training is None else ir.convenience.get_const_tensor(training)
        return training is None or (constant is not None and not constant.numpy().any())
    return True


@dataclass(frozen=True)
class Chain:
    """`nodes` in topological order lead from `leaves` to `target`; `sides` are the values from outside that they read."""

    target: ir.Value
    leaves: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]
    sides: tuple[ir.Value, ...]

    def run(self, leaves: Sequence[Array], sides: Mapping[ir.Value, Array]) -> Array:
        """The target's value for these leaf arrays. Arithmetic has the arrays' own type; movement keeps every element as it is."""
        values: dict[ir.Value | None, Array | None] = {None: None, **sides, **dict(zip(self.leaves, leaves, strict=True))}
        for node in self.nodes:
            outputs = _RUN[node.op_type](node, [values[value] for value in node.inputs])
            for value, array in zip(node.outputs, outputs):
                values.setdefault(value, array)
        result = values[self.target]
        assert result is not None
        return result


class Graph:
    """What a walk needs of a graph: the order of its nodes, and which values depend on data."""

    def __init__(self, graph: ir.Graph, is_data: Callable[[ir.Value], bool]) -> None:
        self.order = {node: index for index, node in enumerate(graph)}
        self.is_data = is_data
        self._given: dict[ir.Value, bool] = {}

    def walk(self, target: ir.Value, ops: Collection[str]) -> Iterator[tuple[tuple[ir.Value, ...], Chain]]:
        """Chains from ever earlier leaves to `target`, nearest first, the empty chain before all.

        Each is given with its *open* leaves: those computed in the graph. The others are graph inputs (a past). At every step the
        latest open leaf that `ops` allow is replaced by the data values it is computed from; what only moves a graph input (a past that
        passes through a Concat of one) counts as that input.
        """
        leaves, nodes = {target}, list[ir.Node]()
        while True:
            for value in [v for v in leaves if v.producer() is not None and self._is_given(v)]:
                self._open(value.producer(), leaves, nodes)
            computed = sorted((v for v in leaves if v.producer() is not None), key=lambda v: self.order.get(v.producer(), -1))
            yield tuple(computed), self._chain(target, leaves, nodes)
            node = next((v.producer() for v in reversed(computed) if passable(v.producer(), ops, self.is_data)), None)
            if node is None:
                return
            self._open(node, leaves, nodes)

    def _open(self, node: ir.Node | None, leaves: set[ir.Value], nodes: list[ir.Node]) -> None:
        """Replaces what `node` computes by what it is computed from."""
        assert node is not None
        leaves -= set(node.outputs)
        if node in nodes:
            return
        nodes.append(node)
        leaves |= {value for value in node.inputs if value is not None and self.is_data(value)}

    def _is_given(self, value: ir.Value) -> bool:
        """Whether `value` is a graph input, or a movement of graph inputs alone."""
        if value not in self._given:
            node = value.producer()
            data = [] if node is None else [v for v in node.inputs if v is not None and self.is_data(v)]
            self._given[value] = node is None or (len(data) == 1 and passable(node, MOVES, self.is_data) and self._is_given(data[0]))
        return self._given[value]

    def _chain(self, target: ir.Value, leaves: set[ir.Value], nodes: list[ir.Node]) -> Chain:
        ordered = tuple(sorted(nodes, key=self.order.__getitem__))
        sides = dict.fromkeys(v for n in ordered for v in n.inputs if v is not None and not self.is_data(v))
        inputs = sorted(leaves, key=lambda v: (-1 if v.producer() is None else self.order.get(v.producer(), -1), v.name or ""))
        return Chain(target, tuple(inputs), ordered, tuple(sides))


def _ints(array: Array | None) -> list[int] | None:
    return None if array is None else [int(x) for x in np.asarray(array).reshape(-1)]


def _axes(node: ir.Node, inputs: list[Any]) -> list[int] | None:
    """Axes as an input (opset 13 on) or as an attribute (before)."""
    if len(inputs) > 1 and inputs[1] is not None:
        return _ints(inputs[1])
    given = attribute(node, "axes", None)
    return None if given is None else list(given)


def _reshape(node: ir.Node, inputs: list[Any]) -> list[Array]:
    shape = _ints(inputs[1]) or []
    if not attribute(node, "allowzero", 0):
        shape = [inputs[0].shape[i] if size == 0 else size for i, size in enumerate(shape)]
    if -1 in shape:
        rest = int(np.prod([size for size in shape if size != -1], dtype=np.int64))
        shape[shape.index(-1)] = inputs[0].size // rest if rest else 0
    return [inputs[0].reshape(shape)]


def _transpose(node: ir.Node, inputs: list[Any]) -> list[Array]:
    return [inputs[0].transpose(attribute(node, "perm", None))]


def _expand(node: ir.Node, inputs: list[Any]) -> list[Array]:
    return [np.broadcast_to(inputs[0], np.broadcast_shapes(inputs[0].shape, tuple(_ints(inputs[1]) or ())))]


def _unsqueeze(node: ir.Node, inputs: list[Any]) -> list[Array]:
    return [np.expand_dims(inputs[0], tuple(_axes(node, inputs) or ()))]


def _squeeze(node: ir.Node, inputs: list[Any]) -> list[Array]:
    axes = _axes(node, inputs)
    return [np.squeeze(inputs[0], None if axes is None else tuple(axes))]


def _flatten(node: ir.Node, inputs: list[Any]) -> list[Array]:
    shape, axis = inputs[0].shape, attribute(node, "axis", 1)
    return [inputs[0].reshape(int(np.prod(shape[:axis], dtype=np.int64)), -1)]


def _concat(node: ir.Node, inputs: list[Any]) -> list[Array]:
    return [np.concatenate(inputs, axis=attribute(node, "axis", None))]


def _slice(node: ir.Node, inputs: list[Any]) -> list[Array]:
    data, starts, ends = inputs[0], _ints(inputs[1]) or [], _ints(inputs[2]) or []
    axes = (_ints(inputs[3]) if len(inputs) > 3 else None) or list(range(len(starts)))
    steps = (_ints(inputs[4]) if len(inputs) > 4 else None) or [1] * len(starts)
    index = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        # An end below −size means "past the front", which a Python slice spells None.
        index[axis] = slice(start, None if step < 0 and end < -data.shape[axis] else end, step)
    return [data[tuple(index)]]


def _split(node: ir.Node, inputs: list[Any]) -> list[Array]:
    axis = attribute(node, "axis", 0)
    sizes = (_ints(inputs[1]) if len(inputs) > 1 else None) or attribute(node, "split", None)
    if sizes is None:
        count, total = len(node.outputs), inputs[0].shape[axis]
        part = -(-total // count)
        sizes = [min(part, total - part * i) for i in range(count)]
    return list(np.split(inputs[0], np.cumsum(sizes)[:-1], axis=axis))


def _tile(node: ir.Node, inputs: list[Any]) -> list[Array]:
    return [np.tile(inputs[0], _ints(inputs[1]) or [])]


def _gather(node: ir.Node, inputs: list[Any]) -> list[Array]:
    return [np.take(inputs[0], np.asarray(inputs[1]), axis=attribute(node, "axis", 0))]


def _scatter_nd(node: ir.Node, inputs: list[Any]) -> list[Array]:
    out = np.array(inputs[0])
    out[tuple(np.moveaxis(inputs[1], -1, 0))] = inputs[2]
    return [out]


def _scatter_elements(node: ir.Node, inputs: list[Any]) -> list[Array]:
    out, places = np.array(inputs[0]), list(np.indices(inputs[1].shape))
    places[attribute(node, "axis", 0)] = inputs[1]
    out[tuple(places)] = inputs[2]
    return [out]


def _tensor_scatter(node: ir.Node, inputs: list[Any]) -> list[Array]:
    """Row b's update goes to its own place along the axis; a place beyond the end is an IndexError, as it is in the operator."""
    out, update, axis = np.array(inputs[0]), inputs[1], attribute(node, "axis", -2) % inputs[0].ndim
    starts = inputs[2] if len(inputs) > 2 and inputs[2] is not None else np.zeros(len(out), np.int64)
    for row, start in enumerate(starts):
        np.moveaxis(out[row], axis - 1, 0)[start + np.arange(update.shape[axis])] = np.moveaxis(update[row], axis - 1, 0)
    return [out]


def _same(node: ir.Node, inputs: list[Any]) -> list[Array]:
    return [inputs[0]]


def _rotary(node: ir.Node, inputs: list[Any]) -> list[Array]:
    """23's (x, cos, sin, position_ids?) and com.microsoft's (x, position_ids, cos, sin); x is BHSD, or BSH with num_heads."""
    if node.domain == "":
        x, cos, sin, position = (*inputs, None)[:4]
    else:
        x, position, cos, sin = inputs[:4]
        if position.ndim == 1:  # a single offset
            position = position.reshape(-1)[0] + np.arange(x.shape[2 if x.ndim == 4 else 1])[None]
    if position is not None:
        cos, sin = cos[position], sin[position]
    heads = attribute(node, "num_heads", 0)
    flat = x.ndim == 3
    bshd = x.reshape(*x.shape[:2], heads or x.shape[2] // (2 * cos.shape[-1]), -1) if flat else x.transpose(0, 2, 1, 3)
    width = attribute(node, "rotary_embedding_dim", 0) or bshd.shape[-1]
    turned = rotate(bshd, cos[:, :, None, : width // 2], sin[:, :, None, : width // 2], bool(attribute(node, "interleaved", 0)))
    return [turned.reshape(x.shape) if flat else turned.transpose(0, 2, 1, 3)]


def rotate(x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """x with the first r elements of its last axis turned, r/2 being the width of `cos` and `sin` (which broadcast over the rest)."""
    r = 2 * cos.shape[-1]
    first, second = (slice(0, r, 2), slice(1, r, 2)) if interleaved else (slice(0, r // 2), slice(r // 2, r))
    out = np.array(x)
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out


_Run = Callable[[ir.Node, list[Any]], list[Array]]
_RUN: dict[str, _Run] = {
    "Identity": _same, "Cast": _same, "Dropout": _same, "Transpose": _transpose, "Reshape": _reshape, "Expand": _expand,
    "Unsqueeze": _unsqueeze, "Squeeze": _squeeze, "Flatten": _flatten, "Concat": _concat, "Slice": _slice, "Split": _split,
    "Tile": _tile, "Gather": _gather, "ScatterND": _scatter_nd, "ScatterElements": _scatter_elements,
    "TensorScatter": _tensor_scatter, "RotaryEmbedding": _rotary,
    "Add": lambda node, x: [x[0] + x[1]],
    "Sub": lambda node, x: [x[0] - x[1]],
    "Mul": lambda node, x: [x[0] * x[1]],
    "Div": lambda node, x: [x[0] / x[1]],
    "Neg": lambda node, x: [-x[0]],
    "Tanh": lambda node, x: [np.tanh(x[0])],
    "Where": lambda node, x: [np.asarray(np.where(x[0], x[1], x[2]))],
    "IsNaN": lambda node, x: [np.isnan(x[0])],
    "Max": lambda node, x: [functools.reduce(np.maximum, x)],
    "Min": lambda node, x: [functools.reduce(np.minimum, x)],
}
