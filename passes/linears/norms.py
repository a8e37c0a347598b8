"""RMSNorm in any spelling: one operator (of ONNX, of com.microsoft), or its parts."""

from __future__ import annotations

import onnx_ir as ir

from ..extract import cone
from ..normalize import is_standard
from .shapes import Shape, ints
from .site import Norm


def is_constant(value: ir.Value) -> bool:
    """Whether `value` follows from initializers alone."""
    return all(leaf.const_value is not None and not leaf.is_graph_input() for leaf in cone([value]).leaves)


def scalar(value: ir.Value | None) -> float | None:
    """The one element of a constant."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return float(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size == 1 else None


def find_norms(graph: ir.Graph, shapes: dict[ir.Value, Shape]) -> dict[ir.Value, Norm]:
    """Every RMSNorm along the last axis whose weight is a constant vector, by its output."""
    norms: dict[ir.Value, Norm] = {}
    for node in graph:
        norm = _operator(node, shapes) if node.op_type in ("RMSNormalization", "SimplifiedLayerNormalization") else _parts(node)
        if norm is not None and is_constant(norm.weight) and _is_vector(norm.weight, shapes):
            norms[norm.output] = norm
    return norms


def _is_vector(weight: ir.Value, shapes: dict[ir.Value, Shape]) -> bool:
    shape = shapes.get(weight)
    return shape is not None and len(shape) == 1


def _operator(node: ir.Node, shapes: dict[ir.Value, Shape]) -> Norm | None:
    source, weight = node.inputs[0], node.inputs[1]
    if source is None or weight is None or node.domain not in ("", "ai.onnx", "com.microsoft"):
        return None
    axis, shape = node.attributes.get_int("axis", -1), shapes.get(source)
    last = axis == -1 or (shape is not None and axis == len(shape) - 1)
    if not last or node.attributes.get_int("stash_type", 1) != 1 or any(output.uses() for output in node.outputs[1:]):
        return None
    return Norm(source, weight, node.attributes.get_float("epsilon", 1e-5), node.outputs[0])


def _parts(node: ir.Node) -> Norm | None:
    """weight · (x · 1/√(mean(x²) + epsilon)), outermost first."""
    if not is_standard(node, "Mul"):
        return None
    for weight, normed in _both(node):
        if weight.producer() is None and weight.const_value is None:
            continue
        inner = _through(normed).producer()
        if not is_standard_node(inner, "Mul", "Div"):
            continue
        assert inner is not None
        for x, factor in _both(inner) if inner.op_type == "Mul" else [(inner.inputs[0], inner.inputs[1])]:
            if x is None or factor is None:
                continue
            found = _variance(factor, inverted=inner.op_type == "Mul")
            if found is not None and _through(found[0]) is _through(x):
                return Norm(_through(x), weight, found[1], node.outputs[0])
    return None


def _variance(value: ir.Value, *, inverted: bool) -> tuple[ir.Value, float] | None:
    """x and epsilon of √(mean(x²) + epsilon), or of its inverse."""
    node = _through(value).producer()
    if inverted and is_standard_node(node, "Reciprocal"):
        return _variance(_input(node, 0), inverted=False)
    if inverted and is_standard_node(node, "Div"):
        return _variance(_input(node, 1), inverted=False) if scalar(_input(node, 0)) == 1 else None
    power = scalar(_input(node, 1)) if is_standard_node(node, "Pow") else 0.5 if is_standard_node(node, "Sqrt") else None
    if power != (-0.5 if inverted else 0.5):
        return None
    shifted = _through(_input(node, 0)).producer()
    if not is_standard_node(shifted, "Add"):
        return None
    assert shifted is not None
    for mean, small in _both(shifted):
        epsilon, reduced = scalar(small), _through(mean).producer()
        if epsilon is not None and is_standard_node(reduced, "ReduceMean") and _along_last(reduced):
            x = _square(_through(_input(reduced, 0)))
            return None if x is None else (x, epsilon)
    return None


def _along_last(node: ir.Node | None) -> bool:
    assert node is not None
    given = ints(node.inputs[1]) if len(node.inputs) > 1 else list(node.attributes.get_ints("axes", ()))
    return given == [-1] and node.attributes.get_int("keepdims", 1) == 1


def _square(value: ir.Value) -> ir.Value | None:
    node = value.producer()
    if is_standard_node(node, "Pow") and scalar(_input(node, 1)) == 2:
        return _input(node, 0)
    if is_standard_node(node, "Mul") and _input(node, 0) is _input(node, 1):
        return _input(node, 0)
    return None


def is_standard_node(node: ir.Node | None, *op_types: str) -> bool:
    """`is_standard`, for what may be no node at all."""
    return node is not None and is_standard(node, *op_types)


def _both(node: ir.Node) -> list[tuple[ir.Value, ir.Value]]:
    a, b = node.inputs[0], node.inputs[1]
    return [] if a is None or b is None else [(a, b), (b, a)]


def _input(node: ir.Node | None, place: int) -> ir.Value:
    assert node is not None
    value = node.inputs[place]
    assert value is not None
    return value


def _through(value: ir.Value) -> ir.Value:
    """`value` before casts of float32 to itself."""
    node = value.producer()
    while is_standard_node(node, "Cast") and value.dtype == ir.DataType.FLOAT and _input(node, 0).dtype == ir.DataType.FLOAT:
        value = _input(node, 0)
        node = value.producer()
    return value
