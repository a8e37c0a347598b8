"""PagedAttention reads the rows that its producers wrote: no Reshape, no Split and no norm of single heads before it, where the op does without.

A Reshape moves no element, so any two tensors with the last dimension heads·size on both ends of some Reshapes hold the same rows. A norm goes into
the op where it is the op's own (RMSNorm of each head of D by a constant weight, before rotary) on query and key alike, with one epsilon.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from time import perf_counter

import onnx_ir as ir

from ...custom_ops.contract import DOMAIN, PAGED_ATTENTION
from ..linears.norms import find_norms
from ..linears.shapes import Shape, infer_shapes, ints
from ..linears.site import Norm
from ..normalize import graph_size, is_standard
from ..outcome import Outcome, PassResult

_RANKS = range(2, 5)  # of the rows that the op takes


@dataclass(frozen=True)
class _Rows:
    """What query, key and value are to be read from; `key` and `value` are None where `query` holds them. `norms` are query's and key's."""

    query: ir.Value
    key: ir.Value | None
    value: ir.Value | None
    norms: tuple[Norm, Norm] | None


class PackedRows(ir.passes.InPlacePass):
    """Of a token-flat graph, quantized or not."""

    def call(self, model: ir.Model) -> PassResult:
        start, (nodes, size) = perf_counter(), graph_size(model)
        graph, shapes = model.graph, infer_shapes(model.graph)
        norms = find_norms(graph, shapes)
        found = [node for node in graph if node.op_type == "PagedAttention" and node.domain == DOMAIN]
        packed = normed = 0
        for node in found:
            rows = _find_rows(node, shapes, norms)
            if rows is None:
                continue
            _rewire(node, rows)
            _pass_on(node, rows.query, shapes)
            packed, normed = packed + (rows.key is None), normed + (rows.norms is not None)
        ir.passes.common.RemoveUnusedNodesPass()(model)
        ir.passes.common.TopologicalSortPass()(model)
        after = graph_size(model)
        notes = (f"{packed} read query, key and value from one product", f"{normed} norm their heads") if found else ()
        outcome = Outcome(
            "packed_rows", "attentions", len(found), len(found), (), notes, nodes, after[0], size, after[1], perf_counter() - start,
        )
        return PassResult(model, after[0] != nodes, outcome)


def _find_rows(node: ir.Node, shapes: dict[ir.Value, Shape], norms: dict[ir.Value, Norm]) -> _Rows | None:
    """None where the op would read something of another rank, and whoever reads its output minds."""
    query, key, value = node.inputs[:3]
    if query is None or key is None or value is None or not all(_takes_any_rank(use.node) for use in node.outputs[0].uses()):
        return None
    widths = [_width(operand, shapes) for operand in (query, key, value)]
    H, G = node.attributes.get_int("num_heads"), node.attributes.get_int("kv_num_heads")
    if 0 in widths:
        return None
    folded = _head_norms(query, key, widths[0] // H, norms, shapes)
    if folded is not None:
        query, key = folded[0].source, folded[1].source
    sources = [_source(operand, width, shapes) for operand, width in zip((query, key, value), widths)]
    if any(source is None for source in sources):
        return None
    query, key, value = sources
    assert query is not None
    whole = _one_product(query, key, value, [H * (widths[0] // H), G * (widths[0] // H), G * (widths[0] // H)], shapes)
    return _Rows(query, key, value, folded) if whole is None else _Rows(whole, None, None, folded)


def _takes_any_rank(node: ir.Node) -> bool:
    target = ints(node.inputs[1]) if is_standard(node, "Reshape") else None
    return target is not None and 0 not in target


def _width(value: ir.Value, shapes: dict[ir.Value, Shape]) -> int:
    """The last dimension, 0 where it isn't known."""
    shape = shapes.get(value)
    return shape[-1] if shape and isinstance(shape[-1], int) else 0


def _source(value: ir.Value, width: int, shapes: dict[ir.Value, Shape]) -> ir.Value | None:
    """The first of the values, Reshapes apart, that holds the rows of `value`, which are `width` wide."""
    best = None
    while True:
        if _width(value, shapes) == width and len(shapes[value]) in _RANKS:
            best = value
        node = value.producer()
        if node is None or not is_standard(node, "Reshape") or node.inputs[0] is None:
            return best
        value = node.inputs[0]


def _head_norms(
    query: ir.Value, key: ir.Value, D: int, norms: dict[ir.Value, Norm], shapes: dict[ir.Value, Shape],
) -> tuple[Norm, Norm] | None:
    first, second = (_head_norm(value, D, norms, shapes) for value in (query, key))
    return (first, second) if first is not None and second is not None and first.epsilon == second.epsilon else None


def _head_norm(value: ir.Value, D: int, norms: dict[ir.Value, Norm], shapes: dict[ir.Value, Shape]) -> Norm | None:
    """The norm, read by nobody else, that `value` is a Reshape of. Where it was taken heads first, its source is the tokens' again."""
    heads_first = False
    while len(value.uses()) == 1 and not value.is_graph_output():
        norm, node = norms.get(value), value.producer()
        if norm is not None:
            source = _transposed(norm.source.producer()) if heads_first else norm.source
            return replace(norm, source=source) if source is not None and shapes.get(norm.weight) == (D,) and _width(value, shapes) == D else None
        before = _transposed(node)
        if before is not None and not heads_first:
            value, heads_first = before, True
        elif node is not None and is_standard(node, "Reshape") and not heads_first and node.inputs[0] is not None:
            value = node.inputs[0]
        else:
            return None
    return None


def _transposed(node: ir.Node | None) -> ir.Value | None:
    """What a Transpose of tokens and heads reads."""
    turns = node is not None and is_standard(node, "Transpose") and tuple(node.attributes.get_ints("perm", ())) == (0, 2, 1, 3)
    return node.inputs[0] if turns and node is not None else None


def _one_product(
    query: ir.Value, key: ir.Value | None, value: ir.Value | None, sizes: list[int], shapes: dict[ir.Value, Shape],
) -> ir.Value | None:
    """What a Split takes apart into query, key and value, of these sizes along the last dimension, for nobody else."""
    node = query.producer()
    if node is None or not is_standard(node, "Split") or list(node.outputs) != [query, key, value] or node.inputs[0] is None:
        return None
    whole = node.inputs[0]
    shape = shapes.get(whole)
    if shape is None or node.attributes.get_int("axis", 0) not in (-1, len(shape) - 1) or [shapes.get(out, (0,))[-1] for out in node.outputs] != sizes:
        return None
    return whole if all(len(out.uses()) == 1 and not out.is_graph_output() for out in node.outputs) else None


def _rewire(node: ir.Node, rows: _Rows) -> None:
    for index, value in enumerate((rows.query, rows.key, rows.value)):
        node.replace_input_with(index, value)
    if rows.norms is None:
        return
    for name, norm in zip(("q_norm_weight", "k_norm_weight"), rows.norms):
        node.replace_input_with(PAGED_ATTENTION.input_index(name), norm.weight)
    node.attributes.add(ir.AttrFloat32("qk_norm_epsilon", rows.norms[0].epsilon))


def _pass_on(node: ir.Node, query: ir.Value, shapes: dict[ir.Value, Shape]) -> None:
    """Who reshapes the output to the shape that it has now reads it."""
    output = node.outputs[0]
    shapes[output] = (*shapes[query][:-1], shapes[output][-1])
    output.shape = None
    for use in list(output.uses()):
        reshaped = use.node.outputs[0]
        if shapes.get(reshaped) == shapes[output] and not reshaped.is_graph_output():
            reshaped.replace_all_uses_with(output)
