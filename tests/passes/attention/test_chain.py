"""Chains run in NumPy as onnxruntime runs them, and walks stop where data would matter."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from octavo.passes.attention.chain import LINEAR, MOVES, SCALES, Chain, Graph, passable
from octavo.passes.attention.fingerprint import Fingerprints
from onnx import helper
from sketches import Sketch, build

X = np.random.default_rng(0).standard_normal((2, 4, 6, 8)).astype(np.float32)
I = np.int64
ANGLES = np.random.default_rng(1).standard_normal((9, 4)).astype(np.float32)

CASES: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "identity": ("Identity", [], {}),
    "cast": ("Cast", [], {"to": 1}),
    "transpose": ("Transpose", [], {"perm": [0, 2, 1, 3]}),
    "transpose_reversed": ("Transpose", [], {}),
    "reshape": ("Reshape", [I([0, -1, 3, 2, 8])], {}),
    "reshape_allowzero": ("Reshape", [I([2, 4, 48])], {"allowzero": 1}),
    "expand": ("Expand", [I([3, 2, 4, 6, 8])], {}),
    "expand_to_less": ("Expand", [I([1, 8])], {}),
    "unsqueeze": ("Unsqueeze", [I([1, -1])], {}),
    "flatten": ("Flatten", [], {"axis": 2}),
    "flatten_all": ("Flatten", [], {"axis": 0}),
    "concat": ("Concat", [X[:, :2]], {"axis": 1}),
    "slice": ("Slice", [I([1]), I([2**62]), I([3]), I([2])], {}),
    "slice_no_axes": ("Slice", [I([1, 0]), I([2, -1])], {}),
    "slice_backwards": ("Slice", [I([-1]), I([-(2**62)]), I([2]), I([-1])], {}),
    "slice_negative": ("Slice", [I([-3]), I([-1]), I([-1])], {}),
    "split": ("Split", [I([2, 6])], {"axis": -1}),
    "split_evenly": ("Split", [], {"axis": 1, "num_outputs": 2}),
    "tile": ("Tile", [I([1, 2, 1, 3])], {}),
    "gather": ("Gather", [I([[3, 0], [1, 1]])], {"axis": 1}),
    "gather_negative": ("Gather", [I(-1)], {"axis": 2}),
    "add": ("Add", [X[0, 0]], {}),
    "sub": ("Sub", [X[0, 0]], {}),
    "mul": ("Mul", [np.float32(0.25)], {}),
    "div": ("Div", [np.float32(3)], {}),
    "neg": ("Neg", [], {}),
    "tanh": ("Tanh", [], {}),
    "max": ("Max", [np.zeros(8, np.float32)], {}),
    "min": ("Min", [np.zeros(8, np.float32)], {}),
    "isnan": ("IsNaN", [], {}),
    "rotary": ("RotaryEmbedding", [np.tile(ANGLES[None, :6], (2, 1, 1)), np.tile(ANGLES[None, 3:], (2, 1, 1))], {}),
    "rotary_interleaved": ("RotaryEmbedding", [np.tile(ANGLES[None, :6], (2, 1, 1)), np.tile(ANGLES[None, 3:], (2, 1, 1))], {"interleaved": 1}),
    "rotary_positions": ("RotaryEmbedding", [ANGLES, ANGLES[::-1].copy(), np.tile(I([8, 1, 0, 3, 3, 5]), (2, 1))], {}),
    "rotary_partial": ("RotaryEmbedding", [ANGLES[:, :2].copy(), ANGLES[:, 2:].copy(), np.tile(I(range(6)), (2, 1))], {"rotary_embedding_dim": 4}),
}


def one_node(kind: str, given: list[Any], attributes: dict[str, Any], domain: str = "", x: np.ndarray = X) -> onnx.ModelProto:
    count = 2 if kind == "Split" else 1
    names = ["x", *(f"c{i}" for i in range(len(given)))]
    node = helper.make_node(kind, names, [f"y{i}" for i in range(count)], domain=domain, **attributes)
    constants = [onnx.numpy_helper.from_array(np.asarray(array), name) for array, name in zip(given, names[1:])]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node], "one", [info("x", 1, list(x.shape))], [helper.make_empty_tensor_value_info(name) for name in node.output], constants
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)], ir_version=10)


def agree(proto: onnx.ModelProto, x: np.ndarray = X) -> None:
    model = ir.from_proto(proto)
    node = next(iter(model.graph))
    for index, output in enumerate(node.outputs):
        chain = Chain(output, (model.graph.inputs[0],), (node,), tuple(model.graph.initializers.values()))
        got = chain.run([x], {value: value.const_value.numpy() for value in chain.sides if value.const_value is not None})
        want = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[index]
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_every_op_as_onnxruntime_has_it(name: str) -> None:
    agree(one_node(*CASES[name]))


@pytest.mark.parametrize("positions", [np.tile(I([8, 1, 0, 3, 3, 5]), (2, 1)), I([2])], ids=["each", "offset"])
def test_microsofts_rotary(positions: np.ndarray) -> None:
    agree(one_node("RotaryEmbedding", [positions, ANGLES, ANGLES[::-1].copy()], {"interleaved": 1}, "com.microsoft"))


def test_rotary_of_tokens_first() -> None:
    x = X.transpose(0, 2, 1, 3).reshape(2, 6, 32)
    agree(one_node("RotaryEmbedding", [ANGLES, ANGLES[::-1].copy(), np.tile(I(range(6)), (2, 1))], {"num_heads": 4}, x=x), x)


def node(kind: str, operands: list[ir.Value], **attributes: Any) -> ir.Node:
    return ir.node(kind, operands, attributes=attributes)


def test_data_passes_only_where_it_is_moved_or_linear() -> None:
    data, other, side = (ir.val(name) for name in ("data", "other", "side"))

    def is_data(value: ir.Value) -> bool:
        return value is not side

    assert passable(node("Reshape", [data, side]), MOVES, is_data)
    assert not passable(node("Reshape", [side, data]), MOVES, is_data)
    assert not passable(node("Gather", [data, other], axis=0), MOVES, is_data)
    assert passable(node("Mul", [side, data]), SCALES, is_data)
    assert not passable(node("Mul", [data, other]), SCALES, is_data)
    assert not passable(node("Div", [side, data]), SCALES, is_data)
    assert passable(node("Concat", [data, other], axis=0), MOVES, is_data)
    assert not passable(node("Add", [data, other]), SCALES, is_data)
    assert passable(node("Add", [data, other]), LINEAR, is_data)
    assert not passable(node("Cast", [data], to=int(ir.DataType.FLOAT16)), MOVES, is_data)
    assert not passable(node("Exp", [data]), LINEAR, is_data)


def test_a_walk_goes_from_near_to_far() -> None:
    model, _ = build(Sketch(padding=False))
    score = next(node for node in model.graph if node.op_type == "Softmax").inputs[0]
    assert score is not None
    graph = Graph(model.graph, lambda value: value.const_value is None and not any(word in str(value.name) for word in ("Where", "Shape")))
    chains = [chain for _, chain in graph.walk(score, LINEAR)]
    assert chains[0].nodes == () and chains[0].leaves == (score,)
    assert [len(chain.nodes) for chain in chains] == list(range(len(chains)))
    producer = chains[-1].leaves[0].producer()
    assert producer is not None and producer.op_type == "MatMul"


def test_equal_cones_have_equal_fingerprints() -> None:
    from drivers import seen

    observation, _ = seen(*build(Sketch()))
    prints = Fingerprints(observation)
    cosines = [node.outputs[0] for node in observation.model.graph if node.op_type == "Cos"]
    sines = [node.outputs[0] for node in observation.model.graph if node.op_type == "Sin"]
    assert len(cosines) == 2
    assert len({prints.of(value) for value in cosines}) == 1
    assert prints.of(sines[0]) not in {prints.of(value) for value in cosines}
