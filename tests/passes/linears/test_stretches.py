"""Linears are seen with what was rounded before them, values by the averages that attention makes of them, and GPTQ makes use of both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from graphs import constants, one_sequence, quantize, run, token_flat, written
from octavo.models.onnx_reader import graph_interface, read_onnx
from octavo.passes.attention.match import match_attention
from octavo.passes.attention.site import AttentionSite
from octavo.passes.extract import cone, prepare
from octavo.passes.linears import averages
from octavo.passes.linears.lower_quant import QuantizeLinears
from octavo.passes.linears.match import find_linears
from octavo.passes.linears.pieces import Pieces
from octavo.passes.linears.rehearsal import Rehearsal
from octavo.passes.linears.smooth import SmoothLinears
from octavo.passes.linears.stretches import Stretches
from octavo.passes.linears.weights import WeightPlan
from octavo.passes.normalize import FoldDequantize, Normalize
from octavo.passes.observe import observe
from octavo.passes.quantize.gptq import gptq
from octavo.passes.quantize.groups import Scheme
from octavo.passes.quantize.methods import quantizer

RNG = np.random.default_rng(7)
TEXT = [RNG.integers(3, 320, 600).tolist(), RNG.integers(3, 320, 40).tolist()]
Source = Callable[[], tuple[ir.Model, list[AttentionSite]]]


@pytest.fixture(scope="module")
def source(tiny_onnx: Path) -> Source:
    """The normalized graph and its attentions, each time anew."""

    def read() -> tuple[ir.Model, list[AttentionSite]]:
        model = read_onnx(tiny_onnx / "model.onnx")
        Normalize()(model)
        FoldDequantize()(model)
        sites = match_attention(model, observe(model, graph_interface(model)), max_context=512)
        return model, [site for site in sites if isinstance(site, AttentionSite)]

    return read


def weight_of(model: ir.Model, name: str) -> np.ndarray:
    value = model.graph.initializers[name].const_value
    assert value is not None
    return value.numpy()


def coarse(weight: np.ndarray) -> np.ndarray:
    return np.round(weight * 6) / np.float32(6)


def names(model: ir.Model) -> list[str]:
    return [str(site.weight.name) for site in find_linears(model).sites]


def test_inputs_are_those_behind_rounded_linears(source: Source) -> None:
    """The oracle is a graph in which all of them are rounded, at once. The graph itself isn't changed, and may change afterwards."""
    model, _ = source()
    before = ir.serde.serialize_model(model)
    stretches = Stretches(model, graph_interface(model), TEXT)
    assert ir.serde.serialize_model(model) == before
    order, sites = names(model), {str(site.weight.name): site for site in find_linears(model).sites}
    plain, changed = sums(model), source()[0]
    for value in model.graph.all_nodes():
        for output in value.outputs:
            output.name = f"other.{output.name}"
    found = {}
    for name in order:
        (seen,) = stretches.seen(name) or ()
        found[name] = seen.hessian
        assert np.array_equal(seen.rows, np.arange(sites[name].M))
        if name != order[-1]:      # the head's is the table of embeddings too
            weight = coarse(weight_of(changed, name))
            changed.graph.initializers[name].const_value = ir.Tensor(weight, name=name)
            stretches.rounded(name, weight if sites[name].transposed else weight.T)
    expected = sums(changed)
    for name in order:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-3 * np.abs(expected[name]).max())
    assert np.abs(found[order[-1]] - plain[order[-1]]).max() > 0.01 * np.abs(plain[order[-1]]).max()
    assert stretches.seen(order[0]) is None and stretches.seen("no weight") is None


def test_a_smoothed_graph_reads_smoothed_inputs_and_tells_its_weights_as_they_were(source: Source) -> None:
    """Weights that only were smoothed change nothing of what comes: factors on both sides, of inputs and of outputs, are taken back."""
    model, _ = source()
    plain, order = sums(model), names(model)
    stretches, maxima = Stretches(model, graph_interface(model), TEXT), Rehearsal(model, graph_interface(model), TEXT).maxima()
    smooth = SmoothLinears(WeightPlan({"*": "int8"}, 32, quantizer("rtn")), {}, maxima)
    smooth(model)
    inputs, sites = smooth.inputs(stretches), {str(site.weight.name): site for site in find_linears(model).sites}
    assert any("up_proj" in name for name in smooth.factors) and any("down_proj" in name for name in smooth.factors)
    for name in order:
        s = smooth.factors.get(name, np.ones(sites[name].K, np.float32))
        (seen,) = inputs.seen(name) or ()
        np.testing.assert_allclose(seen.hessian, plain[name] / np.outer(s, s), rtol=1e-3, atol=1e-3 * np.abs(plain[name] / np.outer(s, s)).max())
        weight = weight_of(model, name)
        inputs.rounded(name, weight if sites[name].transposed else weight.T)


def test_a_weight_that_the_graph_has_packed_is_seen_too() -> None:
    """Eight bits that are to become four are rounded as any weight is; what comes behind reads what the graph computes."""
    rng = np.random.default_rng(2)
    body = "e = Gather(t, input_ids) p = com.microsoft.MatMulNBits<K = 64, N = 64, bits = 8, block_size = 32>(e, w, s) y = MatMul(p, v)"
    model = written(body, {"t": (320, 64), "v": (64, 32)}, "float[b,n,32] y", inputs="int64[b,n] input_ids")
    constants(model, {
        "w": ir.Tensor(rng.integers(0, 256, (64, 2, 32)).astype(np.uint8)), "s": ir.Tensor(rng.uniform(0.001, 0.002, (64, 2)).astype(np.float32)),
    })
    stretches, tokens = Stretches(model, graph_interface(model), TEXT[1:]), TEXT[1]
    rows = weight_of(model, "t")[tokens]
    (seen,) = stretches.seen("w") or ()
    np.testing.assert_allclose(seen.hessian, rows.T @ rows, rtol=1e-4, atol=1e-4)
    stretches.rounded("w", np.zeros((64, 64), np.float32))
    (behind,) = stretches.seen("v") or ()
    product = find_linears(model).sites[1].input
    made = computed(model, [product], {}, tokens)[0].reshape(-1, 64)
    np.testing.assert_allclose(behind.hessian, made.T @ made, rtol=1e-3, atol=1e-3 * np.abs(made.T @ made).max())


def outputs(model: ir.Model, value: ir.Value, weights: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """`value` on one piece of text, with other weights."""
    return computed(model, [value], weights, tokens)[0]


def computed(model: ir.Model, values: list[ir.Value], weights: dict[str, np.ndarray], tokens: list[int]) -> list[np.ndarray]:
    whole = cone(values)
    leaves = {leaf: (leaf.dtype or ir.DataType.FLOAT, None) for leaf in whole.leaves if leaf.is_graph_input()}
    runner = prepare(model, whole, leaves).open(fed=weights)
    return runner.run({**Pieces(graph_interface(model), [tokens]).feeds(runner.leaves, tokens), **weights})


def sums(model: ir.Model) -> dict[str, np.ndarray]:
    """XᵀX of each linear's inputs, from whole runs of the graph."""
    sites = find_linears(model).sites
    runs = [computed(model, [site.input for site in sites], {}, tokens) for tokens in (TEXT[0][:512], TEXT[0][512:], TEXT[1])]
    rows = [np.concatenate([run[i].reshape(-1, site.K) for run in runs]).astype(np.float64) for i, site in enumerate(sites)]
    return {str(site.weight.name): x.T @ x for site, x in zip(sites, rows)}


def test_values_are_seen_as_attention_averages_them(source: Source) -> None:
    """What XᵀX says of an error is what it does to the attention's output, summed over all heads, where each KV head has the same error."""
    model, attentions = source()
    stretches = Stretches(model, graph_interface(model), [TEXT[1]], attentions)
    for attention, name in zip(attentions, [name for name in names(model) if "v_proj" in name], strict=True):
        (seen,) = stretches.seen(name) or ()
        weight = weight_of(model, name)
        one = RNG.normal(size=(weight.shape[0], attention.value_size)).astype(np.float32) / 50
        error = np.tile(one, attention.kv_heads)
        output = attention.output
        change = outputs(model, output, {name: weight + error}, TEXT[1]) - outputs(model, output, {name: weight}, TEXT[1])
        assert float((change.astype(np.float64) ** 2).sum()) == pytest.approx(float(np.einsum("kd,kl,ld->", one, seen.hessian, one)), rel=1e-3)
    assert stretches.averaged == len(attentions) == 2


def test_values_in_one_product_with_queries_and_keys_are_found(source: Source) -> None:
    model, attentions = source()
    apart = Stretches(model, graph_interface(model), TEXT, attentions)
    q, k, v = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv")
    expected, plain = (apart.seen(v) or ())[0].hessian, (apart.seen(q) or ())[0].hessian
    fused, _ = source()
    merge(fused, [v, q, k])     # in an order that no exporter has
    sites = match_attention(fused, observe(fused, graph_interface(fused)), max_context=512)
    together = Stretches(fused, graph_interface(fused), TEXT, [site for site in sites if isinstance(site, AttentionSite)])
    values, others = together.seen("merged") or ()
    M = weight_of(model, v).shape[1]
    assert np.array_equal(values.rows, np.arange(M)) and np.array_equal(others.rows, np.arange(M, weight_of(fused, "merged").shape[1]))
    np.testing.assert_allclose(values.hessian, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    np.testing.assert_allclose(others.hessian, plain, rtol=1e-3, atol=1e-3 * np.abs(plain).max())


def merge(model: ir.Model, weights: list[str]) -> None:
    """Linears of one input as one product and a Split."""
    sites = {str(site.weight.name): site for site in find_linears(model).sites}
    parts = [sites[name] for name in weights]
    numbers = [weight_of(model, str(site.weight.name)) for site in parts]
    matrix = np.concatenate([array.T if site.transposed else array for array, site in zip(numbers, parts)], axis=1)
    constants = [ir.Value(name=name, const_value=ir.Tensor(array, name=name)) for name, array in
                 (("merged", np.ascontiguousarray(matrix)), ("sizes", np.array([site.M for site in parts])))]
    for value in constants:
        assert value.const_value is not None
        value.shape, value.type = ir.Shape(value.const_value.shape), ir.TensorType(value.const_value.dtype)
        model.graph.register_initializer(value)
    product = ir.node("MatMul", [parts[0].input, constants[0]])
    split = ir.node("Split", [product.outputs[0], constants[1]], {"axis": -1}, num_outputs=len(parts))
    for value in (*product.outputs, *split.outputs):
        value.type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.insert_after(max((site.node for site in parts), key=list(model.graph).index), [product, split])
    for site, value in zip(parts, split.outputs):
        for use in list(site.output.uses()):
            use.node.replace_input_with(use.idx, value)
    order = list(model.graph)
    readers = {use.node for value in split.outputs for use in value.uses()}
    assert all(order.index(node) > order.index(split) for node in readers)


def test_what_is_no_average_is_seen_as_it_is(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    model, attentions = source()
    monkeypatch.setattr(averages, "_TOLERANCE", -1.0)   # nothing is near enough
    stretches = Stretches(model, graph_interface(model), TEXT, attentions)
    q, v = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.v_proj.weight")
    (values,), (queries,) = stretches.seen(v) or (), stretches.seen(q) or ()
    assert values.hessian is queries.hessian and stretches.averaged == 0


def test_gptq_for_averages_keeps_attention_nearer(source: Source) -> None:
    model, attentions = source()
    """On the text itself: random tokens have little in common with others."""
    name, tokens = "model.layers.1.self_attn.v_proj.weight", TEXT[0][:512]
    weight, errors = weight_of(model, name), []
    before = outputs(model, attentions[1].output, {name: weight}, tokens)
    for sites in (attentions, []):
        (seen,) = Stretches(model, graph_interface(model), TEXT, sites).seen(name) or ()
        after = outputs(model, attentions[1].output, {name: gptq(weight.T, Scheme(4, 32), seen.hessian).dequantize().T}, tokens)
        errors.append(float(np.mean((after - before) ** 2)))
    assert errors[0] < 0.9 * errors[1]


def test_gptq_is_nearer_than_rounding(source: Source) -> None:
    """On text that it has not seen, of the same kind: the logits move less."""
    rng = np.random.default_rng(3)
    text, model = [rng.integers(3, 320, 2000).tolist()], token_flat("llama")
    feeds = one_sequence(model, rng.integers(3, 320, 200))
    before, body, errors = run(model, feeds)[0], {"head": "fp32", "*": "int4"}, []
    for method in ("rtn", "gptq"):
        model = token_flat("llama")
        if method == "rtn":
            quantize(model, body, activation_bits=32)
        else:
            read, attentions = source()
            stretches = Stretches(read, graph_interface(read), text, attentions)
            QuantizeLinears(WeightPlan(body, 32, quantizer("gptq", stretches), activation_bits=32), {})(model)
        errors.append(float(np.mean((run(model, feeds)[0] - before) ** 2)))
    assert errors[1] < 0.85 * errors[0]
