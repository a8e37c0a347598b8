"""What a token costs by the diff, against the counts that the bench divides by, and against the sizes of the model."""

from __future__ import annotations

import numpy as np
import octavo
import onnx
import pytest
from octavo.compiler.diff.cost import cost_of
from octavo.compiler.diff.source import read_snapshot
from octavo.models.cost import step_cost
from octavo.models.tiny import TINY
from onnx import TensorProto, helper, numpy_helper

C = TINY["llama"]
K, V, L, H, D = (C[name] for name in ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "head_dim"))


@pytest.mark.parametrize("name", ["model.onnx", "fp32", "int8", "int4", "contiguous"])
def test_the_diff_and_the_bench_count_the_same(stored_weights, tmp_path, name):
    path = stored_weights / name
    if name == "contiguous":
        path = tmp_path / name
        octavo.compile(stored_weights / "model.onnx", path, options=octavo.CompileOptions(paged=False))
    cost, step = cost_of(read_snapshot(path)), step_cost(path / "model.onnx" if path.is_dir() else path)
    assert cost.flops == 2 * (step.per_token + step.per_row)
    # The diff adds one row of each table: an embedding, and the angles of a position in every layer.
    assert step.weight_bytes <= cost.weight_bytes <= step.weight_bytes + 4 * K + (2 * L + 2) * 4 * D
    assert cost.attention_flops == 4 * L * H * D, "q·k and p·v, a multiplication and an addition each, of every head"


@pytest.mark.parametrize("turned", [False, True])
def test_attention_in_plain_operators(tmp_path, turned):
    """Softmax between two products of activations counts; one that chooses experts does not. Weights may be packed and turned."""
    inner, hidden = 24, 10
    weight = np.zeros((hidden, inner) if turned else (inner, hidden), np.int8)
    nodes = [
        helper.make_node("MatMul", ["q", "k"], ["scores"]), helper.make_node("Softmax", ["scores"], ["p"]), helper.make_node("MatMul", ["p", "v"], ["c"]),
        helper.make_node("Transpose", ["c"], ["t"], perm=[0, 2, 1, 3]), helper.make_node("Reshape", ["t", "flat"], ["r"]),
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=0),
        *([helper.make_node("Transpose", ["d"], ["o"], perm=[1, 0])] if turned else [helper.make_node("Identity", ["d"], ["o"])]),
        helper.make_node("MatMul", ["r", "o"], ["y"]), helper.make_node("Softmax", ["y"], ["routes"]), helper.make_node("TopK", ["routes", "two"], ["z", "zi"]),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("q", "k", "v", "z")]
    graph = helper.make_graph(nodes, "g", ports[:3], ports[3:], [
        numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.ones(len(weight), np.float32), "s"),
        numpy_helper.from_array(np.array([0, 0, inner]), "flat"), numpy_helper.from_array(np.array([2]), "two"),
    ])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), tmp_path / "g.onnx")
    cost = cost_of(read_snapshot(tmp_path / "g.onnx"))
    assert cost.attention_flops == 4 * inner and cost.flops == 2 * inner * hidden
