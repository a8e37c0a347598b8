"""Weights that a graph computes from constants (packed integers shifted and masked, as GPTQ and AWQ checkpoints are exported) become what they are."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from time import perf_counter

import onnx_ir as ir
from onnx_ir.passes import common

from .extract import Cone, cone, prepare
from .normalize import FOLD_LIMIT, computed_lazily, graph_size, is_standard, replace_by_constant
from .outcome import Outcome, PassResult

# Elements that a byte of packed integers can hold: with 2 bits each. A cone that makes more out of its constants is no unpacking.
_PER_BYTE = 4
_RANDOM = frozenset({"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"})


class FoldWeights(ir.passes.InPlacePass):
    """The matrices of MatMul and Gemm that follow from initializers alone. Each is computed by onnxruntime when its contents are asked for, and not kept."""

    def call(self, model: ir.Model) -> PassResult:
        start, (nodes, size) = perf_counter(), graph_size(model)
        folded = dict(_computed(model))
        for value, whole in folded.items():
            replace_by_constant(model, value, computed_lazily(prepare(model, whole, {}), value))
        if folded:
            common.RemoveUnusedNodesPass()(model)
        after, count = graph_size(model), len(folded)
        outcome = Outcome("fold_weights", "computed weights", count, count, (), (), nodes, after[0], size, after[1], perf_counter() - start)
        return PassResult(model, bool(folded), outcome)


def _computed(model: ir.Model) -> Iterator[tuple[ir.Value, Cone]]:
    for node in model.graph:
        value = node.inputs[1] if is_standard(node, "MatMul", "Gemm") else None
        producer = None if value is None else value.producer()
        if producer is not None and is_standard(producer, "Transpose"):
            value = producer.inputs[0]
        if value is None or value.producer() is None or value.dtype != ir.DataType.FLOAT or value.shape is None or not value.shape.is_static():
            continue
        whole = cone([value])
        constants = [leaf.const_value for leaf in whole.leaves if leaf.const_value is not None and not leaf.is_graph_input()]
        elements = prod(value.shape.numpy())
        if len(constants) == len(whole.leaves) and len(value.shape) == 2 and not any(inner.op_type in _RANDOM for inner in whole.nodes):
            stored = sum(tensor.nbytes for tensor in constants)
            if 4 * elements > FOLD_LIMIT and elements <= _PER_BYTE * stored:
                yield value, whole
