"""Products in other words (FusedMatMul, Einsum) as what they mean: Transpose, MatMul, and a factor."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

Made = tuple[list[ir.Node], list[ir.Value]]
"""Nodes in order, and constants that they read; the last node's first output takes the place of what is replaced."""


def plain_products(model: ir.Model) -> bool:
    """Replaces what it can; the rest stays as it is. Whether anything changed."""
    changed = False
    for node in list(model.graph):
        made = _fused(node) if (node.domain, node.op_type) == ("com.microsoft", "FusedMatMul") else None
        if node.domain in ("", "ai.onnx") and node.op_type == "Einsum":
            made = _einsum(node)
        if made is not None:
            put(model.graph, node, made)
            changed = True
    return changed


def put(graph: ir.Graph, node: ir.Node, made: Made) -> None:
    """The nodes made in the place of `node`, named after it and typed like its output."""
    nodes, constants = made
    for constant in constants:
        graph.register_initializer(constant)
    for number, new in enumerate(nodes):
        new.name = f"{node.name or node.outputs[0].name}.{number}.{new.op_type.lower()}"
        new.outputs[0].name, new.outputs[0].type = f"{new.name}.output", node.outputs[0].type
        new.metadata_props.update(node.metadata_props)
    nodes[-1].outputs[0].shape = node.outputs[0].shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, node.outputs, nodes[-1].outputs)


def constant(node: ir.Node, word: str, array: np.ndarray) -> ir.Value:
    """A value that becomes an initializer beside what is made of `node`."""
    name = f"{node.outputs[0].name}.{word}"
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)


def _fused(node: ir.Node) -> Made | None:
    """None where a rank is not known, or batches are transposed too."""
    if any(node.attributes.get_int(f"transBatch{x}", 0) for x in "AB"):
        return None
    if any(node.attributes.get_int(f"trans{x}", 0) and (v is None or v.shape is None) for x, v in zip("AB", node.inputs)):
        return None
    nodes, operands, constants = list[ir.Node](), list(node.inputs), list[ir.Value]()
    for index, letter in enumerate("AB"):
        value = operands[index]
        if node.attributes.get_int(f"trans{letter}", 0) and value is not None and value.shape is not None and len(value.shape) > 1:
            rank = len(value.shape)
            nodes.append(ir.node("Transpose", [value], {"perm": [*range(rank - 2), rank - 1, rank - 2]}))
            operands[index] = nodes[-1].outputs[0]
    nodes.append(ir.node("MatMul", operands))
    alpha = node.attributes.get_float("alpha", 1.0)
    if alpha != 1.0:
        constants.append(constant(node, "alpha", np.array(alpha, np.float32)))
        nodes.append(ir.node("Mul", [nodes[-1].outputs[0], constants[0]]))
    return nodes, constants


def _einsum(node: ir.Node) -> Made | None:
    """An Einsum of two computed values that sums over one index: with what both have before the rows, MatMul does it.

    Where the left operand has several indices of its own one of them is the row, and the others stand before it, where the right operand has
    a 1. In `…t, …td` (an operand by what it weighs) the row is the left operand's last, otherwise the result's last.
    """
    equation = re.fullmatch(r"([a-zA-Z]+),([a-zA-Z]+)->([a-zA-Z]+)", node.attributes.get_string("equation", "").replace(" ", ""))
    if equation is None or len(node.inputs) != 2 or any(value is None or value.const_value is not None for value in node.inputs):
        return None
    left, right, out = equation.groups()
    operands = list(node.inputs)
    if out[-1] in left and out[-1] not in right:  # keys by queries
        left, right, operands = right, left, operands[::-1]
    both = [x for x in left if x in right and x in out]
    summed = [x for x in left if x in right and x not in out]
    ours, theirs = [x for x in left if x not in right], [x for x in right if x not in left]
    if any(len(set(term)) < len(term) for term in (left, right, out)) or {*both, *ours, *theirs} != set(out):
        return None
    if len(summed) != 1 or len(theirs) != 1 or not ours:
        return None
    weighs = left[-1] == summed[0] and right[-1] != summed[0]
    row = (ours if weighs else [x for x in out if x in ours])[-1]
    lead = [x for x in (left if weighs else out) if x in both or (x in ours and x != row)]
    nodes, constants = list[ir.Node](), list[ir.Value]()
    first = _turned(nodes, operands[0], left, [*lead, row, *summed])
    second = _turned(nodes, operands[1], right, [*(x for x in lead if x in both), *summed, *theirs])
    alone = [place for place, x in enumerate(lead) if x not in both]
    if alone:
        constants.append(constant(node, "axes", np.array(alone, np.int64)))
        nodes.append(ir.node("Unsqueeze", [second, constants[0]]))
        second = nodes[-1].outputs[0]
    nodes.append(ir.node("MatMul", [first, second]))
    _turned(nodes, nodes[-1].outputs[0], [*lead, row, *theirs], out)
    return nodes, constants


def _turned(nodes: list[ir.Node], value: ir.Value | None, have: Sequence[str], want: Sequence[str]) -> ir.Value | None:
    """`value`, its indices `have` in the order `want`."""
    if list(have) == list(want):
        return value
    nodes.append(ir.node("Transpose", [value], {"perm": [list(have).index(x) for x in want]}))
    return nodes[-1].outputs[0]
