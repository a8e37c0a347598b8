"""Inferred shapes are the shapes that a run has."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import Arrays, one_sequence, quantize, run, token_flat, written
from octavo.passes.attention.packed_rows import PackedRows
from octavo.passes.linears.shapes import infer_shapes


def all_shapes(model: ir.Model, feeds: Arrays) -> dict[str, tuple[int, ...]]:
    """Of every value that a node computes."""
    values = [value for node in model.graph for value in node.outputs if value.uses() or value.is_graph_output()]
    for value in values:
        value.shape = None
        if not value.is_graph_output():
            model.graph.outputs.append(value)
    return {str(value.name): array.shape for value, array in zip(model.graph.outputs, run(model, feeds))}


@pytest.mark.parametrize(("name", "quantized"), [("llama", False), ("qwen2", False), ("llama", True)])
def test_a_token_flat_decoder(name: str, quantized: bool) -> None:
    """All of it is known, with T and R told apart; with the ops of quantized weights and attention of packed rows too."""
    model = token_flat(name)
    if quantized:
        quantize(model)
        PackedRows()(model)
        assert {"QuantLinear", "QuantEmbedding"} < {node.op_type for node in model.graph} and "Split" not in {node.op_type for node in model.graph}
    inferred = infer_shapes(model.graph)
    feeds = one_sequence(model, np.arange(3, 10))
    feeds["logit_rows"] = np.array([6, 2])
    shapes = all_shapes(model, feeds)
    known = {str(value.name): shape for value, shape in inferred.items() if str(value.name) in shapes}
    assert known.keys() == shapes.keys()
    sizes = {"T": 7, "R": 2}
    assert shapes == {name: tuple(dim if isinstance(dim, int) else sizes[dim] for dim in shape) for name, shape in known.items()}


BODIES = {
    "broadcasting": "a = Add(x, row) b = Mul(a, column) y = Sub(b, one)",
    "reshapes": "a = Reshape(x, rows) b = Reshape(a, heads) c = Transpose<perm = [1, 0, 2]>(b) d = Reshape(c, kept) y = Reshape(d, flat)",
    "sizes": "si = Shape<start = 0, end = 1>(x) ai = Concat<axis = 0>(si, hole, four) b = Reshape(x, ai) ti = Shape(b) ui = Gather(ti, swap) "
             "y = Reshape(b, ui)",
    "reductions": "a = ReduceMean(x, last) b = ReduceSum<keepdims = 0>(x, last) y = Mul(x, a) z = Exp(b)",
    "splits": "p, q, r = Split<axis = -1>(x, sizes) s, t = Split<axis = 1, num_outputs = 2>(q) y = Gather<axis = 1>(p, two)",
    "products": "a = MatMul(x, w) b = Transpose(w) y = Gemm<transB = 1>(a, w)",
}
INTEGERS = {
    "rows": [-1, 16], "heads": [-1, 4, 4], "kept": [4, 0, -1], "flat": [-1], "sizes": [16, 32, 16], "two": [1, 2], "hole": [-1], "four": [4], "swap": [1, 0, 2],
    "last": [-1],
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_rules(body: str) -> None:
    model = written(body, {"row": (64,), "one": (1, 1), "w": (64, 64)}, "float y", inputs="float[n,64] x, float[n,1] column")
    for name, numbers in INTEGERS.items():
        value = ir.Value(name=name, const_value=ir.tensor(np.array(numbers), name=name))
        for node in model.graph:
            for i, operand in enumerate(node.inputs):
                if operand is not None and operand.name == name:
                    node.replace_input_with(i, value)
        model.graph.register_initializer(value)
    for node in model.graph:
        if str(node.outputs[0].name).endswith("i"):
            node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    inferred = infer_shapes(model.graph)
    shapes = all_shapes(model, {"x": np.ones((5, 64), np.float32), "column": np.ones((5, 1), np.float32)})
    for value, shape in inferred.items():
        if str(value.name) in shapes:
            sizes = {"n": 5, "4·n": 20, "64·n": 320}  # any other name would be a mistake
            assert tuple(dim if isinstance(dim, int) else sizes[dim] for dim in shape) == shapes[str(value.name)], value.name
    assert {str(value.name) for value in inferred} >= {name for name in shapes if not name.endswith("i")}  # vectors of sizes, whose elements count


@pytest.mark.parametrize("body", ["y = Add(x, other)", "y = Reshape(x, target)", "y = NonZero(x)"])
def test_what_only_a_run_can_tell_has_no_shape(body: str) -> None:
    model = written(body, {}, "float y", inputs="float[n,64] x, float[k,64] other, int64[2] target")
    assert model.graph.outputs[0] not in infer_shapes(model.graph)
