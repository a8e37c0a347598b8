"""The standard `Attention` op (opsets 23 to 25) as a core: every attribute and optional input is named, used or a reason to refuse."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..observe import Probe
from ..outcome import Refusal
from .chain import attribute
from .core import Core, moved_output
from .laboratory import BHSD, BSH, Array, Laboratory
from .mask_source import MaskSource
from .operands import Canon
from .site import Cache

_ATTENTION_ATTRIBUTES = frozenset({
    "is_causal", "kv_num_heads", "q_num_heads", "qk_matmul_output_mode", "scale", "softcap", "softmax_precision", "left_window_size", "right_window_size",
})


def read_attention_op(lab: Laboratory, node: ir.Node, where: str) -> Core | Refusal:
    inputs: list[ir.Value | None] = [*node.inputs, *[None] * (7 - len(node.inputs))]
    query, key, value, mask, past_key, past_value, nonpad = inputs[:7]
    problem = _op_problem(node, nonpad)
    if problem:
        return Refusal(f"the Attention op asks for {problem}", where, f"Attention: node {node.name}")
    assert query is not None and key is not None and value is not None
    shapes = [lab.shape(v, lab.probes[0]) for v in (query, key, value)]
    if any(shape is None or len(shape) not in (3, 4) for shape in shapes):
        return Refusal("the sizes of the Attention op's operands follow no formula", where, f"Attention: node {node.name}")
    given = (attribute(node, "q_num_heads", 0), attribute(node, "kv_num_heads", 0), attribute(node, "kv_num_heads", 0))
    heads = [shape[1] if len(shape) == 4 else n for shape, n in zip(shapes, given)]  # type: ignore[arg-type,index]
    if not all(heads) or heads[0] % heads[1] or heads[1] != heads[2]:
        return Refusal("the Attention op's heads don't divide", where, f"Attention: {heads} heads of query, key and value")
    sizes = [shape[3] if len(shape) == 4 else shape[2] // n for shape, n in zip(shapes, heads)]  # type: ignore[arg-type,index]
    if sizes[0] != sizes[1]:
        return Refusal("query and key have different head sizes", where, f"Attention: {sizes[0]} and {sizes[1]}")
    cache: Cache | None = None
    if past_key is not None or past_value is not None:
        read = _op_cache(lab, node, past_key, past_value, where)
        if isinstance(read, Refusal):
            return read
        cache = read
    end = moved_output(lab, node.outputs[0], heads[0], sizes[2], BHSD if len(shapes[0]) == 4 else BSH)  # type: ignore[arg-type]
    if end is None:
        return Refusal("the attention's result is in no known layout", where, f"output: {node.outputs[0].name}")
    output, layout, behind, guards = end
    scale = attribute(node, "scale", 0.0) or 1 / float(np.sqrt(sizes[0]))
    source = MaskSource(heads[0], operand=mask, is_causal=bool(attribute(node, "is_causal", 0)), cached_in_op=cache is not None, guards=guards)
    canons = tuple(_op_canon(len(shape) == 4, n, heads[0], size) for shape, n, size in zip(shapes, heads, sizes))  # type: ignore[arg-type]
    return Core(
        where, query, key, value, canons, heads[0], (sizes[0], sizes[2]), scale, attribute(node, "softcap", 0.0), source,  # type: ignore[arg-type]
        output, layout, (node, *behind), cache, in_op=cache is not None,
    )

def _op_cache(lab: Laboratory, node: ir.Node, past_key: ir.Value | None, past_value: ir.Value | None, where: str) -> Cache | Refusal:
    present = node.outputs[1:3]
    graph = lab.observation.model.graph
    given = [value for value in (past_key, past_value) if value is not None and value in graph.inputs]
    if len(given) != 2 or len(present) != 2 or not all(value in graph.outputs for value in present):
        return Refusal("the Attention op's cache is not a graph input and output", where, f"cache: node {node.name}")
    return Cache(given[0], given[1], present[0], present[1])


def _op_problem(node: ir.Node, nonpad: ir.Value | None) -> str | None:
    """What an Attention node asks for that no lowering gives."""
    unknown = set(node.attributes) - _ATTENTION_ATTRIBUTES
    if unknown:
        return f"attributes {', '.join(sorted(unknown))}"
    if attribute(node, "softmax_precision", 0) not in (0, int(ir.DataType.FLOAT)):
        return f"softmax_precision {attribute(node, 'softmax_precision', 0)}"
    if attribute(node, "left_window_size", -1) != -1 or attribute(node, "right_window_size", -1) != -1:
        return "a window of its own"
    if nonpad is not None:
        return "nonpad_kv_seqlen"
    if len(node.outputs) > 3 and (node.outputs[3].uses() or node.outputs[3].is_graph_output()):
        return "the score matrix as an output"
    return None


def _op_canon(by_head: bool, heads: int, num_heads: int, size: int) -> Canon:
    def canon(array: Array, probe: Probe) -> Array:
        split = array if by_head else array.reshape(probe.batch, -1, heads, size).transpose(0, 2, 1, 3)
        return np.repeat(split, num_heads // heads, axis=1)

    return canon
