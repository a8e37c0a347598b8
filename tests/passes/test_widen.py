"""Half precision computed in float32: the numbers that the weights mean, in a graph that knows no half any more."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from octavo.passes.normalize import Normalize
from octavo.passes.widen import WidenHalf

HALF = """
<ir_version: 10, opset_import: ["" : 18]>
g (float16[n,4] x, bool flag, float16[4,3] w, float16[3] bias) => (float16[n,3] y)
{
    a = MatMul(x, w)
    up = Cast<to = 1>(a)
    t = Tanh(up)
    down = Cast<to = 10>(t)
    z = If (flag) <
        then_branch = yes () => (float16[n,3] p) { p = Add(down, bias) },
        else_branch = no () => (float16[n,3] q) { quarter = Constant<value = float {0.25}>() half = Cast<to = 10>(quarter) q = Mul(down, half) }
    >
    y = Identity(z)
}
"""


def with_weights(text: str, **weights: np.ndarray) -> ir.Model:
    """The graph with some of its inputs made constants: the text form has no literals of half precision."""
    model = ir.from_onnx_text(text)
    for name, array in weights.items():
        value = next(value for value in model.graph.inputs if value.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name)
        model.graph.register_initializer(value)
    return model


def half() -> tuple[ir.Model, np.ndarray]:
    weight = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float16)
    return with_weights(HALF, w=weight, bias=np.array([0.5, 1.5, -2], np.float16)), weight


def test_a_graph_in_half_precision_is_computed_in_float32() -> None:
    model, weight = half()
    Normalize()(model)
    result = WidenHalf()(model)
    assert result.modified and "computed in float32" in result.outcome.notes[0]
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    t = np.tanh(x @ weight.astype(np.float32))
    for flag, want in ((True, t + np.array([0.5, 1.5, -2], np.float32)), (False, t * np.float32(0.25))):
        got = session.run(None, {"x": x, "flag": np.array(flag)})[0]
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    assert "Cast" not in [node.op_type for node in model.graph]


def test_weights_alone_in_half_precision_are_left() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    g (float[n,3] x, float16[3] bias) => (float[n,3] y) { b = Cast<to = 1>(bias) y = Add(x, b) }
    """
    model = with_weights(text, bias=np.ones(3, np.float16))
    assert not WidenHalf()(model).modified
    assert model.graph.initializers["bias"].dtype == ir.DataType.FLOAT16


@pytest.mark.parametrize("twice", [False, True])
def test_nothing_half_is_left(twice: bool) -> None:
    model, _ = half()
    Normalize()(model)
    WidenHalf()(model)
    if twice:
        assert not WidenHalf()(model).modified
    assert all(value.dtype != ir.DataType.FLOAT16 for value in (*model.graph.inputs, *model.graph.outputs))
