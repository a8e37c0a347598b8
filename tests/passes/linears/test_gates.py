"""Gated products: the activation is found by what it computes, not by how it is spelled."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import ops, quantize, run, written
from octavo.passes.linears.match import find_linears

SPELLINGS = {
    "silu, Sigmoid": ("s = Sigmoid(g) a = Mul(g, s)", "silu"),
    "silu, Sigmoid first": ("s = Sigmoid(g) a = Mul(s, g)", "silu"),
    "silu, Swish": ("a = com.microsoft.QuickGelu<alpha = 1.0>(g)", "silu"),
    "silu, Exp": ("n = Neg(g) e = Exp(n) p = Add(e, one) a = Div(g, p)", "silu"),
    "gelu, Gelu": ("a = Gelu(g)", "gelu"),
    "gelu, com.microsoft": ("a = com.microsoft.Gelu(g)", "gelu"),
    "gelu, Erf": ("d = Div(g, root_two) e = Erf(d) p = Add(e, one) m = Mul(g, p) a = Mul(m, half)", "gelu"),
    "gelu_tanh, Gelu": ('a = Gelu<approximate = "tanh">(g)', "gelu_tanh"),
    "gelu_tanh, FastGelu": ("a = com.microsoft.FastGelu(g)", "gelu_tanh"),
    "gelu_tanh, parts": (
        "c = Pow(g, three) k = Mul(c, cubic) q = Add(g, k) i = Mul(q, factor) t = Tanh(i) p = Add(t, one) h = Mul(g, half) a = Mul(h, p)", "gelu_tanh",
    ),
}
OTHERS = {
    "relu": "a = Relu(g)",
    "QuickGelu": "a = com.microsoft.QuickGelu<alpha = 1.702>(g)",
    "a little off": "s = Sigmoid(g) b = Mul(g, s) a = Mul(b, almost)",
}
SCALARS = {
    "one": 1.0, "half": 0.5, "three": 3.0, "cubic": 0.044715, "root_two": np.sqrt(2), "factor": np.sqrt(2 / np.pi), "almost": 1.01,
}


def graph(activation: str, product: str = "Mul(a, u)", more: str = "") -> ir.Model:
    body = f"g = MatMul(x, wg) u = MatMul(x, wu) {activation} y = {product} {more}"
    model = written(body, {"wg": (64, 96), "wu": (64, 96)}, "float[n,96] y" + (", float[n,96] z" if more else ""))
    for name, number in SCALARS.items():
        value = ir.Value(name=name, const_value=ir.tensor(np.float32(number), name=name))
        model.graph.register_initializer(value)
        for node in model.graph:
            for i, operand in enumerate(node.inputs):
                if operand is not None and operand.name == name and operand is not value:
                    node.replace_input_with(i, value)
    return model


@pytest.mark.parametrize("product", ["Mul(a, u)", "Mul(u, a)"])
@pytest.mark.parametrize(("activation", "name"), SPELLINGS.values(), ids=SPELLINGS.keys())
def test_spellings(activation: str, name: str, product: str) -> None:
    model = graph(activation, product)
    gate = find_linears(model).gates[0]
    assert (gate.activation, gate.gate.site.weight.name, gate.up.site.weight.name) == (name, "wg", "wu")
    x = np.random.default_rng(1).normal(size=(7, 64)).astype(np.float32)
    before = run(model, {"x": x})[0]
    quantize(model, {"*": "int8"}, activation_bits=32)
    assert ops(model) == ["QuantLinear"]
    np.testing.assert_allclose(run(model, {"x": x})[0], before, atol=0.02 * np.abs(before).max())


@pytest.mark.parametrize("activation", OTHERS.values(), ids=OTHERS.keys())
def test_another_function_is_refused_and_stays(activation: str) -> None:
    model = graph(activation)
    outcome = quantize(model)
    assert [refusal.reason for refusal in outcome.refusals] == ["a gate by another function"]
    assert ops(model)[0] == "QuantLinear" and ops(model)[-1] == "Mul" and outcome.rewritten == 2


@pytest.mark.parametrize(
    ("activation", "more"), [("s = Sigmoid(g) a = Mul(g, s)", "z = Abs(g)"), ("s = Sigmoid(g) a = Mul(g, s)", "z = Abs(a)"), ("a = Gelu(g)", "z = Abs(u)")],
)
def test_a_product_that_somebody_else_reads_is_no_gate(activation: str, more: str) -> None:
    model = graph(activation, more=more)
    assert not find_linears(model).gates
    x = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    before = run(model, {"x": x})
    quantize(model, {"*": "int8"}, activation_bits=32)
    for found, expected in zip(run(model, {"x": x}), before):
        np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("halves", ["g, u", "u, g"])
def test_gate_and_values_in_one_matrix(halves: str) -> None:
    """The gate may be either half."""
    body = f"both = MatMul(x, w) {halves} = Split<axis = -1, num_outputs = 2>(both) s = Sigmoid(g) a = Mul(g, s) y = Mul(a, u)"
    model = written(body, {"w": (64, 192)}, "float[n,96] y")
    x = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    before = run(model, {"x": x})[0]
    assert find_linears(model).names == ("input",)
    quantize(model, {"*": "int8"}, activation_bits=32)
    assert ops(model) == ["QuantLinear"]
    np.testing.assert_allclose(run(model, {"x": x})[0], before, atol=0.02 * np.abs(before).max())
