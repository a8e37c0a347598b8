"""Shapes of a rewritten graph, as far as they follow from its inputs: enough to prove that what is added to a product has the product's shape.

A dimension is a number, or the name of a size that an input declares (`T`, `R`, `batch`): equal names are equal sizes. A value whose shape
can't be told has none, and nothing is concluded about it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod

import onnx_ir as ir

from ...custom_ops.contract import DOMAIN

Dim = int | str
Shape = tuple[Dim, ...]

_UNARY = frozenset({
    "Abs", "Cast", "Clip", "Elu", "Erf", "Exp", "FastGelu", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LayerNormalization", "LeakyRelu",
    "Log", "LogSoftmax", "Mish", "Neg", "QuickGelu", "RMSNormalization", "Reciprocal", "Relu", "RotaryEmbedding", "Sigmoid",
    "SimplifiedLayerNormalization", "Softmax", "Softplus", "Sqrt", "Swish", "Tanh",
})
_REDUCTIONS = frozenset({"ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "ReduceSumSquare"})
_BINARY = frozenset({"Add", "BiasGelu", "Div", "Max", "Min", "Mul", "Pow", "Sub", "Where"})


def infer_shapes(graph: ir.Graph) -> dict[ir.Value, Shape]:
    """The known shapes. `graph` is in execution order."""
    shapes: dict[ir.Value, Shape] = {}
    for value in (*graph.inputs, *graph.initializers.values()):
        declared = value.const_value.shape if value.const_value is not None else value.shape
        if declared is not None and all(isinstance(dim, int) or dim.value is not None for dim in declared):
            shapes[value] = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in declared)
    sizes: dict[ir.Value, Shape] = {}
    for node in graph:
        found = _sizes(node, shapes, sizes)
        if found is not None:
            sizes[node.outputs[0]] = found
        for value, shape in zip(node.outputs, _outputs(node, shapes, sizes)):
            if shape is not None:
                shapes[value] = shape
    return shapes


def _sizes(node: ir.Node, shapes: Mapping[ir.Value, Shape], sizes: Mapping[ir.Value, Shape]) -> Shape | None:
    """The elements of a vector (or scalar) of sizes that a node computes."""
    first = node.inputs[0] if node.inputs and node.domain in ("", "ai.onnx") else None
    if first is None:
        return None
    if node.op_type == "Shape":
        shape = shapes.get(first)
        return None if shape is None else shape[node.attributes.get_int("start", 0) : node.attributes.get_int("end", len(shape))]
    if node.op_type == "Concat":
        parts = [None if value is None else _elements(value, sizes) for value in node.inputs]
        return None if any(part is None for part in parts) else tuple(dim for part in parts if part is not None for dim in part)
    known = sizes.get(first)
    if known is None:
        return None
    if node.op_type == "Gather":
        places = ints(node.inputs[1])
        return None if places is None or not all(-len(known) <= place < len(known) for place in places) else tuple(known[place] for place in places)
    return known if node.op_type in ("Cast", "Identity", "Squeeze", "Unsqueeze") else None


def _elements(value: ir.Value, sizes: Mapping[ir.Value, Shape]) -> Shape | None:
    constant = ints(value)
    return sizes.get(value) if constant is None else tuple(constant)


def _outputs(node: ir.Node, shapes: Mapping[ir.Value, Shape], sizes: Mapping[ir.Value, Shape]) -> Sequence[Shape | None]:
    operands = [None if value is None else shapes.get(value) for value in node.inputs]
    first = operands[0] if operands else None
    if node.domain == DOMAIN:
        return _octavo(node, operands)
    if node.domain not in ("", "ai.onnx", "com.microsoft") or first is None:
        return []
    if node.op_type in _UNARY:
        return [first]
    if node.op_type in _BINARY:
        return [_broadcast(operands)]
    if node.op_type in ("MatMul", "Gemm", "MatMulNBits"):
        return [_product(node, operands)]
    if node.op_type in _REDUCTIONS:
        return [_reduced(node, first)]
    if node.op_type == "SkipSimplifiedLayerNormalization":
        return [first, None, None, first]
    if node.op_type == "Gather" and operands[1] is not None:
        axis = node.attributes.get_int("axis", 0) % len(first)
        return [(*first[:axis], *operands[1], *first[axis + 1 :])]
    if node.op_type == "Transpose":
        order = node.attributes.get_ints("perm", tuple(reversed(range(len(first)))))
        return [tuple(first[axis] for axis in order)]
    if node.op_type == "Reshape":
        target = None if node.inputs[1] is None else _elements(node.inputs[1], sizes)
        return [None if target is None or (0 in target and node.attributes.get_int("allowzero", 0)) else _reshaped(first, target)]
    if node.op_type == "Split":
        return _split(node, first)
    return []


def ints(value: ir.Value | None) -> list[int] | None:
    """The elements of a constant vector of integers."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None or not tensor.dtype.is_integer() else [int(number) for number in tensor.numpy().reshape(-1)]


def _broadcast(operands: Sequence[Shape | None]) -> Shape | None:
    found: list[Dim] = []
    for shape in operands:
        if shape is None:
            return None
        ours, theirs = [1] * (len(shape) - len(found)) + found, [1] * (len(found) - len(shape)) + list(shape)
        if any(a not in (b, 1) and b != 1 for a, b in zip(ours, theirs)):
            return None  # two sizes that may be equal or 1: only a run would tell
        found = [b if a == 1 else a for a, b in zip(ours, theirs)]
    return tuple(found)


def _product(node: ir.Node, operands: Sequence[Shape | None]) -> Shape | None:
    rows, weight = operands[0], operands[1]
    if rows is None:
        return None
    if node.op_type == "MatMulNBits":
        return (*rows[:-1], node.attributes.get_int("N"))
    if weight is None or len(weight) != 2 or len(rows) < 2 or node.attributes.get_int("transA", 0):
        return None
    return (*rows[:-1], weight[0] if node.attributes.get_int("transB", 0) else weight[1])


def _octavo(node: ir.Node, operands: Sequence[Shape | None]) -> Sequence[Shape | None]:
    """The ops of the contract."""
    first = operands[0]
    if first is None:
        return []
    if node.op_type == "QuantLinear":
        return [(*first[:-1], node.attributes.get_int("M")), first]
    if node.op_type == "QuantEmbedding":
        return [(*first, node.attributes.get_int("K"))]
    H, G = node.attributes.get_int("num_heads"), node.attributes.get_int("kv_num_heads")
    width, heads = (first[-1], H + 2 * G) if node.inputs[2] is None else ((operands[2] or (None,))[-1], G)
    return [(*first[:-1], width // heads * H)] if isinstance(width, int) else []


def _reduced(node: ir.Node, shape: Shape) -> Shape | None:
    axes = ints(node.inputs[1]) if len(node.inputs) > 1 else list(node.attributes.get_ints("axes", ()))
    if not axes:
        return None
    gone, kept = {axis % len(shape) for axis in axes}, node.attributes.get_int("keepdims", 1)
    return tuple(1 if axis in gone else dim for axis, dim in enumerate(shape) if kept or axis not in gone)


def _reshaped(shape: Shape, target: Sequence[Dim]) -> Shape | None:
    known = [shape[i] if size == 0 and i < len(shape) else size for i, size in enumerate(target)]
    if -1 not in known:
        return tuple(known)
    whole, names = _factors(shape)
    rest, taken = _factors([dim for dim in known if dim != -1])
    if taken - names or rest == 0 or whole % rest:
        return None
    factor, left = whole // rest, sorted((names - taken).elements())
    hole: Dim = factor if not left else "·".join(left if factor == 1 else (str(factor), *left))
    return tuple(hole if dim == -1 else dim for dim in known)


def _factors(shape: Sequence[Dim]) -> tuple[int, Counter[str]]:
    """The number of elements: a factor, and names. A dimension that a Reshape has made may be such a product itself."""
    parts = [part for dim in shape for part in (dim.split("·") if isinstance(dim, str) else (dim,))]
    numbers = [int(part) for part in parts if isinstance(part, int) or part.isdecimal()]
    return prod(numbers), Counter(part for part in parts if isinstance(part, str) and not part.isdecimal())


def _split(node: ir.Node, shape: Shape) -> Sequence[Shape | None]:
    axis, count = node.attributes.get_int("axis", 0) % len(shape), len(node.outputs)
    sizes, whole = ints(node.inputs[1]) if len(node.inputs) > 1 else None, shape[axis]
    if sizes is None and isinstance(whole, int):
        sizes = [whole // count] * count if whole % count == 0 else None
    return [] if sizes is None else [(*shape[:axis], size, *shape[axis + 1 :]) for size in sizes]
