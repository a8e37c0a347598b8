"""The lowered graph: what onnxruntime computes with the ops is what the reference says for each linear by itself, merged or not."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest
from graphs import one_sequence, ops, quantize, run, token_flat, written
from octavo.custom_ops.packing import QuantizedWeight, WeightFormat, unpack
from octavo.custom_ops.quant_reference import quant_linear
from octavo.errors import ModelError, OptionError
from octavo.passes.cleanup import Cleanup
from octavo.passes.linears.precision import Precision
from octavo.passes.quantize.groups import Scheme
from octavo.passes.quantize.rtn import rtn

ROWS = np.random.default_rng(5).normal(size=(6, 64)).astype(np.float32)
INT4 = Scheme(4, 32)
TOKENS = np.arange(5, 29) * 7 % 320


def of(model: ir.Model, name: str, scheme: Scheme = INT4) -> QuantizedWeight:
    """An initializer [K, M] as the pass quantizes it."""
    return rtn(model.graph.initializers[name].const_value.numpy().T, scheme)


def number(model: ir.Model, name: str) -> np.ndarray:
    return model.graph.initializers[name].const_value.numpy()


def attributes(model: ir.Model) -> list[dict[str, int | float]]:
    return [{attribute.name: attribute.value for attribute in node.attributes.values()} for node in model.graph if node.op_type == "QuantLinear"]


@pytest.mark.parametrize("bits", [8, 32])
def test_linears_of_one_input_are_one_product_of_the_same_bits(bits: int) -> None:
    """Three products behind one norm, one with a bias, of sizes that fill no tile."""
    model = written(
        "h = RMSNormalization<axis = -1, epsilon = 0.01>(x, n) q = MatMul(h, a) k = MatMul(h, b) p = MatMul(h, c) v = Add(p, bias)",
        {"n": (64,), "a": (64, 40), "b": (64, 24), "c": (64, 8), "bias": (8,)}, "float[n,40] q, float[n,24] k, float[n,8] v",
    )
    shared = {"input": ROWS, "norm_weight": number(model, "n"), "norm_epsilon": 0.01, "activation_bits": bits}
    expected = [quant_linear(of(model, name), **shared).output for name in "ab"]
    expected.append(quant_linear(of(model, "c"), **shared, bias=number(model, "bias")).output)
    outcome = quantize(model, activation_bits=bits)
    assert ops(model) == ["QuantLinear", "Split"] and outcome.rewritten == outcome.matched == 3
    assert [value.name for value in model.graph.outputs] == ["q", "k", "v"]
    for found, right in zip(run(model, {"x": ROWS}), expected):
        np.testing.assert_array_equal(found, right)


def test_linears_of_different_schemes_stay_apart() -> None:
    model = written("a = MatMul(x, v) b = MatMul(x, w) y = Sub(a, b)", {"v": (64, 32), "w": (64, 32)})
    expected = quant_linear(of(model, "v"), input=ROWS).output - quant_linear(of(model, "w", Scheme(8, 32)), input=ROWS).output
    quantize(model, {"input": "int4", "input.1": "int8"})
    assert ops(model) == ["QuantLinear", "QuantLinear", "Sub"]
    np.testing.assert_array_equal(run(model, {"x": ROWS})[0], expected)


def test_a_norm_that_others_read_stays() -> None:
    model = written(
        "h = RMSNormalization<axis = -1>(x, n) y = MatMul(h, w) z = Exp(h)", {"n": (64,), "w": (64, 32)}, "float[n,32] y, float[n,64] z"
    )
    normed = np.log(run(model, {"x": ROWS})[1])
    expected = quant_linear(of(model, "w"), input=normed).output
    quantize(model)
    assert sorted(ops(model)) == ["Exp", "QuantLinear", "RMSNormalization"]
    assert next(node for node in model.graph if node.op_type == "QuantLinear").inputs[2:] == ()  # it is not computed twice
    np.testing.assert_allclose(run(model, {"x": ROWS})[0], expected, atol=0.02 * np.abs(expected).max())


def test_gate_bias_and_residual_in_one_node() -> None:
    model = written(
        "p = MatMul(x, a) g = Add(p, abias) u = MatMul(x, b) s = Sigmoid(g) m = Mul(g, s) t = Mul(m, u) y = Add(r, t)",
        {"a": (64, 48), "abias": (48,), "b": (64, 48)}, inputs="float[n,64] x, float[n,48] r",
    )
    both = rtn(np.concatenate([number(model, "a").T, number(model, "b").T]), INT4)
    residual = ROWS[:, :48] * 3
    bias = np.concatenate([number(model, "abias"), np.zeros(48, np.float32)])
    expected = quant_linear(both, input=ROWS, bias=bias, residual=residual, gate=1).output
    quantize(model)
    assert ops(model) == ["QuantLinear"]
    np.testing.assert_allclose(run(model, {"x": ROWS, "r": residual})[0], expected, rtol=1e-6, atol=1e-6)


SKIPS = {
    "Add and norm": "s = Add(x, k) h = RMSNormalization<axis = -1, epsilon = 0.01>(s, n) y = MatMul(h, w) z = Neg(s)",
    "Skip norm": "h, _, _, s = com.microsoft.SkipSimplifiedLayerNormalization<epsilon = 0.01>(x, k, n) y = MatMul(h, w) z = Neg(s)",
}


@pytest.mark.parametrize("body", SKIPS.values(), ids=SKIPS.keys())
def test_a_skip_before_the_norm(body: str) -> None:
    """The op gives the sum too."""
    body = body.replace("h, _, _, s", 'h, d, e, s')
    model = written(body, {"n": (64,), "w": (64, 32)}, "float[n,32] y, float[n,64] z", inputs="float[n,64] x, float[n,64] k")
    skip = ROWS[::-1].copy()
    result = quant_linear(of(model, "w"), input=ROWS, skip=skip, norm_weight=number(model, "n"), norm_epsilon=0.01)
    quantize(model)
    assert ops(model) == ["QuantLinear", "Neg"]
    y, z = run(model, {"x": ROWS, "k": skip})
    np.testing.assert_array_equal(y, result.output)
    np.testing.assert_array_equal(z, -(ROWS + skip))


def test_a_residual_between_two_linears_ends_the_first_and_begins_the_second() -> None:
    body = "p = MatMul(x, a) s = Add(x, p) h = RMSNormalization<axis = -1, epsilon = 0.01>(s, n) q = MatMul(h, b) y = Add(s, q)"
    model = written(body, {"a": (64, 64), "n": (64,), "b": (64, 64)}, "float[n,64] y")
    first = quant_linear(of(model, "a"), input=ROWS, residual=ROWS).output
    norm = {"norm_weight": number(model, "n"), "norm_epsilon": 0.01}
    expected = quant_linear(of(model, "b"), input=first, residual=first, **norm).output
    quantize(model)
    assert ops(model) == ["QuantLinear", "QuantLinear"]
    np.testing.assert_array_equal(run(model, {"x": ROWS})[0], expected)


def test_both_of_two_products_that_are_summed_are_rewritten() -> None:
    """Each is the other's residual: the first takes the sum, and the second goes into it."""
    body = "u = Exp(x) p = MatMul(x, a) q = MatMul(u, b) y = Add(p, q)"
    model = written(body, {"a": (64, 64), "b": (64, 64)}, "float[n,64] y")
    second = quant_linear(of(model, "b"), input=np.exp(ROWS)).output
    expected = quant_linear(of(model, "a"), input=ROWS, residual=second).output
    quantize(model)
    assert sorted(ops(model)) == ["Exp", "QuantLinear", "QuantLinear"]
    np.testing.assert_allclose(run(model, {"x": ROWS})[0], expected, rtol=1e-5, atol=1e-5)


def decoder(name: str, patterns: Mapping[str, Precision], **how: object) -> tuple[ir.Model, np.ndarray, np.ndarray]:
    """A tiny decoder lowered, its logits, and those of the same graph in fp32."""
    model = token_flat(name)
    feeds = one_sequence(model, TOKENS)
    before = run(model, feeds)[0]
    quantize(model, patterns, **how)  # type: ignore[arg-type]
    Cleanup()(model)
    return model, run(model, feeds)[0], before


def distance(found: np.ndarray, before: np.ndarray) -> float:
    """Root mean square of the difference, over that of the logits."""
    return float(np.sqrt(np.mean((found - before) ** 2) / np.mean(before**2)))


@pytest.mark.parametrize("name", ["llama", "qwen2", "llama3"])
def test_a_decoder_in_fat_nodes(name: str) -> None:
    """Four products a layer, no norm, no gate and no residual outside of them."""
    model, _, _ = decoder(name, {"*": "int4"})
    layers = 3 if name == "llama3" else 2
    counts = {op: ops(model).count(op) for op in set(ops(model))}
    assert counts["QuantLinear"] == 4 * layers + 1 and counts["QuantEmbedding"] == 1 and counts["Split"] == layers
    assert set(ops(model)) == {"QuantLinear", "QuantEmbedding", "Split", "PagedAttention", "Reshape", "Gather"}
    assert all("model.layers" not in initializer or "norm" in initializer for initializer in model.graph.initializers)


@pytest.mark.parametrize("name", ["llama", "qwen2", "llama3"])
def test_with_float_activations_it_is_the_graph_on_the_rounded_weights(name: str) -> None:
    """Nothing but the order of sums lies between the two: 1e-6 a sum, over seven sums in a row, and softmax between."""
    plain = token_flat(name)
    for value in plain.graph.initializers.values():
        array = value.const_value.numpy()
        if array.ndim == 2 and "rotary" not in str(value.name):
            turned = "embed" not in str(value.name)
            found = rtn(array.T if turned else array, INT4).dequantize()
            value.const_value = ir.Tensor(np.ascontiguousarray(found.T if turned else found), name=value.name)
    expected = run(plain, one_sequence(plain, TOKENS))[0]
    _, found, before = decoder(name, {"*": "int4"}, activation_bits=32)
    assert distance(found, expected) < 1e-5 and distance(found, before) > 0.05


def test_more_bits_are_nearer() -> None:
    found = [distance(*decoder("llama", {"*": weights}, activation_bits=bits)[1:]) for weights, bits in (("int8", 32), ("int8", 8), ("int4", 8))]  # type: ignore[dict-item]
    assert found == sorted(found) and found[1] < 0.05 and found[2] > 0.1


def test_rows_do_not_depend_on_company() -> None:
    """The whole prompt, all logits; the same prompt's first part by itself."""
    model, whole, _ = decoder("llama", {"*": "int4"})
    np.testing.assert_array_equal(run(model, one_sequence(model, TOKENS[:9]))[0], whole[:9])


def test_a_tied_table_is_packed_once() -> None:
    model, _, _ = decoder("llama", {"*": "int4"})
    packed = [node.inputs[1] for node in model.graph if node.op_type == "QuantEmbedding" or node.name == list(model.graph)[-2].name]
    assert len(packed) == 2 and packed[0] is packed[1] and "model.embed_tokens.weight" not in model.graph.initializers
    table = token_flat("llama").graph.initializers["model.embed_tokens.weight"].const_value.numpy()
    stored = unpack(packed[0].const_value.numpy(), WeightFormat(64, 320))
    assert np.array_equal(stored.dequantize(), rtn(table, INT4).dequantize())


def test_a_tied_table_stays_with_its_head() -> None:
    model, _, _ = decoder("llama", {"head": "fp32", "*": "int4"})
    assert "QuantEmbedding" not in ops(model) and "model.embed_tokens.weight" in model.graph.initializers


def test_weights_that_are_not_quantized_keep_their_bits() -> None:
    model, plain = token_flat("llama"), token_flat("llama")
    outcome = quantize(model, {"layers.0.mlp.*": "int4"})
    kept = {name: value for name, value in plain.graph.initializers.items() if "layers.0.mlp" not in name}
    for name, value in kept.items():
        assert np.array_equal(model.graph.initializers[name].const_value.numpy(), value.const_value.numpy()), name
    assert ops(model).count("MatMul") == ops(plain).count("MatMul") - 3 and outcome.rewritten == 3
    assert outcome.notes[0] == "int4 in groups of 32, symmetric: 3 (layers.*.mlp.gate, layers.*.mlp.up, layers.*.mlp.down)"


def test_nothing_asked_changes_nothing() -> None:
    for patterns in ({}, {"*": "fp32"}, {"*": "stored"}):
        model = token_flat("llama")
        before = ir.serde.serialize_model(model)
        assert quantize(model, patterns or {"head": "stored"}).rewritten == 0  # type: ignore[arg-type]
        assert ir.serde.serialize_model(model) == before


def test_errors_name_the_tensor_or_the_pattern() -> None:
    weight = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(OptionError, match=f"groups of 64 don't divide the 96 inputs of {weight}"):
        quantize(token_flat("llama"), {"layers.1.*": "int4"}, group_size=64)
    with pytest.raises(OptionError, match=r"'layers\.2\.\*'.*near it"):
        quantize(token_flat("llama"), {"layers.2.*": "int8", "*": "int4"})
    model = token_flat("llama")
    bad = model.graph.initializers[weight].const_value.numpy().copy()
    bad[3, 4] = np.nan
    model.graph.initializers[weight].const_value = ir.Tensor(bad, name=weight)
    with pytest.raises(ModelError, match=f"{weight} holds nan at output 4, input 3"):
        quantize(model)


def test_outcome_counts_bytes() -> None:
    model = token_flat("llama3")
    outcome = quantize(model)
    assert outcome.bytes_after < outcome.bytes_before / 3 and outcome.notes[-1] == "23 of 23 weights in 14 nodes"
