"""The structural diff: nothing where nothing changed, one line for one change, one line for the same change in every layer."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from octavo.compiler.diff.model import GraphDiff
from octavo.compiler.diff.source import read_snapshot
from octavo.compiler.diff.structure import compare_snapshots
from octavo.compiler.diff.write import write
from onnx import ModelProto, helper, numpy_helper
from scrambles import SCRAMBLES, models

QUICK = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
Change = Callable[[ModelProto], None]


def diff(a: ModelProto, b: ModelProto) -> GraphDiff:
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder) / "a.onnx", Path(folder) / "b.onnx"
        for path, model in zip(paths, (a, b)):
            path.write_bytes(model.SerializeToString())
        return compare_snapshots(*map(read_snapshot, paths))


def changed(model: ModelProto, *changes: Change, seed: int = 7) -> ModelProto:
    """A copy with `changes`, then renamed and reordered, so that nothing can be matched by name or place."""
    copy = ModelProto()
    copy.CopyFrom(model)
    for change in changes:
        change(copy)
    for scramble in SCRAMBLES:
        scramble(copy, random.Random(seed))
    return copy


@pytest.fixture(scope="module")
def model(decoder) -> ModelProto:
    return onnx.load(decoder)


def nodes_of(model: ModelProto, op: str) -> list[onnx.NodeProto]:
    found = [node for node in model.graph.node if node.op_type == op]
    assert found
    return found


def insert(model: ModelProto, node: onnx.NodeProto, slot: int, op: str = "Cast", **attributes) -> None:
    new = helper.make_node(op, [node.input[slot]], [f"{node.output[0]}/new{slot}"], **(attributes or {"to": 1}))
    node.input[slot] = new.output[0]
    model.graph.node.insert(list(model.graph.node).index(node), new)


@QUICK
@given(models(), st.integers(0, 2**32))
def test_a_scrambled_model_differs_in_nothing(model, seed):
    found = diff(model, changed(model, seed=seed))
    assert found.same and found.exit_code == 0


def test_a_scrambled_decoder_differs_in_nothing(model):
    assert diff(model, changed(model)).edits == ()


def one(found: GraphDiff):
    assert len(found.edits) == 1, [edit.line for edit in found.edits]
    assert found.exit_code == 1
    return found.edits[0]


@pytest.mark.parametrize("op, slot", [("Attention", 0), ("Attention", 3), ("MatMul", 0), ("Add", 1), ("RMSNormalization", 0), ("RotaryEmbedding", 0)])
@pytest.mark.parametrize("which", [0, -1])
def test_one_inserted_node_is_one_line(model, op, slot, which):
    edit = one(diff(model, changed(model, lambda m: insert(m, nodes_of(m, op)[which], slot))))
    assert edit.kind == "inserted" and edit.count == 1 and edit.what.startswith("inserted Cast(to=1)") and f"before {op} input {slot}" in edit.what
    edit = one(diff(changed(model, lambda m: insert(m, nodes_of(m, op)[which], slot)), model))
    assert edit.kind == "removed" and edit.count == 1


@pytest.mark.parametrize("op, slot", [("Attention", 0), ("RMSNormalization", 0), ("Sigmoid", 0), ("Attention", 2)])
def test_the_same_inserted_node_in_every_layer_is_one_line(model, op, slot):
    def change(m: ModelProto) -> None:
        for node in [node for node in nodes_of(m, op) if "layers" in node.name]:
            insert(m, node, slot)

    found = diff(model, changed(model, change))
    expected = 2 if op == "RMSNormalization" else 1       # two norms of a layer, and they read different things
    assert len(found.edits) <= expected and all(edit.kind == "inserted" for edit in found.edits), [edit.line for edit in found.edits]
    assert sum(edit.count for edit in found.edits) == 4 * expected


def set_attribute(node: onnx.NodeProto, name: str, value: object) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def test_an_attribute_in_every_layer_is_one_line(model):
    def change(m: ModelProto) -> None:
        for node in nodes_of(m, "Attention"):
            set_attribute(node, "scale", 0.5)

    edit = one(diff(model, changed(model, change)))
    assert edit.line == "Attention: scale 0.25 → 0.5 ×4" and len(edit.places) == 4 and edit.kind == "attribute"


def test_swapped_inputs_are_one_line(model):
    def change(m: ModelProto) -> None:
        node = nodes_of(m, "Sub")[0]
        node.input[:] = list(reversed(node.input))

    edit = one(diff(model, changed(model, change)))
    assert (edit.kind, edit.what) == ("rewired", "Sub: inputs 0 and 1 swapped")


def test_a_rewired_input_is_one_line(model):
    def change(m: ModelProto) -> None:
        first, second = nodes_of(m, "Attention")[:2]
        second.input[4] = first.input[4]

    edits = diff(model, changed(model, change)).edits
    assert [edit.kind for edit in edits] == ["rewired"] and "past_key_values.0.key" in edits[0].what


def test_one_bit_of_one_weight_is_one_line(model):
    def change(m: ModelProto) -> None:
        tensor = next(t for t in m.graph.initializer if "layers.2.mlp.up_proj" in t.name)
        array = numpy_helper.to_array(tensor).copy()
        array.view(np.uint32)[3, 4] ^= 1
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    edit = one(diff(model, changed(model, change)))
    assert edit.kind == "weight" and edit.what.startswith("MatMul input 1: contents of float32[64, ") and edit.count == 1


def test_other_weights_everywhere_are_a_line_for_each_weight_of_a_layer(model, tmp_path):
    from octavo.models.tiny import tiny_llama_onnx

    other = onnx.load(tiny_llama_onnx(tmp_path, layers=4, seed=9))
    found = diff(model, changed(other))
    assert {edit.kind for edit in found.edits} == {"weight"} and len(found.edits) <= 12
    assert sum(edit.count == 4 for edit in found.edits) == 9


def test_other_weights_and_an_inserted_node_in_every_layer(model, tmp_path):
    from octavo.models.tiny import tiny_llama_onnx

    def change(m: ModelProto) -> None:
        for node in nodes_of(m, "Attention"):
            insert(m, node, 0)

    other = onnx.load(tiny_llama_onnx(tmp_path, layers=4, seed=9))
    found = diff(model, changed(other, change))
    inserted = [edit for edit in found.edits if edit.kind == "inserted"]
    assert len(inserted) == 1 and inserted[0].count == 4 and len(found.edits) <= 13, [edit.line for edit in found.edits]


def test_a_layer_that_is_gone(tmp_path):
    from octavo.models.tiny import tiny_llama_onnx

    full, cut = (onnx.load(tiny_llama_onnx(tmp_path / str(n), layers=n)) for n in (5, 4))
    kinds = {edit.kind for edit in diff(full, changed(cut)).edits}
    assert {"interface", "removed"} <= kinds and "replaced" not in kinds


@pytest.mark.parametrize("change, kind, text", [
    (lambda m: setattr(m.opset_import[0], "version", 24), "opset", "opset ai.onnx 23 → 24"),
    (lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 6), "interface", "input input_ids: int64[s0, s1] → int32[s0, s1]"),
    (lambda m: m.graph.input.append(helper.make_tensor_value_info("extra.3", 1, ["q"])), "interface", "added input extra.3 float32[s4]"),
    (lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[1], "dim_param", "other"), "interface",
     "input position_ids: int64[s0, s1] → int64[s0, s3]"),
])
def test_the_edges_of_a_model(model, change, kind, text):
    edits = diff(model, changed(model, change)).edits
    assert any(edit.kind == kind and edit.what == text for edit in edits), [edit.line for edit in edits]


def test_a_constant_shows_its_values(model):
    def change(m: ModelProto) -> None:
        tensor = next(t for t in m.graph.initializer if t.name == "int.1")
        tensor.CopyFrom(numpy_helper.from_array(np.array([2], np.int64), tensor.name))

    edits = diff(model, changed(model, change)).edits
    assert any(edit.kind == "constant" and "int64[1]{1} → {2}" in edit.what for edit in edits), [edit.line for edit in edits]


def test_changes_in_branches_and_functions_are_told_where_they_are():
    text = """<ir_version: 10, opset_import: ["" : 18, "f" : 1]>
    g (float[n, 4] x, bool flag) => (float[n, 4] y) {
        c = f.twice(x)
        d = Abs(x)
        y = If(flag)<then_branch = t () => (float e) { e = Mul(c, d) }, else_branch = f () => (float h) { h = Neg(c) }>
    }
    <opset_import: ["" : 18], domain: "f">
    twice (a) => (b) { b = Add(a, a) }"""
    model = onnx.parser.parse_model(text)
    edits = diff(model, onnx.parser.parse_model(text.replace("Neg(c)", "Neg(d)").replace("Add(a, a)", "Mul(a, a)"))).edits
    assert {edit.inside for edit in edits} == {"If else_branch", "function f::twice"}
    assert any("If else_branch: Neg input 0" in edit.line for edit in edits)


@QUICK
@given(models(), st.integers(0, 2**32 - 1))
def test_models_differ_if_and_only_if_their_texts_do(model, seed):
    """One random change: a node's op, an operand, a constant or an output. No change may go unseen, and none of them is a fallback."""
    rng = random.Random(seed)

    def change(m: ModelProto) -> None:
        node = rng.choice(m.graph.node)
        kind = rng.randrange(3)
        if kind == 0 and node.op_type in ("Relu", "Tanh", "Sigmoid", "Identity"):
            node.op_type = {"Relu": "Tanh"}.get(node.op_type, "Relu")
        elif kind == 1 and m.graph.initializer:
            tensor = rng.choice(m.graph.initializer)
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + 1, tensor.name))
        elif node.input:
            node.input[rng.randrange(len(node.input))] = "x"

    other = changed(model, change, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        texts = []
        for name, m in (("a", model), ("b", other)):
            (Path(folder) / name).write_bytes(m.SerializeToString())
            texts.append(write(read_snapshot(Path(folder) / name)))
    found = diff(model, other)
    assert found.same == (texts[0] == texts[1])
    assert not any("no edit tells" in edit.what for edit in found.edits)


def test_costs_of_a_decoder(model):
    """Two flops for each multiplied weight: 4 layers, the head; the cache is 2 × 4 layers × G·D floats a token."""
    cost = diff(model, model).cost_before
    weights = {t.name: int(np.prod(t.dims)) for t in model.graph.initializer}
    linear = sum(size for name, size in weights.items() if "_proj.weight" in name)
    assert cost.flops == 2 * (linear + weights["model.embed_tokens.weight"])
    assert cost.cache_bytes == sum(4 * v.type.tensor_type.shape.dim[1].dim_value * v.type.tensor_type.shape.dim[3].dim_value
                                   for v in model.graph.input if v.name.startswith("past_key_values"))
    assert cost.ops["Attention"] == 4 and cost.nodes == sum(cost.ops.values())
