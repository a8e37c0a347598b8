"""extract: cones and how they run, against the whole graph in onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from octavo.passes.extract import LARGE, cone, prepare, reads

BRANCHES = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[n] x, bool flag) => (float[n] y) <float one = {1}, float two = {2}>
{
    unrelated = Exp(x)
    a = Add(x, one)
    b = Mul(a, two)
    y = If (flag) <
        then_branch = t () => (float[n] kept) { kept = Sub(b, a) },
        else_branch = e () => (float[n] doubled) { inner = Add(b, b) doubled = Mul(inner, two) }
    >
}
"""


def named(model: ir.Model, name: str) -> ir.Value:
    return next(value for node in model.graph for value in node.outputs if value.name == name)


def test_a_cone_is_what_its_outputs_need_in_order() -> None:
    model = ir.from_onnx_text(BRANCHES)
    found = cone([named(model, "b")])
    assert [node.op_type for node in found.nodes] == ["Add", "Mul"]
    assert {value.name for value in found.leaves} == {"x", "one", "two"}


def test_a_cone_stops_where_it_is_told() -> None:
    model = ir.from_onnx_text(BRANCHES)
    a = named(model, "a")
    found = cone([named(model, "b")], lambda value: value is a)
    assert [node.op_type for node in found.nodes] == ["Mul"] and a in found.leaves


def test_what_a_branch_captures_is_read() -> None:
    """An If reads what its branches name from outside, and nothing that lives inside them."""
    model = ir.from_onnx_text(BRANCHES)
    node = named(model, "y").producer()
    assert node is not None and {value.name for value in reads(node)} == {"flag", "a", "b", "two"}
    assert [n.op_type for n in cone([named(model, "y")]).nodes] == ["Add", "Mul", "If"]


@pytest.mark.parametrize(("flag", "expected"), [(True, [2.0, 3.0]), (False, [16.0, 24.0])])
def test_a_cone_runs(flag: bool, expected: list[float]) -> None:
    model = ir.from_onnx_text(BRANCHES)
    x, condition = model.graph.inputs
    types = {x: (ir.DataType.FLOAT, 1), condition: (ir.DataType.BOOL, 0)}
    runner = prepare(model, cone([named(model, "y")]), types).open()
    assert runner.run({"x": np.array([1, 2], np.float32), "flag": np.array(flag)})[0].tolist() == expected


def test_a_large_constant_is_fed_where_it_lies() -> None:
    """No serialized copy of it: the piece declares an input, and the contents are the array's own memory."""
    weights = np.arange(LARGE, dtype=np.float32)
    model = ir.from_onnx_text("""
<ir_version: 10, opset_import: ["" : 18]>
g (int64[n] i) => (float[n] y) <float[1] w = {0}> { y = Gather(w, i) }
""")
    model.graph.initializers["w"].const_value = ir.Tensor(weights, name="w")
    prepared = prepare(model, cone([named(model, "y")]), {model.graph.inputs[0]: (ir.DataType.INT64, 1)})
    assert prepared.proto.ByteSize() < 1000
    runner = prepared.open()
    assert [feed.name for feed in runner.session.get_inputs()] == ["i", "w"]
    weights[7] = -1
    assert runner.run({"i": np.array([7, 9])})[0].tolist() == [-1, 9]


def test_a_prepared_cone_outlives_its_graph() -> None:
    model = ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 18]> g (float[n] x) => (float[n] y) { a = Neg(x) y = Add(a, a) }')
    prepared = prepare(model, cone([named(model, "y")]), {model.graph.inputs[0]: (ir.DataType.FLOAT, 1)})
    model.graph.outputs.clear()
    for node in reversed(list(model.graph)):
        model.graph.remove(node, safe=True)
    assert prepared.open().run({"x": np.array([3], np.float32)})[0].tolist() == [-6.0]


def test_a_deep_cone() -> None:
    """Thousands of nodes in a row are no recursion."""
    lines = "\n".join(f"v{i + 1} = Neg(v{i})" for i in range(3000))
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 18]> g (float[n] v0) => (float[n] v3000) {{ {lines} }}')
    assert len(cone([named(model, "v3000")]).nodes) == 3000
