"""Checkpoints of GPTQ and AWQ, unpacked by the graph: the weights become constants of the graph's own bits, and the integers are found in them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from octavo.custom_ops import register
from octavo.passes.fold_weights import FoldWeights
from octavo.passes.linears.lower_quant import QuantizeLinears
from octavo.passes.linears.weights import WeightPlan
from octavo.passes.normalize import FoldDequantize, Normalize
from octavo.passes.quantize.methods import quantizer

K, M, G = 128, 96, 32
# As torch writes x >> n of int32: a logical shift of the unsigned bits, the sign's ones put back where it was set. Masks make the latter moot.
GPTQ = """
    u = Cast<to = 12>(qweight) u3 = Unsqueeze(u, one) shifts = BitShift<direction = "RIGHT">(u3, rows) w8 = Cast<to = 6>(shifts)
    w4 = BitwiseAnd(w8, mask) q = Reshape(w4, k_m)
    v = Cast<to = 12>(qzeros) v3 = Unsqueeze(v, two) zshifts = BitShift<direction = "RIGHT">(v3, columns) z8 = Cast<to = 6>(zshifts)
    z4 = BitwiseAnd(z8, mask) z1 = Add(z4, unit) z = Reshape(z1, groups_m)
    zeros = Gather<axis = 0>(z, g_idx) s = Gather<axis = 0>(scales, g_idx) n = Sub(q, zeros) f = Cast<to = 1>(n) w = Mul(s, f)
"""
AWQ = """
    u = Cast<to = 12>(qweight) u3 = Unsqueeze(u, two) shifts = BitShift<direction = "RIGHT">(u3, columns) w8 = Cast<to = 6>(shifts)
    w1 = Reshape(w8, k_m) w2 = Gather<axis = 1>(w1, order) q = BitwiseAnd(w2, mask)
    v = Cast<to = 12>(qzeros) v3 = Unsqueeze(v, two) zshifts = BitShift<direction = "RIGHT">(v3, columns) z8 = Cast<to = 6>(zshifts)
    z1 = Reshape(z8, groups_m) z2 = Gather<axis = 1>(z1, order) z3 = BitwiseAnd(z2, mask)
    z4 = Unsqueeze(z3, one) z5 = Expand(z4, repeats) zeros = Reshape(z5, k_m)
    s4 = Unsqueeze(scales, one) s5 = Expand(s4, repeats) s = Reshape(s5, k_m) n = Sub(q, zeros) f = Cast<to = 1>(n) w = Mul(f, s)
"""


def _model(body: str, product: str = "y = MatMul(x, w)", **changes: np.ndarray) -> ir.Model:
    rng = np.random.default_rng(0)
    packed = {"qweight": (K // 8, M), "qzeros": (K // G, M // 8)} if body is GPTQ else {"qweight": (K, M // 8), "qzeros": (K // G, M // 8)}
    constants = {name: rng.integers(-(2**31), 2**31, shape).astype(np.int32) for name, shape in packed.items()}
    constants["qzeros"] &= 0x77777777       # GPTQ adds 1: a zero point of 16 would not fit
    constants |= {
        "scales": rng.uniform(0.001, 0.01, (K // G, M)).astype(np.float16).astype(np.float32), "g_idx": np.arange(K) // G,
        "rows": np.arange(0, 32, 4, dtype=np.uint32)[None, :, None], "columns": np.arange(0, 32, 4, dtype=np.uint32)[None, None],
        "mask": np.array(15, np.int32), "unit": np.array(1, np.int32), "one": np.array([1]), "two": np.array([2]), "k_m": np.array([K, M]),
        "groups_m": np.array([K // G, M]), "repeats": np.array([K // G, G, M]),
        "order": (np.arange(M).reshape(-1, 8)[:, [0, 4, 1, 5, 2, 6, 3, 7]]).reshape(-1), **changes,
    }
    model = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["" : 20]> g (float[n,{K}] x) => (float[n,{M}] y) {{ {body} {product} }}')
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model, data_prop=True))


def _run(model: ir.Model) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    register(options)
    session = ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": np.random.default_rng(1).normal(size=(5, K)).astype(np.float32)})[0])


def _fold(model: ir.Model) -> int:
    for stage in (Normalize(), FoldDequantize()):
        stage(model)
    return FoldWeights()(model).outcome.rewritten


@pytest.mark.parametrize("body", [GPTQ, AWQ], ids=["GPTQ", "AWQ"])
@pytest.mark.parametrize("product", ["y = MatMul(x, w)", "t = Transpose<perm = [1, 0]>(w) y = Gemm<transB = 1>(x, t)"], ids=["plain", "turned"])
def test_a_checkpoint_that_the_graph_unpacks_is_kept_to_the_bit(body: str, product: str) -> None:
    before = _run(_model(body, product))
    model = _model(body, product)
    assert _fold(model) == 1
    assert {node.op_type for node in model.graph} <= {"MatMul", "Gemm", "Transpose"}
    np.testing.assert_array_equal(_run(model), before)
    outcome = QuantizeLinears(WeightPlan({"*": "stored"}, 32, quantizer("rtn"), activation_bits=32), {}, "")(model).outcome
    assert [node.op_type for node in model.graph] == ["QuantLinear"] and outcome.notes[0].startswith("int4 in groups of 32, with zero points, exactly")
    np.testing.assert_allclose(_run(model), before, rtol=0, atol=2e-6 * np.abs(before).max())


def test_inputs_in_another_order_are_folded_and_stay_float() -> None:
    """GPTQ with activation order: groups are no runs of inputs."""
    model = _model(GPTQ, g_idx=np.random.default_rng(2).permutation(np.arange(K) // G))
    before = _run(model)
    assert _fold(model) == 1
    np.testing.assert_array_equal(_run(model), before)
    assert QuantizeLinears(WeightPlan({"*": "stored"}, 32, quantizer("rtn")), {}, "")(model).outcome.rewritten == 0


def test_what_makes_much_of_little_or_follows_from_an_input_is_left() -> None:
    body = "s = Slice(w0, zero, thirty, zero) w = Expand(s, k_m)"
    model = _model(body, "y = MatMul(x, w)", w0=np.ones((1, M), np.float32), zero=np.array([0]), thirty=np.array([1]))
    assert _fold(model) == 0
    model = _model("h = ReduceMean<keepdims = 0>(x, zero) h2 = Unsqueeze(h, one) e = MatMul(h2, row) w = Add(e, w0)", "y = MatMul(x, w)",
                   zero=np.array([0]), row=np.ones((1, M), np.float32), w0=np.ones((K, M), np.float32))
    assert _fold(model) == 0
