"""QuantLinear and QuantEmbedding: bit for bit what the reference says, whatever a row's company, the threads, or the cut of the work."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from attention_run import same_bits
from octavo.custom_ops.packing import QuantizedWeight
from octavo.custom_ops.quant_reference import quantize_rows, rms_norm
from onnx import TensorProto, helper
from quant_cases import QUANT_CASES, QuantCase, only, reference_of, run_embedding, run_quant

Array = np.ndarray


def _case(name: str) -> QuantCase:
    return next(c for c in QUANT_CASES if c.name == name)


@pytest.mark.parametrize("case", QUANT_CASES, ids=lambda c: c.name)
def test_kernels_are_the_reference_bit_for_bit(case: QuantCase) -> None:
    """All but the gates, whose polynomials stay within a few units in the last place."""
    inputs = case.build()
    got, expected = run_quant(case, inputs), reference_of(case, inputs)
    assert got.output.shape == (*case.rows, case.M) and np.isfinite(got.output).all()
    assert same_bits(got.sum, expected.sum)
    if case.gate == "none":
        assert same_bits(got.output, expected.output)
    else:
        np.testing.assert_allclose(got.output, expected.output, rtol=0, atol=case.tolerance(inputs))


@pytest.mark.parametrize("gate", ["silu", "gelu", "gelu_tanh"])
def test_gates_over_their_whole_range(gate: str) -> None:
    """The gate's sum is the bias alone, the values' is 1: what comes out is the gate itself. The exponential of an argument of up to 87 that was
    rounded once or twice is off by up to 87 · 1.5 eps; below exp(−87) the result is 0.
    """
    from octavo.custom_ops.quant_reference import activate

    x = np.concatenate([np.linspace(-12, 12, 2001), [-1e4, -100, -88, -0.0, 0.0, 1e-30, 100, 1e4]]).astype(np.float32)
    case = QuantCase("gate_range", K=32, M=x.size, gate=gate, rows=(1,), parts=("bias",))
    inputs = {"input": np.zeros((1, 32), np.float32), "bias": np.concatenate([x, np.ones_like(x)])}
    got, expected = run_quant(case, inputs).output[0], activate(gate, x)
    np.testing.assert_allclose(got, expected, rtol=1.6e-5, atol=1e-33)
    near = np.abs(x) < 2
    np.testing.assert_allclose(got[near], expected[near], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "name", ["rows130_none_a8", "rows130_uint8_a8", "rows130_float_a32", "everything_bytes", "many_panels", "bytes_rows50", "static_rows130"]
)
def test_a_row_alone_equals_the_same_in_company(name: str) -> None:
    case = _case(name)
    inputs = case.build()
    together = run_quant(case, inputs).output
    rows = together.shape[0]
    cuts = [(0, 1), (rows - 1, rows), (3, 5), (7, 16), (1, 49), (2, 50), (rows // 2, rows)]
    for begin, end in cuts:
        part, picked = only(case, inputs, slice(begin, end))
        assert same_bits(run_quant(part, picked).output, together[begin:end]), (begin, end)


@pytest.mark.parametrize("case", [c for c in QUANT_CASES if c.rows and c.rows[0] in (1, 9, 23, 70, 130)], ids=lambda c: c.name)
def test_two_threads_equal_one(case: QuantCase) -> None:
    inputs = case.build()
    one, two = run_quant(case, inputs, threads=1), run_quant(case, inputs, threads=2)
    assert same_bits(one.output, two.output) and same_bits(one.sum, two.sum)


def test_one_wide_product_over_two_threads() -> None:
    """Many work items, most of them taken by chance."""
    case = QuantCase("wide", K=576, M=4000, rows=(1,))
    inputs = case.build()
    expected = run_quant(case, inputs, threads=1).output
    for _ in range(20):
        assert same_bits(run_quant(case, inputs, threads=2).output, expected)


def test_merged_linears_equal_their_parts() -> None:
    """Outputs side by side in one weight, as QKV: each keeps its bits."""
    case = QuantCase("merged", M=48, rows=(5,))
    whole, inputs = case.weight(), case.build()
    together = run_quant(case, inputs).output

    class Part(QuantCase):
        def weight(self) -> QuantizedWeight:
            return QuantizedWeight(whole.q[10:37], whole.scales[10:37], 4, 32)

    assert same_bits(run_quant(Part("part", M=27, rows=(5,)), inputs).output, np.ascontiguousarray(together[:, 10:37]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("activation_bits", "parts"), [(8, ()), (8, ("activation_scale",)), (32, ())])
def test_what_is_no_number_stays_none_and_stays_in_its_row(bad: float, activation_bits: int, parts: tuple[str, ...]) -> None:
    case = QuantCase("not_a_number", rows=(10,), activation_bits=activation_bits, parts=parts)
    inputs = case.build()
    sound = run_quant(case, inputs).output
    inputs["input"][4, 50] = bad
    got = run_quant(case, inputs).output
    assert not np.isfinite(got[4]).any()
    others = np.arange(10) != 4
    assert same_bits(got[others], sound[others])
    if activation_bits == 8:
        assert np.isnan(got[4]).all()


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 2.0**-121, 2.0**-119, 1e-30, 1e30, 3e38])
def test_small_and_large_groups(magnitude: float) -> None:
    case = QuantCase("magnitudes", rows=(2,), scale="float32")
    inputs = case.build()
    inputs["input"] = np.sign(inputs["input"]) * np.float32(magnitude)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = reference_of(case, inputs).output
    got = run_quant(case, inputs).output
    same = same_bits(np.where(np.isnan(got), 0, got), np.where(np.isnan(expected), 0, expected))
    assert same and (np.isnan(got) == np.isnan(expected)).all()
    assert magnitude >= 2.0**-119 or (got == 0).all()


def test_activations_round_to_nearest_even_and_lose_half_a_step() -> None:
    x = np.random.default_rng(0).standard_normal((50, 256)).astype(np.float32)
    q, scale = quantize_rows(x, 64)
    assert np.abs(q).max() == 127 and q.min() >= -127
    back = q.astype(np.float64) * scale[:, :, None]
    assert (np.abs(back.reshape(50, 256) - x) <= np.repeat(scale, 64, axis=1) * 0.5001).all()
    halves = np.concatenate([[127.0], np.arange(63) + 0.5]).astype(np.float32)[None]
    assert quantize_rows(halves, 64)[0][0, 0, 1:5].tolist() == [0, 2, 2, 4]


def test_given_scales_round_to_nearest_even_and_saturate() -> None:
    """What lies within 127 steps loses half a step at most; what lies beyond becomes the last step. The row's own scales, given, change next to nothing."""
    x = np.random.default_rng(2).standard_normal((50, 256)).astype(np.float32)
    given = np.array([0.5, 0.02, 0.003, 1e-30], np.float32)
    q, scale = quantize_rows(x, 64, given)
    assert (scale == given).all() and np.abs(q[:, 3]).min() == 127
    groups, back = x.reshape(50, 4, 64).astype(np.float64), q.astype(np.float64) * given[:, None]
    inside = np.abs(groups) <= 127 * given[:, None]
    assert 0 < inside[:, 2].mean() < 1 and inside[:, 0].all()
    assert (np.abs(back - groups) <= given[:, None] * 0.5001)[inside].all()
    assert (back == np.sign(groups) * 127 * given[:, None].astype(np.float64))[~inside & (np.abs(groups) > 127.5 * given[:, None])].all()
    halves = np.array([-1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 127.5, 1e9] * 4, np.float32)[None]
    assert quantize_rows(halves, 32, np.ones(1, np.float32))[0][0, 0, :8].tolist() == [-2, 0, 0, 2, 2, 126, 127, 127]
    own, of_row = quantize_rows(x[:1], 64)
    assert np.abs(quantize_rows(x[:1], 64, of_row[0])[0].astype(int) - own).max() <= 1


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-30, 1e30, 3e38])
def test_given_scales_take_values_of_every_size(magnitude: float) -> None:
    case = QuantCase("static_magnitudes", rows=(2,), parts=("activation_scale",))
    inputs = case.build()
    inputs["input"] = np.sign(inputs["input"]) * np.float32(magnitude)
    inputs["activation_scale"][:] = np.array([2.0**-120, 1e-30, 1e-3, 1, 1e30, 3e38], np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = reference_of(case, inputs).output
    assert same_bits(run_quant(case, inputs).output, expected)


def test_norm_is_rms_norm() -> None:
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((7, 96)).astype(np.float32), rng.standard_normal(96).astype(np.float32)
    exact = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-5) * w
    np.testing.assert_allclose(rms_norm(x, w, 1e-5), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero", ["none", "uint8", "float"])
@pytest.mark.parametrize("scale", ["float16", "float32"])
def test_embedding_gives_the_values_exactly(bits: int, zero: str, scale: str) -> None:
    weight = QuantCase(f"embedding{bits}{zero}{scale}", M=45, bits=bits, zero=zero, scale=scale).weight()
    ids = np.array([[0, 44, 3], [16, 15, 3]])
    assert same_bits(run_embedding(weight, ids), weight.dequantize()[ids])
    assert run_embedding(weight, np.zeros((2, 0), np.int64)).shape == (2, 0, 192)
    assert run_embedding(weight, np.array(7)).shape == (192,)
    for bad in (-1, 45):
        with pytest.raises(Exception, match=f"QuantEmbedding.*ids.*{bad}"):
            run_embedding(weight, np.array([0, bad]))


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("zero", ["none", "uint8"])
def test_values_are_those_of_onnxruntimes_own_op(group: int, zero: str) -> None:
    """MatMulNBits with float activations over the same 4-bit weights: K products of magnitude x·w in another order."""
    case = QuantCase(f"oracle{group}{zero}", K=256, M=48, group=group, zero=zero, scale="float32", activation_bits=32, rows=(6,))
    weight, inputs = case.weight(), case.build()
    got = run_quant(case, inputs).output
    x = inputs["input"].astype(np.float64)
    slack = 256 * np.finfo(np.float32).eps * (np.abs(x) @ np.abs(weight.dequantize().astype(np.float64)).T)
    assert (np.abs(got - _matmul_nbits(weight, inputs["input"])) <= slack).all()
    # Rounding activations to int8 moves a sum by at most half a step for each of its products.
    rounded = run_quant(QuantCase(**{**case.__dict__, "activation_bits": 8}), inputs).output
    step = np.repeat(quantize_rows(inputs["input"], group)[1], group, axis=1) * 0.5001
    assert (np.abs(rounded - got) <= step @ np.abs(weight.dequantize()).T + 2 * slack).all()


def _matmul_nbits(weight: QuantizedWeight, x: Array) -> Array:
    N, K = weight.q.shape
    blocks = weight.q.reshape(N, K // weight.group_size, -1)
    arrays = {"B": blocks[:, :, ::2] | blocks[:, :, 1::2] << 4, "scales": weight.scales.astype(np.float32)}
    if weight.zero_points is not None:
        arrays["zero_points"] = weight.zero_points[:, ::2] | weight.zero_points[:, 1::2] << 4
    node = helper.make_node("MatMulNBits", ["A", *arrays], ["Y"], domain="com.microsoft", K=K, N=N, bits=4, block_size=weight.group_size, accuracy_level=0)
    graph = helper.make_graph(
        [node],
        "oracle",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
        initializer=[
            helper.make_tensor(n, TensorProto.UINT8 if a.dtype == np.uint8 else TensorProto.FLOAT, a.shape, a.tobytes(), raw=True)
            for n, a in arrays.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)], ir_version=9)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"A": x})[0]
