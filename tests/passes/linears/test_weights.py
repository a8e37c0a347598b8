"""What is stored quantized comes in exactly, is rounded again only when narrower is asked for, and every choice is told."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import constants, ops, quantize, run, written
from octavo.custom_ops.packing import QuantizedWeight, WeightFormat, unpack
from octavo.custom_ops.quant_reference import quant_linear
from octavo.passes.linears.precision import Precision
from octavo.passes.normalize import FoldDequantize, Normalize
from octavo.passes.outcome import Outcome
from octavo.passes.quantize.stored import Stored, find_stored

ROWS = np.random.default_rng(5).normal(size=(6, 64)).astype(np.float32)


def dequantizing(dtype: str = "INT4", *, half: bool = True) -> tuple[ir.Model, dict[str, Stored], np.ndarray]:
    """y = x·W with W in blocks, the other linear z = x·V in float; folded as the compiler does. And W's floats [K, M]."""
    rng = np.random.default_rng(0)
    model = written(
        "w = DequantizeLinear<axis = 0, block_size = 32>(q, s) b = Reshape(w, apart) a = Add(b, m) t = Reshape(a, whole) y = MatMul(x, t) z = MatMul(x, v)"
        if dtype == "UINT4" else "w = DequantizeLinear<axis = 0, block_size = 32>(q, s) y = MatMul(x, w) z = MatMul(x, v)",
        {"v": (64, 32)}, "float[n,48] y, float[n,32] z",
    )
    low, high = {"INT4": (-8, 7), "UINT4": (0, 15), "INT8": (-128, 127)}[dtype]
    scale, minimum = rng.uniform(0.01, 0.1, (2, 48)).astype(np.float32), rng.normal(size=(2, 1, 48)).astype(np.float32)
    if half:
        scale, minimum = scale.astype(np.float16).astype(np.float32), minimum.astype(np.float16).astype(np.float32)
    element = ir.DataType[dtype]
    integers = rng.integers(low, high + 1, (64, 48)).astype(element.numpy())
    constants(model, {
        "q": ir.Tensor(integers, dtype=element), "s": ir.Tensor(scale), "m": ir.Tensor(minimum),
        "apart": ir.Tensor(np.array([2, 32, 48])), "whole": ir.Tensor(np.array([64, 48])),
    })
    Normalize()(model)
    stored = find_stored(model)
    FoldDequantize()(model)
    name = str(next(node for node in model.graph if node.op_type == "MatMul").inputs[1].name)
    return model, stored, model.graph.initializers[name].const_value.numpy()


def packed(model: ir.Model, **fmt: object) -> QuantizedWeight:
    value = next(node for node in model.graph if node.op_type == "QuantLinear").inputs[1]
    return unpack(value.const_value.numpy(), WeightFormat(64, 48, **fmt))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "asked", "fmt"),
    [
        ("INT4", "stored", {}), ("INT4", "int4", {}), ("INT4", "int8", {}), ("UINT4", "int4", {"zero_point": "float"}),
        ("INT8", "stored", {"bits": 8}), ("INT8", "int8", {"bits": 8}),
    ],
)
def test_what_is_stored_is_kept_bit_for_bit(dtype: str, asked: Precision, fmt: dict) -> None:
    """Also where more bits were allowed: they would hold the same values."""
    model, stored, floats = dequantizing(dtype)
    outcome = quantize(model, {"head": asked, "head.1": "fp32"}, stored=stored)
    assert np.array_equal(packed(model, **fmt).dequantize(), floats.T) and ops(model) == ["QuantLinear", "MatMul"]
    assert outcome.notes[0].endswith("exactly as stored: 1 (head)") and not outcome.refusals
    y, _ = run(model, {"x": ROWS})
    np.testing.assert_array_equal(y, quant_linear(packed(model, **fmt), input=ROWS).output)


def test_what_is_not_stored_stays_float() -> None:
    model, stored, _ = dequantizing()
    assert quantize(model, {"*": "stored"}, stored=stored).rewritten == 1 and ops(model) == ["QuantLinear", "MatMul"]


def test_narrower_is_rounded_again_and_told() -> None:
    model, stored, floats = dequantizing("INT8")
    outcome = quantize(model, {"head": "int4", "head.1": "fp32"}, stored=stored)
    assert outcome.notes[0] == "int4 in groups of 32, symmetric, quantized again: 1 (head)"
    found = packed(model).dequantize()
    assert 0 < np.abs(found - floats.T).max() < 2.0  # a step at most: the largest weight is 12.8 and lies on level 8


def inexact() -> tuple[ir.Model, dict[str, Stored], np.ndarray]:
    """scale·q + minimum with float32 numbers: the graph rounds twice, the op once."""
    return dequantizing("UINT4", half=False)


def test_what_cannot_be_kept_exactly_stays_float_or_is_rounded_again() -> None:
    def refused(outcome: Outcome) -> list[str]:
        return [refusal.reason for refusal in outcome.refusals]

    reason = "stored quantized, but the graph's arithmetic rounds otherwise"
    model, stored, floats = inexact()
    outcome = quantize(model, {"*": "stored"}, stored=stored)
    assert refused(outcome) == [reason] and ops(model) == ["MatMul", "MatMul"]
    model, stored, floats = inexact()
    outcome = quantize(model, {"head": "int8", "head.1": "fp32"}, stored=stored)
    assert refused(outcome) == [reason] and "quantized again" in outcome.notes[0]
    assert np.abs(packed(model, bits=8).dequantize() - floats.T).max() < 0.02


def nbits(extra: str = "") -> ir.Model:
    rng = np.random.default_rng(0)
    model = written(f"p = com.microsoft.MatMulNBits<K = 64, N = 48, bits = 4, block_size = 32{extra}>(x, q, s) y = Add(p, b)", {"b": (48,)})
    return constants(model, {
        "q": ir.Tensor(rng.integers(0, 256, (48, 2, 16)).astype(np.uint8)), "s": ir.Tensor(rng.uniform(0.01, 0.1, (48, 2)).astype(np.float32)),
    })


def test_matmul_nbits_becomes_the_op() -> None:
    model = nbits()
    before = run(model, {"x": ROWS})[0]
    outcome = quantize(model, {"*": "stored"}, activation_bits=32)
    assert ops(model) == ["QuantLinear"] and outcome.notes[0] == "int4 in groups of 32, symmetric, exactly as stored: 1 (head)"
    np.testing.assert_allclose(run(model, {"x": ROWS})[0], before, atol=1e-5 * np.abs(before).max())


def test_matmul_nbits_that_shall_be_float_stays_and_is_told() -> None:
    model = nbits()
    outcome = quantize(model, {"*": "fp32"})
    assert ops(model) == ["MatMulNBits", "Add"] and "stays MatMulNBits" in outcome.refusals[0].reason


def test_matmul_nbits_that_the_op_cannot_have_stays() -> None:
    model = nbits()
    node = next(iter(model.graph))
    node.attributes["block_size"] = ir.AttrInt64("block_size", 16)
    model.graph.initializers["s"].const_value = ir.Tensor(np.full((48, 4), 0.1, np.float32))
    outcome = quantize(model, {"*": "int4"})
    assert ops(model)[0] == "MatMulNBits" and "blocks of 16" in outcome.refusals[0].reason
