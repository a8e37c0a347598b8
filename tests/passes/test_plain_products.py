"""Einsum, FusedMatMul, softmaxes over other axes or written out: the same numbers in MatMul and Softmax; what means something else stays."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from octavo.passes.normalize import Normalize

SIZES = dict(zip("abcdefgh", (2, 3, 4, 5, 6, 7, 8, 9)))


def outputs(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def graph(inputs: str, rank: int, body: str) -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 18]> g ({inputs}) => (float[{",".join("uvwxy"[:rank])}] z) {{ {body} }}')


def einsum(equation: str) -> tuple[ir.Model, dict[str, np.ndarray]]:
    terms, out = equation.split("->")
    draw = np.random.default_rng(0)
    feeds = {name: draw.standard_normal([SIZES[x] for x in term]).astype(np.float32) for name, term in zip("xy", terms.split(","))}
    inputs = ", ".join(f"float[{','.join(map(str, array.shape))}] {name}" for name, array in feeds.items())
    return graph(inputs, len(out), f'z = Einsum<equation = "{equation}">(x, y)'), feeds


@pytest.mark.parametrize("equation", [
    "abd,acd->abc", "abc,acd->abd",
    "acbd,abed->abce",              # queries tokens first, keys heads first
    "abcde,abfe->abcdf",            # one key head for several query heads, which the result keeps
    "abcde,acfe->acdbf",            # the same, tokens before heads
    "acdbf,acfe->abcde",            # what is seen of it
    "abd,acd->acb",                 # the result turned
    "adbc,aebc->abde",              # heads last of all
])
def test_einsum_is_a_product(equation: str) -> None:
    model, feeds = einsum(equation)
    want = outputs(model, feeds)
    Normalize()(model)
    assert not any(node.op_type == "Einsum" for node in model.graph)
    assert sum(node.op_type == "MatMul" for node in model.graph) == 1
    np.testing.assert_allclose(outputs(model, feeds), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("equation", ["ab,bc->a", "abc,abc->ab", "abc,dbc->ad", "aab,bc->ac", "ab,cd->abcd"])
def test_other_sums_stay(equation: str) -> None:
    """Sums over one operand alone, over two indices, of a diagonal, of nothing."""
    model, _ = einsum(equation)
    Normalize()(model)
    assert [node.op_type for node in model.graph] == ["Einsum"]


def test_an_einsum_with_a_weight_stays() -> None:
    model = ir.from_onnx_text("""
<ir_version: 10, opset_import: ["" : 18]>
g (float[2,3] x) => (float[2,2] z) <float[3,2] w = {1, 2, 3, 4, 5, 6}> { z = Einsum<equation = "ab,bc->ac">(x, w) }
""")
    Normalize()(model)
    assert [node.op_type for node in model.graph] == ["Einsum"]


SOFTMAXES = {
    "another axis": "z = Softmax<axis = 1>(x)",
    "first axis": "z = Softmax<axis = 0>(x)",
    "written out": "m = ReduceMax(x, last) d = Sub(x, m) e = Exp(d) s = ReduceSum(e, last) z = Div(e, s)",
    "not shifted": "e = Exp(x) s = ReduceSum(e, last) z = Div(e, s)",
    "turned scores": "t = Transpose<perm = [0, 2, 1]>(x) u = Mul(t, half) z = Softmax<axis = 1>(u)",
}
OTHERS = {
    "less another's largest, over another's sum": "m = ReduceMax(x, first) d = Sub(x, m) e = Exp(d) s = ReduceSum(e, last) z = Div(e, s)",
    "over the sum of the scores": "e = Exp(x) s = ReduceSum(x, last) z = Div(e, s)",
    "over all axes": "e = Exp(x) s = ReduceSum(e) z = Div(e, s)",
}
CONSTANTS = "<int64[1] last = {-1}, int64[1] first = {0}, float half = {0.5}>"


def softmax(body: str) -> tuple[ir.Model, dict[str, np.ndarray]]:
    text = f'<ir_version: 10, opset_import: ["" : 18]> g (float[2,3,4] x) => (float[a,b,c] z) {CONSTANTS} {{ {body} }}'
    return ir.from_onnx_text(text), {"x": np.random.default_rng(1).standard_normal((2, 3, 4)).astype(np.float32) * 5}


@pytest.mark.parametrize("body", SOFTMAXES.values(), ids=SOFTMAXES)
def test_a_softmax_is_over_the_last_axis(body: str) -> None:
    model, feeds = softmax(body)
    want = outputs(model, feeds)
    Normalize()(model)
    softmaxes = [node for node in model.graph if node.op_type == "Softmax"]
    assert len(softmaxes) == 1 and softmaxes[0].attributes.get_int("axis", -1) == -1
    assert not any(node.op_type == "Exp" for node in model.graph)
    np.testing.assert_allclose(outputs(model, feeds), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("body", OTHERS.values(), ids=OTHERS)
def test_what_is_no_softmax_stays(body: str) -> None:
    model, feeds = softmax(body)
    want = outputs(model, feeds)
    Normalize()(model)
    np.testing.assert_allclose(outputs(model, feeds), want, rtol=1e-6)
    softmaxes = [node for node in model.graph if node.op_type == "Softmax"]
    assert not softmaxes or body.startswith("m =")  # e^(x − c) over its sum is a softmax whatever c is, where c is the same along it
