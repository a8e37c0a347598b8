"""What PagedAttention reads after PackedRows, and that the graph computes what it did."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from octavo.custom_ops import register
from octavo.custom_ops.contract import PAGED_ATTENTION
from octavo.passes.attention.packed_rows import PackedRows

T, H, G, D = 5, 4, 2, 16
WIDTHS = (H * D, G * D, G * D)
SIZES = {"w": (64, sum(WIDTHS)), "wq": (64, 64), "wk": (64, 32), "wv": (64, 32), "n": (D,), "m": (D,), "wide": (64,), "narrow": (32,)}
SHAPES = {"sizes": WIDTHS, "q2": (-1, 64), "k2": (-1, 32), "q4": (1, -1, H, D), "k4": (1, -1, G, D), "back": (1, -1, 64), "kept": (0, -1), "other": (-1, 32)}
SPLIT = "a = MatMul(x, w) q, k, v = Split<axis = -1>(a, sizes) "
APART = "q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) "
FLAT = "fq = Reshape({q}, q2) fk = Reshape({k}, k2) fv = Reshape(v, k2) "
OP = (
    "o = ai.octavo.PagedAttention<num_heads = 4, kv_num_heads = 2, rotary_interleaved = 0>"
    "(fq, fk, fv, kc, vc, c, past, table, cos, sin, slots, , , , , , , parent) "
)
END = "r = Reshape(o, back) y = Neg(r)"
NORMS = (
    "hq = Reshape(q, q4) hk = Reshape(k, k4) nq = RMSNormalization<axis = -1, epsilon = 0.02>(hq, n) nk = RMSNormalization<axis = -1, epsilon = 0.02>(hk, m) "
)


def graph(body: str, outputs: str = "float[1,t,64] y") -> ir.Model:
    """x (1, T, 64) and the op's integers are inputs; everything else is a constant."""
    inputs = f"float[1,t,64] x, float[n,{G},{D},16] kc, float[n,{G},16,{D}] vc, int32[b] c, int32[b1] past, int32[b1,m] table, int32[t] slots, int32[t] parent"
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {name: rng.normal(len(shape) == 1, 0.3, shape).astype(np.float32) for name, shape in SIZES.items()}
    arrays |= {name: np.array(shape, np.int64) for name, shape in SHAPES.items()}
    arrays |= {name: function(np.arange(8)[:, None] / 10 ** np.arange(D // 2)).astype(np.float32) for name, function in (("cos", np.cos), ("sin", np.sin))}
    declared = [f"{'int64' if array.dtype == np.int64 else 'float'}[{','.join(map(str, array.shape))}] {name}" for name, array in arrays.items()]
    header = '<ir_version: 11, opset_import: ["" : 23, "ai.octavo" : 1]>'
    model = ir.from_onnx_text(f"{header}\ng ({', '.join([inputs, *declared])}) => ({outputs}) {{ {body} }}")
    for value in [value for value in model.graph.inputs if value.name in arrays]:
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(arrays[str(value.name)], name=value.name)
        model.graph.register_initializer(value)
    for node in model.graph:
        for value in node.outputs:
            value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
    return model


def run(model: ir.Model) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    register(options)
    session = ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(1)
    feeds = {
        "x": rng.standard_normal((1, T, 64)).astype(np.float32), "kc": np.zeros((1, G, D, 16), np.float32), "vc": np.zeros((1, G, 16, D), np.float32),
        "c": np.array([0, T], np.int32), "past": np.zeros(1, np.int32), "table": np.zeros((1, 1), np.int32), "slots": np.arange(T, dtype=np.int32),
        "parent": np.arange(-1, T - 1, dtype=np.int32),
    }
    return session.run(None, {port.name: feeds[port.name] for port in session.get_inputs()})


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def attention(model: ir.Model) -> ir.Node:
    return next(node for node in model.graph if node.op_type == "PagedAttention")


def reads(model: ir.Model, name: str) -> str | None:
    index = PAGED_ATTENTION.input_index(name)
    value = attention(model).inputs[index] if index < len(attention(model).inputs) else None
    return None if value is None else value.name


SAME_BITS = {
    "one product": (SPLIT + FLAT.format(q="q", k="k") + OP + END, ["MatMul", "PagedAttention", "Neg"]),
    "three products": (APART + FLAT.format(q="q", k="k") + OP + END, ["MatMul", "MatMul", "MatMul", "PagedAttention", "Neg"]),
    "heads apart": (SPLIT + "hq = Reshape(q, q4) hk = Reshape(k, k4) " + FLAT.format(q="hq", k="hk") + OP + END, ["MatMul", "PagedAttention", "Neg"]),
}


@pytest.mark.parametrize(("body", "expected"), SAME_BITS.values(), ids=SAME_BITS)
def test_reshapes_and_splits_go_and_no_bit_changes(body: str, expected: list[str]) -> None:
    model = graph(body)
    before = run(model)
    PackedRows()(model)
    assert ops(model) == expected
    np.testing.assert_array_equal(run(model)[0], before[0])


@pytest.mark.parametrize("start", [SPLIT, APART], ids=["one product", "three products"])
def test_norms_of_heads_go_into_the_op(start: str) -> None:
    model = graph(start + NORMS + FLAT.format(q="nq", k="nk") + OP + END)
    before = run(model)
    PackedRows()(model)
    assert not {"Reshape", "Split", "RMSNormalization"} & set(ops(model))
    assert (reads(model, "q_norm_weight"), reads(model, "k_norm_weight")) == ("n", "m")
    np.testing.assert_allclose(run(model)[0], before[0], rtol=0, atol=2e-6)
    attention(model).attributes.add(ir.AttrFloat32("qk_norm_epsilon", 1e-6))  # negative control: the epsilon is the graph's
    assert np.abs(run(model)[0] - before[0]).max() > 1e-4


def test_norms_that_were_taken_heads_first() -> None:
    first = NORMS.replace("nq = ", "tq = Transpose<perm = [0, 2, 1, 3]>(hq) mq = ").replace("nk = ", "tk = Transpose<perm = [0, 2, 1, 3]>(hk) mk = ")
    first = first.replace("(hq, n)", "(tq, n)").replace("(hk, m)", "(tk, m)")
    back = "nq = Transpose<perm = [0, 2, 1, 3]>(mq) nk = Transpose<perm = [0, 2, 1, 3]>(mk) "
    model = graph(SPLIT + first + back + FLAT.format(q="nq", k="nk") + OP + END)
    before = run(model)
    PackedRows()(model)
    assert ops(model) == ["MatMul", "PagedAttention", "Neg"]
    np.testing.assert_allclose(run(model)[0], before[0], rtol=0, atol=2e-6)
    mixed = graph(SPLIT + first + FLAT.format(q="mq", k="mk") + OP + END)  # negative control: without the way back, other elements
    before = run(mixed)
    PackedRows()(mixed)
    assert ops(mixed).count("RMSNormalization") == 2
    np.testing.assert_array_equal(run(mixed)[0], before[0])


STAYS = {
    "norm of all heads": "nq = RMSNormalization<axis = -1>(q, wide) nk = RMSNormalization<axis = -1>(k, narrow) " + FLAT.format(q="nq", k="nk") + OP + END,
    "two epsilons": NORMS.replace("0.02>(hk", "0.03>(hk") + FLAT.format(q="nq", k="nk") + OP + END,
    "query alone": NORMS.split("hk", maxsplit=1)[0] + "nq = RMSNormalization<axis = -1>(hq, n) " + FLAT.format(q="nq", k="k") + OP + END,
    "others read the norm": NORMS + "e = ReduceMax<keepdims = 0>(nq) " + FLAT.format(q="nq", k="nk") + OP + "z = Reshape(o, back) y = Mul(z, e)",
    "after a nonlinearity": "t = Tanh(q) " + FLAT.format(q="t", k="k") + OP + END,
}


@pytest.mark.parametrize("body", STAYS.values(), ids=STAYS)
def test_what_is_not_the_ops_norm_stays_in_the_graph(body: str) -> None:
    model = graph(SPLIT + body)
    before, kept = run(model), [op for op in ops(model) if op not in ("Reshape", "Split")]
    PackedRows()(model)
    assert [op for op in ops(model) if op not in ("Reshape", "Split")] == kept and "Split" in ops(model)
    assert reads(model, "q_norm_weight") is None and reads(model, "key") is not None
    np.testing.assert_array_equal(run(model)[0], before[0])


OTHERWISE = {
    "in another order": SPLIT.replace("q, k, v", "q, v, k"),
    "read elsewhere too": SPLIT + "e = Neg(v) ",
}


@pytest.mark.parametrize("start", OTHERWISE.values(), ids=OTHERWISE)
def test_a_split_that_is_not_query_key_value_alone_stays(start: str) -> None:
    body = start + FLAT.format(q="q", k="k") + OP + ("z = Reshape(o, back) s = ReduceMax<keepdims = 0>(e) y = Mul(z, s)" if "Neg" in start else END)
    model = graph(body)
    before = run(model)
    PackedRows()(model)
    assert "Split" in ops(model) and reads(model, "query") == "q" and reads(model, "value") == "v"
    np.testing.assert_array_equal(run(model)[0], before[0])


def test_whoever_minds_the_outputs_rank_keeps_it() -> None:
    """A Reshape that copies a dimension, and one to another shape."""
    model = graph(SPLIT + FLAT.format(q="q", k="k") + OP + "y = Reshape(o, kept)", "float[t,64] y")
    before = run(model)
    PackedRows()(model)
    np.testing.assert_array_equal(run(model)[0], before[0])
    model = graph(SPLIT + FLAT.format(q="q", k="k") + OP + "y = Reshape(o, other)", "float[s,32] y")
    before = run(model)
    PackedRows()(model)
    assert ops(model) == ["MatMul", "PagedAttention", "Reshape"]
    np.testing.assert_array_equal(run(model)[0], before[0])
