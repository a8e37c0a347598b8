"""Softmaxes in other words: written out as exp over its sum, or over another axis than the last."""

from __future__ import annotations

import onnx_ir as ir

from .plain_products import Made, put

_EACH = frozenset({"Add", "Sub", "Mul", "Div", "Where", "Cast", "Tanh"})


def plain_softmax(model: ir.Model) -> bool:
    """Replaces exp(x − max x) / Σ exp(x − max x) by Softmax, and moves the axis of one that is not over the last. Whether anything changed."""
    changed, opset = False, model.opset_imports.get("", 1)
    for node in list(model.graph):
        if node.domain not in ("", "ai.onnx") or opset < 13:
            continue
        made = _written_out(node) if node.op_type == "Div" else _over_the_last(node) if node.op_type == "Softmax" else None
        if made is not None:
            put(model.graph, node, made)
            changed = True
    return changed


def _over_the_last(node: ir.Node) -> Made | None:
    shape = None if node.inputs[0] is None else node.inputs[0].shape
    axis = node.attributes.get_int("axis", -1)
    if shape is None or axis % len(shape) == len(shape) - 1:
        return None
    order = _order_of_product(node, axis % len(shape)) or [*(i for i in range(len(shape)) if i != axis % len(shape)), axis % len(shape)]
    before = ir.node("Transpose", [node.inputs[0]], {"perm": order})
    softmax = ir.node("Softmax", before.outputs, {"axis": -1})
    return [before, softmax, ir.node("Transpose", softmax.outputs, {"perm": [order.index(i) for i in range(len(order))]})], []


def _order_of_product(node: ir.Node, axis: int) -> list[int] | None:
    """The order that the scores had as a product, before a Transpose and what is done to each of them, if `axis` was the last one there."""
    frontier = [value.producer() for value in node.inputs if value is not None]
    for _ in range(8):
        for found in frontier:
            order = None if found is None or found.op_type != "Transpose" else found.attributes.get_ints("perm", None)
            if order is not None and order[-1] != axis and order.index(len(order) - 1) == axis:
                return [order.index(i) for i in range(len(order))]
        known = [found for found in frontier if found is not None and found.op_type in _EACH]
        frontier = [value.producer() for found in known for value in found.inputs if value is not None]
    return None


def _written_out(node: ir.Node) -> Made | None:
    """None but for one value, less its own largest or as it is, along one axis that both reductions keep."""
    top, bottom = node.inputs
    exp, total = (None if value is None else value.producer() for value in (top, bottom))
    if exp is None or exp.op_type != "Exp" or total is None or total.op_type != "ReduceSum" or total.inputs[0] is not top:
        return None
    axis, shifted = _axis(total), exp.inputs[0]
    less = None if shifted is None else shifted.producer()
    if axis is None or shifted is None:
        return None
    if less is not None and less.op_type == "Sub":
        largest = None if less.inputs[1] is None else less.inputs[1].producer()
        if largest is not None and largest.op_type == "ReduceMax" and largest.inputs[0] is less.inputs[0] and _axis(largest) == axis:
            shifted = less.inputs[0]
    return [ir.node("Softmax", [shifted], {"axis": axis})], []


def _axis(node: ir.Node) -> int | None:
    """The one axis of a reduction that keeps it."""
    if not node.attributes.get_int("keepdims", 1):
        return None
    axes = node.attributes.get_ints("axes", None)
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if given is not None:
        tensor = ir.convenience.get_const_tensor(given)
        axes = None if tensor is None else tensor.numpy().reshape(-1).tolist()
    return int(axes[0]) if axes is not None and len(axes) == 1 else None
