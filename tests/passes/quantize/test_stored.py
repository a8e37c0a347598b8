"""Stored weights are read exactly: the floats of the graph itself, as onnxruntime computes them unfused, are the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from octavo.custom_ops.packing import QuantizedWeight
from octavo.passes.normalize import FoldDequantize, Normalize
from octavo.passes.outcome import Refusal
from octavo.passes.quantize.grid import on_grid
from octavo.passes.quantize.groups import scheme_of
from octavo.passes.quantize.stored import find_stored, read_nbits, same_values
from onnx import TensorProto, helper, numpy_helper

M, K = 48, 128
RANGES = {"INT4": (-8, 7), "UINT4": (0, 15), "INT8": (-128, 127), "UINT8": (0, 255), "INT2": (-2, 1), "UINT2": (0, 3)}


@dataclass
class Graph:
    """Collects the constants and nodes of y = MatMul(x, W)."""

    nodes: list[onnx.NodeProto]
    constants: list[onnx.TensorProto]

    def constant(self, name: str, values: Any, dtype: str = "FLOAT") -> str:
        array = np.asarray(values)
        self.constants.append(helper.make_tensor(name, TensorProto.DataType.Value(dtype), array.shape, array.reshape(-1).tolist()))
        return name

    def op(self, op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [output], **attributes))
        return output

    def model(self, weight: str) -> ir.Model:
        product = helper.make_node("MatMul", ["x", weight], ["y"])
        graph = helper.make_graph(
            [*self.nodes, product], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", K])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", M])], self.constants,
        )
        return ir.serde.deserialize_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)], ir_version=13))


def dequantized(dtype: str, *, block: int = 0, axis: int = 0, zero: str = "", scales: str = "block", shape: tuple[int, int] = (K, M), seed: int = 0) -> Graph:
    """A DequantizeLinear called `w`. `scales`: a number a block, a `channel` (along `axis`), or one for the whole `tensor`."""
    rng, (low, high) = np.random.default_rng(seed), RANGES[dtype]
    few: tuple[int, ...] = tuple(size // block if i == axis else size for i, size in enumerate(shape)) if scales == "block" else ()
    few = (shape[axis],) if scales == "channel" else few
    graph = Graph([], [])
    inputs = [graph.constant("q", rng.integers(low, high + 1, shape), dtype), graph.constant("s", rng.uniform(-0.1, 0.1, few).astype(np.float32))]
    if zero:
        inputs.append(graph.constant("z", rng.integers(low, high + 1, few) if zero == "varied" else np.full(few, int(zero)), dtype))
    graph.op("DequantizeLinear", inputs, "w", axis=axis, **({"block_size": block} if block else {}))
    return graph


def read(model: ir.Model, inner: int = 0) -> tuple[QuantizedWeight | Refusal, np.ndarray]:
    """The one stored weight of a model, and its floats as onnxruntime has them, [M, K]."""
    Normalize()(model)
    stored = find_stored(model)
    FoldDequantize()(model)
    name = str(next(node for node in model.graph if node.op_type == "MatMul").inputs[1].name)
    floats = model.graph.initializers[name].const_value.numpy()
    return stored[name].load(inner), floats.T if inner == 0 else floats


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "Q4_0": ({"dtype": "INT4", "block": 32}, "int4 in groups of 32, symmetric"),
    "Q8_0": ({"dtype": "INT8", "block": 32}, "int8 in groups of 32, symmetric"),
    "zero points, signed": ({"dtype": "INT4", "block": 64, "zero": "varied"}, "int4 in groups of 64, with zero points"),
    "zero points, unsigned": ({"dtype": "UINT4", "block": 128, "zero": "varied"}, "int4 in groups of 128, with zero points"),
    "zero points, a byte": ({"dtype": "UINT8", "block": 32, "zero": "varied"}, "int8 in groups of 32, with zero points"),
    "one zero point is the middle": ({"dtype": "UINT4", "block": 32, "zero": "8"}, "int4 in groups of 32, symmetric"),
    "one zero point elsewhere": ({"dtype": "UINT4", "block": 32, "zero": "3"}, "int4 in groups of 32, with zero points"),
    "unsigned from 0": ({"dtype": "UINT4", "block": 32}, "int4 in groups of 32, with zero points"),
    "two bits": ({"dtype": "INT2", "block": 32}, "int4 in groups of 32, symmetric"),
    "two bits, unsigned, zero points": ({"dtype": "UINT2", "block": 32, "zero": "varied"}, "int4 in groups of 32, with zero points"),
    "two bits about 2": ({"dtype": "UINT2", "block": 32, "zero": "2"}, "int4 in groups of 32, symmetric"),
    "per output": ({"dtype": "INT8", "scales": "channel", "axis": 1}, "int8 in groups of 128, symmetric"),
    "per output, zero points": ({"dtype": "UINT8", "scales": "channel", "axis": 1, "zero": "varied"}, "int8 in groups of 128, with zero points"),
    "per tensor": ({"dtype": "INT8", "scales": "tensor"}, "int8 in groups of 128, symmetric"),
    "per tensor, zero point": ({"dtype": "UINT8", "scales": "tensor", "zero": "131"}, "int8 in groups of 128, with zero points"),
}


@pytest.mark.parametrize(("spelling", "scheme"), CASES.values(), ids=CASES.keys())
def test_dequantize_linear(spelling: dict[str, Any], scheme: str) -> None:
    found, floats = read(dequantized(**spelling).model("w"))
    assert isinstance(found, QuantizedWeight), found
    assert str(scheme_of(found)) == scheme and np.array_equal(found.dequantize(), floats) and floats.any()


def test_a_weight_with_outputs_first() -> None:
    """As a table of embeddings lies, or a weight under a Transpose."""
    graph = dequantized("INT4", block=32, axis=1, shape=(M, K))
    graph.op("Transpose", ["w"], "t", perm=[1, 0])
    model = graph.model("t")
    Normalize()(model)
    stored = find_stored(model)
    FoldDequantize()(model)
    found, floats = stored["w"].load(1), model.graph.initializers["w"].const_value.numpy()
    assert isinstance(found, QuantizedWeight) and np.array_equal(found.dequantize(), floats) and floats.shape == (M, K)


def with_minimum(*, half: bool = True, operator: str = "Add", swapped: bool = False, block: int = 32) -> Graph:
    """Q4_1 as the GGUF import spells it: float16 numbers in float32."""
    graph, rng = dequantized("UINT4", block=block), np.random.default_rng(1)
    minimum = rng.normal(0, 0.3, (K // block, 1, M)).astype(np.float32)
    if half:
        minimum = minimum.astype(np.float16).astype(np.float32)
        graph.constants[1] = numpy_helper.from_array(numpy_helper.to_array(graph.constants[1]).astype(np.float16).astype(np.float32), "s")
    graph.op("Reshape", ["w", graph.constant("apart", [K // block, block, M], "INT64")], "blocks")
    operands = ["blocks", graph.constant("m", minimum)]
    graph.op(operator, operands[::-1] if swapped else operands, "shifted")
    graph.op("Reshape", ["shifted", graph.constant("whole", [K, M], "INT64")], "out")
    return graph


@pytest.mark.parametrize("spelling", [{}, {"operator": "Sub"}, {"swapped": True}, {"block": 64}], ids=str)
def test_minimums(spelling: dict[str, Any]) -> None:
    found, floats = read(with_minimum(**spelling).model("out"))
    assert isinstance(found, QuantizedWeight) and found.scale_type == "float16"
    assert scheme_of(found).zero_point == "float" and np.array_equal(found.dequantize(), floats)


def test_minimums_that_the_graph_rounds_twice_are_told_apart() -> None:
    """scale·q needs more than 24 bits, so the graph's two roundings are not the op's one."""
    found, floats = read(with_minimum(half=False).model("out"))
    assert isinstance(found, QuantizedWeight) and not same_values(found, floats)
    assert np.abs(found.dequantize() - floats).max() < 1e-6


@pytest.mark.parametrize(
    ("spelling", "reason"),
    [
        ({"dtype": "INT4", "block": 16}, "blocks of 16 over 128 inputs are not made of groups of 32"),
        ({"dtype": "INT8", "scales": "channel", "axis": 0}, "each input has a scale of its own"),
        ({"dtype": "INT8", "block": 16, "axis": 1}, "its blocks run over outputs"),
    ],
)
def test_what_has_no_such_groups_is_refused(spelling: dict[str, Any], reason: str) -> None:
    found, _ = read(dequantized(**spelling).model("w"))
    assert isinstance(found, Refusal) and found.reason == reason


def test_other_arithmetic_on_weights_is_not_read() -> None:
    graph = dequantized("INT4", block=32)
    graph.op("Mul", ["w", graph.constant("f", np.ones((K, 1)))], "out")
    model = graph.model("out")
    Normalize()(model)
    assert list(find_stored(model)) == ["w"]  # what is multiplied is known; the product is not


def nbits(bits: int, block: int, zeros: str, K: int = K, **extra: Any) -> tuple[ir.Model, onnx.ModelProto]:
    rng = np.random.default_rng(bits + block)
    blocks = -(-K // block)
    constants = [
        numpy_helper.from_array(rng.integers(0, 256, (M, blocks, block * bits // 8)).astype(np.uint8), "b"),
        numpy_helper.from_array(rng.uniform(0.01, 0.1, (M, blocks)).astype(np.float32), "s"),
    ]
    inputs = ["x", "b", "s"]
    if zeros == "packed":
        constants.append(numpy_helper.from_array(rng.integers(0, 256, (M, -(-blocks * bits // 8))).astype(np.uint8), "z"))
        inputs.append("z")
    elif zeros:
        levels = rng.integers(0, 1 << bits, (M, blocks)) + (0.25 if zeros == "fractions" else 0)
        constants[1] = numpy_helper.from_array(numpy_helper.to_array(constants[1]).astype(np.float16).astype(np.float32), "s")
        constants.append(numpy_helper.from_array(levels.astype(np.float32), "z"))
        inputs.append("z")
    node = helper.make_node("MatMulNBits", inputs, ["y"], domain="com.microsoft", K=K, N=M, bits=bits, block_size=block, **extra)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", M])], constants,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)], ir_version=10)
    return ir.serde.deserialize_model(proto), proto


@pytest.mark.parametrize(("block", "K"), [(32, 128), (64, 96), (128, 128), (256, 512)])
@pytest.mark.parametrize(
    ("bits", "zeros", "kind"),
    [(bits, zeros, kind) for bits in (2, 4, 8) for zeros, kind in (("", "none"), ("packed", "uint8"))]
    + [(bits, zeros, kind) for bits in (2, 4) for zeros, kind in (("levels", "uint8"), ("fractions", "float"))],
)
def test_matmul_nbits(bits: int, zeros: str, kind: str, block: int, K: int) -> None:
    """The rows of the identity, multiplied in float32, are the weight exactly. A last block may be a part of one."""
    model, proto = nbits(bits, block, zeros, K)
    found = read_nbits(next(iter(model.graph)))
    assert isinstance(found, QuantizedWeight) and found.bits == (8 if bits == 8 else 4) and K % found.group_size == 0
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    floats = session.run(None, {"x": np.eye(K, dtype=np.float32)})[0].T
    assert np.array_equal(found.dequantize(), floats) and scheme_of(found).zero_point == kind


def test_matmul_nbits_refusals() -> None:
    model, _ = nbits(4, 16, "")
    found = read_nbits(next(iter(model.graph)))
    assert isinstance(found, Refusal) and "blocks of 16" in found.reason
    model, _ = nbits(4, 32, "levels")
    model.graph.initializers["s"].const_value = ir.Tensor(np.full((M, K // 32), 1 / 3, np.float32))
    found = read_nbits(next(iter(model.graph)))
    assert isinstance(found, Refusal) and "rounds otherwise" in found.reason  # onnxruntime rounds scale·q and scale·zero apart


@pytest.mark.parametrize(("order", "taken"), [(np.arange(K) // 32, True), (np.arange(K) // 32 % 3, False)], ids=["runs", "mixed"])
def test_inputs_in_an_order_that_is_none_are_taken(order: np.ndarray, taken: bool) -> None:
    """g_idx of a checkpoint without activation order says what the blocks say already."""
    model, _ = nbits(4, 32, "packed")
    node = next(iter(model.graph))
    value = ir.Value(name="g", const_value=ir.Tensor(order.astype(np.int32)), type=ir.TensorType(ir.DataType.INT32))
    node.resize_inputs(5)
    node.replace_input_with(4, value)
    found, plain = read_nbits(node), read_nbits(next(iter(nbits(4, 32, "packed")[0].graph)))
    assert isinstance(found, QuantizedWeight) == taken and isinstance(plain, QuantizedWeight)
    assert np.array_equal(found.dequantize(), plain.dequantize()) if isinstance(found, QuantizedWeight) else "reordered" in found.reason


def test_other_spellings_are_found_in_their_floats() -> None:
    """Blocks in a dimension of their own, and constants that the graph quantizes and dequantizes itself: the values tell it all."""
    rng = np.random.default_rng(3)
    blocks = Graph([], [])
    q, scale = blocks.constant("q", rng.integers(0, 16, (M, K // 32, 32)), "UINT4"), rng.uniform(0.01, 0.1, (M, K // 32, 1)).astype(np.float32)
    blocks.op("DequantizeLinear", [q, blocks.constant("s", scale), blocks.constant("z", rng.integers(0, 16, (M, K // 32, 1)), "UINT4")], "w",
              axis=2, block_size=32)
    blocks.op("Reshape", ["w", blocks.constant("flat", [M, K], "INT64")], "rows")
    blocks.op("Transpose", ["rows"], "out", perm=[1, 0])
    itself = Graph([], [])
    itself.constant("f", rng.normal(0, 0.05, (K, M)).astype(np.float32))
    itself.constant("s", rng.uniform(0.001, 0.002, M).astype(np.float32))
    itself.constant("z", rng.integers(120, 136, M), "UINT8")
    itself.op("QuantizeLinear", ["f", "s", "z"], "q", axis=1)
    itself.op("DequantizeLinear", ["q", "s", "z"], "out", axis=1)
    for graph, scheme in ((blocks, "int4 in groups of 32, with zero points"), (itself, "int8 in groups of 128")):
        model = graph.model("out")
        Normalize()(model)
        assert not {name for name in find_stored(model) if name != "w"}
        FoldDequantize()(model)
        weight = next(node for node in model.graph if node.op_type == "MatMul").inputs[1]
        turned = weight.producer()
        floats = weight.const_value.numpy() if turned is None else turned.inputs[0].const_value.numpy().T
        found = on_grid(np.ascontiguousarray(floats.T))
        assert found is not None and str(scheme_of(found)).startswith(scheme)
        assert np.array_equal(found.dequantize(), floats.T)


@pytest.mark.slow
def test_every_matrix_of_a_real_file(smollm2_gguf: Path, tmp_path: Path) -> None:
    from octavo.models.gguf import import_gguf
    from octavo.models.onnx_reader import read_onnx

    import_gguf(smollm2_gguf, tmp_path / "model")
    model = read_onnx(tmp_path / "model" / "model.onnx")
    Normalize()(model)
    stored = find_stored(model)
    FoldDequantize()(model)
    schemes: dict[str, int] = {}
    for name, found in stored.items():
        if name not in model.graph.initializers:
            continue  # a value inside of another
        floats = model.graph.initializers[name].const_value.numpy()
        assert found.axis is not None
        weight = found.load(found.axis)
        assert isinstance(weight, QuantizedWeight) and same_values(weight, floats.T if found.axis == 0 else floats), name
        schemes[str(scheme_of(weight))] = schemes.get(str(scheme_of(weight)), 0) + 1
    assert sum(schemes.values()) == 211 and schemes["int4 in groups of 32, with minimums"] >= 180
