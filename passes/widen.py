"""Graphs in half precision, computed in float32: every float16 and bfloat16 becomes a float, which holds each of their numbers exactly.

Weights keep their values; activations are no longer rounded after each operator, so results lie nearer to what the weights mean than the
source's own. Casts down become casts to float32. What is half only in storage (a weight that is cast up) needs none of this.
"""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter

import numpy as np
import onnx_ir as ir

from .extract import subgraphs
from .normalize import graph_size
from .outcome import Outcome, PassResult

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

# Attributes that name the type of a result.
_TYPE_ATTRIBUTES = {"Cast": "to", "RandomNormal": "dtype", "RandomUniform": "dtype", "RandomNormalLike": "dtype", "RandomUniformLike": "dtype",
                    "EyeLike": "dtype", "Bernoulli": "dtype", "Multinomial": "dtype", "SequenceEmpty": "dtype", "QuantizeLinear": "output_dtype",
                    "DequantizeLinear": "output_dtype"}


class WidenHalf(ir.passes.InPlacePass):
    """Makes a graph that computes in half precision one that computes in float32. Leaves others as they are."""

    def call(self, model: ir.Model) -> PassResult:
        start, (nodes, size) = perf_counter(), graph_size(model)
        computed = [value for value in _values(model) if _is_half(value) and value.const_value is None]
        if computed:
            self._widen(model)
        after = graph_size(model)
        notes = (f"{len(computed)} values in half precision are computed in float32",) if computed else ()
        outcome = Outcome("widen", "half values", len(computed), len(computed), (), notes, nodes, after[0], size, after[1], perf_counter() - start)
        return PassResult(model, bool(computed), outcome)

    def _widen(self, model: ir.Model) -> None:
        for value in _values(model):
            if not _is_half(value):
                continue
            if value.const_value is not None:
                value.const_value = _widened(value.const_value, str(value.name))
            value.type = ir.TensorType(ir.DataType.FLOAT)
        for node in _nodes(model.graph):
            name = _TYPE_ATTRIBUTES.get(node.op_type)
            if name is not None and node.attributes.get_int(name, 0) in _HALF:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
            for attribute in list(node.attributes.values()):
                if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in _HALF:
                    node.attributes[attribute.name] = ir.AttrTensor(attribute.name, _widened(attribute.as_tensor(), attribute.name))
        self._drop_casts(model.graph)

    def _drop_casts(self, graph: ir.Graph) -> None:
        """Casts between what were two precisions do nothing now."""
        for node in list(graph):
            operand = node.inputs[0] if node.op_type == "Cast" and node.domain == "" else None
            if operand is None or operand.dtype != ir.DataType.FLOAT or node.attributes.get_int("to", 0) != ir.DataType.FLOAT:
                continue
            if not node.outputs[0].is_graph_output():
                node.outputs[0].replace_all_uses_with(operand)
                graph.remove(node, safe=True)

    def ensures(self, model: ir.Model) -> None:
        left = [str(value.name) for value in _values(model) if _is_half(value) and value.const_value is None]
        if left:
            raise ir.passes.PostconditionError(f"still in half precision: {', '.join(left[:4])}")


def _is_half(value: ir.Value) -> bool:
    dtype = value.dtype if value.const_value is None else value.const_value.dtype
    return dtype in _HALF


def _nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    for node in graph:
        yield node
        for inner in subgraphs(node):
            yield from _nodes(inner)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    """Every value of the graph and of its subgraphs, inputs and initializers included."""
    graphs = [model.graph, *(inner for node in _nodes(model.graph) for inner in subgraphs(node))]
    for graph in graphs:
        yield from dict.fromkeys([*graph.inputs, *graph.initializers.values()])
        for node in graph:
            yield from node.outputs


def _widened(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    """The same numbers in float32, computed when they are asked for."""
    return ir.LazyTensor(
        lambda: ir.Tensor(tensor.numpy().astype(np.float32), name=name), dtype=ir.DataType.FLOAT, shape=ir.Shape(tensor.shape), name=name,
    )
