"""cleanup: nothing dead stays, nothing alive changes, names are the same however the graph was made."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from octavo.passes.cleanup import Cleanup

GRAPH = """
<ir_version: 10, opset_import: ["" : 18, "unused.domain" : 1]>
g (float[n] x) => (float[n] y) <float one = {1}, float unused = {2}>
{
    q7 = Add(x, one)
    dead = Exp(q7)
    first, second = Split<num_outputs = 2>(q7)
    y = Add(first, second)
}
"""


def run(model: ir.Model) -> np.ndarray:
    session = ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.array([1, 2], np.float32)})[0]


def test_the_dead_go_and_the_rest_computes_the_same() -> None:
    model = ir.from_onnx_text(GRAPH)
    before = run(model)
    result = Cleanup()(model)
    assert [node.op_type for node in model.graph] == ["Add", "Split", "Add"] and set(model.graph.initializers) == {"one"}
    assert set(model.opset_imports) == {""} and result.modified
    outcome = result.outcome
    assert (outcome.nodes_before, outcome.nodes_after, outcome.bytes_before, outcome.bytes_after) == (4, 3, 8, 4)
    np.testing.assert_array_equal(run(model), before)


def test_names() -> None:
    """Nodes count by op, outputs are called like their node, and the signature keeps its own."""
    model = ir.from_onnx_text(GRAPH)
    model.graph[0].metadata_props["pkg.torch.onnx.name_scopes"] = "layers.0"
    Cleanup()(model)
    assert [node.name for node in model.graph] == ["Add_0", "Split_0", "Add_1"]
    assert [value.name for node in model.graph for value in node.outputs] == ["Add_0", "Split_0", "Split_0.1", "y"]
    assert model.graph[0].metadata_props["pkg.torch.onnx.name_scopes"] == "layers.0"


def test_the_same_graph_gets_the_same_names() -> None:
    other = ir.from_onnx_text(GRAPH.replace("q7", "Split_0").replace("first", "Add_1").replace("dead", "Add_0"))
    model = ir.from_onnx_text(GRAPH)
    Cleanup()(model)
    Cleanup()(other)
    assert ir.serde.serialize_model(other) == ir.serde.serialize_model(model)


def test_a_name_that_is_taken() -> None:
    """An initializer or input may already be called like a node."""
    model = ir.from_onnx_text(GRAPH.replace("one", "Add_0").replace("x", "Split_0"))
    Cleanup()(model)
    assert [node.name for node in model.graph] == ["Add_1", "Split_1", "Add_2"]


def test_a_second_run_changes_nothing() -> None:
    model = ir.from_onnx_text(GRAPH)
    Cleanup()(model)
    assert not Cleanup()(model).modified


def test_order() -> None:
    model = ir.from_onnx_text(GRAPH)
    last = model.graph[-1]
    model.graph.remove(last)
    model.graph.insert_before(model.graph[0], last)
    with pytest.raises(ir.passes.PostconditionError, match="runs before what it reads"):
        Cleanup().ensures(model)
    Cleanup()(model)
    assert [node.op_type for node in model.graph] == ["Add", "Split", "Add"]
