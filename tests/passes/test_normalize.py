"""normalize: the same numbers in a flatter graph, weights untouched; dequantized weights against NumPy's own arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from octavo.models.onnx_reader import read_onnx
from octavo.passes.normalize import FOLD_LIMIT, FoldDequantize, Normalize
from onnx import TensorProto, helper, numpy_helper


def run(model: ir.Model, **feeds: np.ndarray) -> list[np.ndarray]:
    """Unfused: ORT's own folding must not do what a pass should."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = ir.serde.serialize_model(model)
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feeds)


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


MIXED = """
<ir_version: 10, opset_import: ["" : 18, "local" : 1]>
g (float[n] x) => (float[n] y) <float zero = {0}>
{
    half = Constant<value = float {0.5}>()
    third = Constant<value_float = 3.0>()
    six = Mul(third, third)
    scale = Sqrt(six)
    same = Identity(x)
    grown = local.grow(same, scale)
    dead = Exp(grown)
    y = Mul(grown, half)
}
<domain: "local", opset_import: ["" : 18]>
grow (a, b) => (c) { inner = Identity(a) c = Add(inner, b) }
"""


def test_rules() -> None:
    """Functions inlined, constants lifted and folded, identities and the dead gone, and the numbers the same."""
    model = ir.from_onnx_text(MIXED)
    x = np.array([1, 2.5], np.float32)
    before = run(model, x=x)
    result = Normalize()(model)
    assert ops(model) == ["Add", "Mul"] and not model.functions and result.modified
    np.testing.assert_array_equal(run(model, x=x)[0], before[0])
    assert "scale" in model.graph.initializers and model.graph.initializers["scale"].const_value.numpy() == np.float32(3)
    assert result.outcome.nodes_after == 2 and result.outcome.rewritten == 1


def test_a_second_run_changes_nothing() -> None:
    model = ir.from_onnx_text(MIXED)
    Normalize()(model)
    before = ir.serde.serialize_model(model)
    assert not Normalize()(model).modified and ir.serde.serialize_model(model) == before


def test_types_are_known_afterwards() -> None:
    model = ir.from_onnx_text(MIXED)
    Normalize()(model)
    assert all(value.dtype == ir.DataType.FLOAT for node in model.graph for value in node.outputs)


def test_an_initializer_that_is_an_input_becomes_a_constant() -> None:
    text = '<ir_version: 3, opset_import: ["" : 18]> g (float[n] x, float w) => (float[n] y) <float w = {2}> { y = Mul(x, w) }'
    model = ir.from_onnx_text(text)
    result = Normalize()(model)
    assert [value.name for value in model.graph.inputs] == ["x"] and result.outcome.notes == ("inputs with a default are constants now: w",)


@pytest.mark.parametrize(("size", "folded"), [(FOLD_LIMIT // 4, True), (FOLD_LIMIT // 4 + 1, False)])
def test_weights_are_not_folded(size: int, folded: bool) -> None:
    """A transposed weight stays a Transpose: computing it would copy it and lose its name."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, [size], np.ones(size, np.float32))
    graph = helper.make_graph(
        [helper.make_node("Neg", ["w"], ["n"]), helper.make_node("Add", ["x", "n"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [size])], [weight],
    )
    model = ir.serde.deserialize_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))
    Normalize()(model)
    assert ("Neg" not in ops(model)) == folded


def test_a_row_of_a_weight_is_not_folded() -> None:
    """It is small, but to have it the weight would be read."""
    model = ir.from_onnx_text("""
<ir_version: 10, opset_import: ["" : 18]>
g (float[n] x) => (float[n] y) <float[1,1] w = {0}, int64 row = {3}> { part = Gather(w, row) y = Add(x, part) }
""")

    def unreadable() -> ir.Tensor:
        raise AssertionError("a weight was read")

    weight = model.graph.initializers["w"]
    weight.const_value = ir.LazyTensor(unreadable, dtype=ir.DataType.FLOAT, shape=ir.Shape([1000, 1]), name="w")
    weight.shape = ir.Shape([1000, 1])
    result = Normalize()(model)
    assert ops(model) == ["Gather", "Add"] and not result.outcome.notes


def test_something_large_out_of_something_small_is_not_folded() -> None:
    model = ir.from_onnx_text("""
<ir_version: 10, opset_import: ["" : 18]>
g (float[n] x) => (float[n] y) <int64[1] count = {100000000}, int64[1] start = {0}, int64[1] end = {1}>
{ many = ConstantOfShape(count) one = Slice(many, start, end) y = Add(x, one) }
""")
    Normalize()(model)
    assert "ConstantOfShape" in ops(model)


@pytest.mark.parametrize(("exporter", "opset"), [("dynamo", 18), ("torchscript", 17)])
def test_exported_graphs(exported: Callable[..., Path], exporter: str, opset: int) -> None:
    """Logits and caches keep their bits, and every parameter its name and bits."""
    path = exported("llama", exporter=exporter, opset=opset) / "model.onnx"
    model = ir.external_data.load_to_model(read_onnx(path))
    plain = ir.external_data.load_to_model(read_onnx(path))
    tensors = {name: value.const_value for name, value in plain.graph.initializers.items()}
    weights = {name: tensor.tobytes() for name, tensor in tensors.items() if tensor.nbytes > FOLD_LIMIT}
    Normalize()(model)
    assert weights.keys() <= model.graph.initializers.keys()
    assert all(model.graph.initializers[name].const_value.tobytes() == content for name, content in weights.items())
    draw = np.random.default_rng(0)
    sizes = {"input_ids": (1, 3), "attention_mask": (1, 8), "position_ids": (1, 3)}
    feeds = {
        value.name: draw.standard_normal((1, value.shape[1], 5, value.shape[3]), np.float32) if value.name not in sizes
        else np.ones(sizes[value.name], np.int64) for value in plain.graph.inputs
    }
    for got, want in zip(run(model, **feeds), run(plain, **feeds), strict=True):
        np.testing.assert_array_equal(got, want)


# ---- dequantized weights

def q4_1(rows: int, columns: int, seed: int = 0) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], np.ndarray]:
    """A weight as the GGUF importer spells Q4_1 (blocks of 32 with scale and minimum), and what it means in NumPy."""
    draw, blocks = np.random.default_rng(seed), columns // 32
    codes = draw.integers(0, 16, (rows * blocks, 32), dtype=np.uint8)
    scale = draw.standard_normal((rows * blocks, 1)).astype(np.float32)
    least = draw.standard_normal((rows * blocks, 1)).astype(np.float32)
    packed = (codes.reshape(-1)[0::2] | (codes.reshape(-1)[1::2] << 4)).astype(np.uint8)
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["d"], axis=1, block_size=32),
        helper.make_node("Reshape", ["d", "blocks"], ["db"]), helper.make_node("Add", ["db", "m"], ["da"]),
        helper.make_node("Reshape", ["da", "rows"], ["w"]),
    ]
    tensors = [
        helper.make_tensor("q", TensorProto.UINT4, [rows, columns], packed.tobytes(), raw=True),
        numpy_helper.from_array(scale.reshape(rows, blocks), "s"), numpy_helper.from_array(least, "m"),
        numpy_helper.from_array(np.array([-1, 32]), "blocks"), numpy_helper.from_array(np.array([rows, columns]), "rows"),
    ]
    return nodes, tensors, (codes.astype(np.float32) * scale + least).reshape(rows, columns)


def quantized(rows: int = 64, columns: int = 96) -> tuple[ir.Model, np.ndarray]:
    """A table that is both gathered from and, transposed, multiplied with."""
    nodes, tensors, meant = q4_1(rows, columns)
    nodes += [
        helper.make_node("Gather", ["w", "ids"], ["x"]), helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")], tensors,
    )
    return ir.serde.deserialize_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)), meant


def test_q4_1_means_what_numpy_says() -> None:
    model, meant = quantized()
    ids = np.arange(64)
    before = run(model, ids=ids)
    result = FoldDequantize()(model)
    assert result.modified and ops(model) == ["Gather", "Transpose", "MatMul"] and set(model.graph.initializers) == {"w"}
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), meant)
    for got, want in zip(run(model, ids=ids), before):
        np.testing.assert_array_equal(got, want)


def test_a_weight_is_computed_when_asked_for() -> None:
    """What is kept is how to compute it: the quantized bytes, and no float of it."""
    model, _ = quantized()
    Normalize()(model)
    assert ops(model)[0] == "DequantizeLinear"  # normalizing keeps quantized weights as they are
    FoldDequantize()(model)
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.LazyTensor) and not tensor.cache and tensor.nbytes == 64 * 96 * 4


def test_activations_stay_quantized() -> None:
    """Quantize and dequantize of an activation is part of what the model computes."""
    text = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[n] x) => (float[n] y) <float s = {0.5}, uint8 z = {3}> { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }
"""
    model = ir.from_onnx_text(text)
    assert not FoldDequantize()(model).modified and ops(model) == ["QuantizeLinear", "DequantizeLinear"]


@pytest.mark.parametrize(("source", "target", "folded"), [
    (np.float16, TensorProto.FLOAT, True), (np.float32, TensorProto.FLOAT16, False), (np.float32, TensorProto.INT64, False),
])
def test_casts_are_folded_where_they_lose_nothing(source: type, target: int, folded: bool) -> None:
    weight = np.random.default_rng(0).standard_normal(8).astype(source)
    graph = helper.make_graph(
        [helper.make_node("Cast", ["w"], ["c"], to=target), helper.make_node("Mul", ["c", "x"], ["y"])], "g",
        [helper.make_tensor_value_info("x", target, [8])], [helper.make_tensor_value_info("y", target, [8])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = ir.serde.deserialize_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    assert FoldDequantize()(model).modified == folded
    if folded:
        np.testing.assert_array_equal(model.graph.initializers["c"].const_value.numpy(), weight.astype(np.float32))


FUSED = """
<ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]>
g (float[2,3,4] a, float[2,5,4] b, float[2,3,5] c) => (float[2,3,5] y, float[2,4,5] z)
{
    y = com.microsoft.FusedMatMul<transB = 1, alpha = 0.25>(a, b)
    z = com.microsoft.FusedMatMul<transA = 1>(a, c)
}
"""


def test_fused_products_are_written_out() -> None:
    model = ir.from_onnx_text(FUSED)
    draw = np.random.default_rng(0)
    feeds = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in {"a": (2, 3, 4), "b": (2, 5, 4), "c": (2, 3, 5)}.items()}
    before = run(model, **feeds)
    Normalize()(model)
    assert sorted(ops(model)) == ["MatMul", "MatMul", "Mul", "Transpose", "Transpose"]
    for got, want in zip(run(model, **feeds), before):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


UNTYPED = """
<ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]>
g (float[2,3,4] a, float[4] w, int64[1] k) => (float[2,3,4] y, bool[2,3,4] big, float[2,3,2] top, float[2,3,2] picked)
{
    n = com.microsoft.SkipSimplifiedLayerNormalization(a, a, w)
    l = SimplifiedLayerNormalization(n, w)
    s = Sigmoid(l)
    m = Mul(s, n)
    c = Cast<to = 7>(m)
    big = Greater(m, a)
    d = Cast<to = 1>(c)
    y = Add(d, m)
    top, i = TopK(m, k)
    picked = GatherElements<axis = 2>(m, i)
}
"""


def test_types_are_known_behind_other_domains() -> None:
    model = ir.from_onnx_text(UNTYPED)
    for node in model.graph:
        for value in node.outputs:
            value.type = value.type if value.is_graph_output() else None
    Normalize()(model)
    types = {value.name: value.dtype for node in model.graph for value in node.outputs}
    assert {types[name] for name in "nlsmdy"} == {ir.DataType.FLOAT}
    assert (types["c"], types["big"], types["i"]) == (ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.INT64)
