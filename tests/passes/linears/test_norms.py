"""RMSNorm in its spellings, and what is nearly one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import ops, quantize, run, written
from octavo.passes.linears.norms import find_norms
from octavo.passes.linears.shapes import infer_shapes

PARTS = """
sq = {square} m = ReduceMean<keepdims = {keepdims}>(sq, axes) e = Add(m, eps) root = Sqrt(e) {inverse} y = Mul({order})
"""
SPELLINGS = {
    "RMSNormalization": "y = RMSNormalization<axis = -1, epsilon = 0.001>(x, w)",
    "by the last axis's number": "y = RMSNormalization<axis = 1, epsilon = 0.001>(x, w)",
    "SimplifiedLayerNormalization": "y = SimplifiedLayerNormalization<axis = -1, epsilon = 0.001>(x, w)",
    "parts, Reciprocal": PARTS.format(square="Pow(x, two)", keepdims=1, inverse="r = Reciprocal(root) n = Mul(x, r)", order="w, n"),
    "parts, Div": PARTS.format(square="Mul(x, x)", keepdims=1, inverse="n = Div(x, root)", order="n, w"),
    "parts, 1 over": PARTS.format(square="Mul(x, x)", keepdims=1, inverse="r = Div(one, root) n = Mul(r, x)", order="n, w"),
    "parts, Pow -0.5": PARTS.format(square="Mul(x, x)", keepdims=1, inverse="r = Pow(e, minus_half) n = Mul(r, x)", order="n, w"),
    "weight computed from constants": "plus = Add(w, one) y = RMSNormalization<axis = -1, epsilon = 0.001>(x, plus)",
}
OTHERS = {
    "along another axis": "y = RMSNormalization<axis = 0, epsilon = 0.001>(x, w)",
    "no mean over the last axis": PARTS.format(square="Mul(x, x)", keepdims=1, inverse="n = Div(x, root)", order="n, w").replace("axes", "first"),
    "dimension dropped": PARTS.format(square="Mul(x, x)", keepdims=0, inverse="n = Div(x, root)", order="n, w"),
    "another power": PARTS.format(square="Pow(x, one)", keepdims=1, inverse="n = Div(x, root)", order="n, w"),
    "of another value": PARTS.format(square="Mul(z, z)", keepdims=1, inverse="n = Div(x, root)", order="n, w"),
    "multiplied by the root": PARTS.format(square="Mul(x, x)", keepdims=1, inverse="n = Mul(x, root)", order="n, w"),
    "by data": "y = RMSNormalization<axis = -1, epsilon = 0.001>(x, row)",
}
SCALARS = {"two": 2.0, "one": 1.0, "minus_half": -0.5, "eps": 0.001}


def graph(body: str) -> ir.Model:
    model = written(
        f"{body} out = MatMul(y, matrix)", {"w": (64,), "matrix": (64, 32)}, "float[n,32] out", inputs="float[n,64] x, float[n,64] z, float[64] row",
    )
    read = {str(value.name) for node in model.graph for value in node.inputs if value is not None}
    for name, number in {**{name: np.float32(value) for name, value in SCALARS.items()}, "axes": np.array([-1]), "first": np.array([0])}.items():
        for node in model.graph:
            for i, value in enumerate(node.inputs):
                if name in read and value is not None and value.name == name:
                    if name not in model.graph.initializers:
                        model.graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(number, name=name)))
                    node.replace_input_with(i, model.graph.initializers[name])
    return model


@pytest.mark.parametrize("body", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_spellings(body: str) -> None:
    """Recognised, and the lowered graph computes what the graph did."""
    model = graph(body)
    feeds = {name: np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32) * 0.05 for name in "xz"}
    feeds["row"] = np.ones(64, np.float32)
    norm = next(iter(find_norms(model.graph, infer_shapes(model.graph)).values()))
    assert (norm.source.name, round(norm.epsilon, 6), norm.output.name) == ("x", 0.001, "y")
    before = run(model, feeds)[0]
    quantize(model, {"*": "int8"}, activation_bits=32)
    assert [op for op in ops(model) if op != "Add"] == ["QuantLinear"]
    np.testing.assert_allclose(run(model, feeds)[0], before, atol=0.01 * np.abs(before).max())


@pytest.mark.parametrize("body", OTHERS.values(), ids=OTHERS.keys())
def test_near_misses(body: str) -> None:
    model = graph(body)
    assert not find_norms(model.graph, infer_shapes(model.graph))
