"""The canonical text: the same for every way to write one model, another for another model, and it reads back to itself."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from octavo.compiler.diff.parse import parse
from octavo.compiler.diff.source import read_snapshot
from octavo.compiler.diff.write import write
from octavo.errors import ModelError, OctavoError
from onnx import TensorProto, helper, numpy_helper
from scrambles import SCRAMBLES, Scramble, models, rename, reorder

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def text_of(model: onnx.ModelProto) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        path.write_bytes(model.SerializeToString())
        return write(read_snapshot(path))


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


@QUICK
@given(models(), st.lists(st.sampled_from(SCRAMBLES), min_size=1, max_size=4), st.integers(0, 2**32))
def test_the_text_is_the_same_however_a_model_is_written(model, scrambles: list[Scramble], seed):
    text = text_of(model)
    other = copy_of(model)
    for i, scramble in enumerate(scrambles):
        scramble(other, random.Random(seed + i))
    assert text_of(other) == text


@QUICK
@given(models())
def test_the_text_reads_back_to_itself(model):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        path.write_bytes(model.SerializeToString())
        snapshot = read_snapshot(path)
    assert parse(write(snapshot)) == snapshot
    assert write(parse(write(snapshot))) == write(snapshot)


@pytest.mark.parametrize("scramble", SCRAMBLES, ids=lambda s: s.__name__)
def test_a_real_decoder_is_the_same_however_it_is_written(decoder, scramble):
    model = onnx.load(decoder)
    other = copy_of(model)
    scramble(other, random.Random(1))
    assert other != model
    text = text_of(model)
    assert text_of(other) == text
    assert "repeat 4 r0" in text and "past_key_values.{i}.key" in text
    assert parse(text) == read_snapshot(decoder)


def test_external_data_and_data_in_the_file_are_the_same(decoder, tmp_path):
    onnx.save(onnx.load(decoder), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    assert write(read_snapshot(tmp_path / "m.onnx")) == write(read_snapshot(decoder))


def _change(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new, 1)


MODEL = """<ir_version: 10, opset_import: ["" : 18]>
g (float[n, 4] x, bool flag) => (float[n, 4] y) <float[4] w = {1, 2, 3, 4}, int64[2] shape = {-1, 4}> {
    a = Softmax<axis = 1>(x)
    b = Sub(a, w)
    c = Reshape(b, shape)
    d = Add(c, x)
    y = If(flag)<then_branch = t () => (float e) { e = Mul(d, w) }, else_branch = f () => (float h) { h = Neg(d) }>
}"""


@pytest.mark.parametrize("old, new", [
    ("axis = 1", "axis = 0"), ("Sub(a, w)", "Sub(w, a)"), ("{1, 2, 3, 4}", "{1, 2, 3, 4.0000005}"), ("{-1, 4}", "{4, -1}"), ("Add(c, x)", "Add(c, a)"),
    ("Neg(d)", "Neg(c)"), ("Neg", "Abs"), ("float[n, 4] x", "float[4, n] x"), ("float[n, 4] x", "double[n, 4] x"), ('"" : 18', '"" : 17'),
    ("float[n, 4] y", "float[m, 4] y"), ("(x)\n", "(d0)\n    d0 = Cast<to = 1>(x)\n"),
])
def test_another_model_has_another_text(old, new):
    """The negative controls: one change of meaning each."""
    model = onnx.parser.parse_model(MODEL)
    assert text_of(onnx.parser.parse_model(_change(MODEL, old, new))) != text_of(model)


@given(st.integers(0, 999), st.integers(0, 31))
@QUICK
@example(0, 31)
def test_any_bit_of_a_weight_shows(element, bit):
    weight = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    flipped = weight.copy().view(np.uint32)
    flipped[element] ^= np.uint32(1) << np.uint32(bit)
    texts = []
    for array in (weight, flipped.view(np.float32)):
        graph = helper.make_graph(
            [helper.make_node("Add", ["x", "w"], ["y"])], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1000])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1000])], [numpy_helper.from_array(array, "w")],
        )
        texts.append(text_of(helper.make_model(graph)))
    assert texts[0] != texts[1]


def test_a_node_that_is_put_in_changes_few_lines(decoder):
    """Text that git can show: one Cast in one layer of a model whose layers stay folded around it."""
    model = onnx.load(decoder)
    node = next(n for n in model.graph.node if n.name.startswith("lm_head") or n.output[0] == "logits")
    cast = helper.make_node("Cast", [node.input[0]], ["fresh"], to=1)
    node.input[0] = "fresh"
    model.graph.node.insert(list(model.graph.node).index(node), cast)
    before, after = write(read_snapshot(decoder)).splitlines(), text_of(model).splitlines()
    assert len(after) == len(before) + 1 and len(set(before) - set(after)) <= 2


def test_layers_whose_edges_have_shared_work_in_them_fold_whole(decoder):
    """The mask is computed inside the first layer in depth-first order, and still all four layers are one body."""
    text = write(read_snapshot(decoder))
    body = text.split("repeat 4 r0")[1]
    assert text.count("Attention(") == 1 and "lessorequal_0" not in body.split("=")[0]


@pytest.mark.parametrize("text", [
    "", "octavo graph 2\n", "octavo graph 1\n", "octavo graph 1\nnonsense\n", "octavo graph 1\ngraph\n  a_0 = Relu(b_0)\n",
    "octavo graph 1\ngraph\n  a_0 = Relu($x)\n", "octavo graph 1\ngraph\n  repeat 9999999 r0\n    a_0 = Relu(_)\n",
    "octavo graph 1\ngraph\n  output y = ^0\n", "octavo graph 1\ngraph\n     input x\n", "octavo graph 1\ngraph\n  a_0 = Relu(\n",
    "octavo graph 1\ngraph\n  input x\n  input x\n", 'octavo graph 1\ngraph\n  a_0 = "Re(_)\n', "octavo graph 1\ngraph\n  a_0 = Relu(_) axis\n",
    "octavo graph 1\ngraph\n  repeat 2 r0\n    carry c0 = _\n    a_0 = Relu(c0)\n  output y = r0[1].a_0\n",
    "octavo graph 1\ngraph\n  repeat 2 r0\n    each p0\n      _\n    a_0 = Relu(p0)\n", "octavo graph 1\ngraph\n  a_0 = Relu(_)\n  output y = a_0:1\n",
])
def test_text_that_is_no_snapshot_is_a_typed_error(text, tmp_path):
    with pytest.raises(ModelError):
        parse(text)


def test_names_that_mean_something_in_the_text_are_quoted(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Re lu(", ["in put, {i} \"q\""], ["y\n= a"], domain="a b", weird_=["x y", "]"])], "g",
        [helper.make_tensor_value_info("in put, {i} \"q\"", TensorProto.FLOAT, ["a b"])], [helper.make_tensor_value_info("y\n= a", TensorProto.FLOAT, [])],
    )
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("a b", 1)]).SerializeToString())
    snapshot = read_snapshot(path)
    assert parse(write(snapshot)) == snapshot and snapshot.graph.inputs[0].name == 'in put, {i} "q"'


def test_what_is_no_model_is_a_typed_error(tmp_path):
    graphless = onnx.ModelProto(ir_version=8).SerializeToString()
    for name, data in {"empty": b"", "text": b"hello", "gguf": b"GGUF123", "zeros": bytes(50), "graphless": graphless}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(OctavoError):
            read_snapshot(tmp_path / name)
    with pytest.raises(ModelError):
        read_snapshot(tmp_path)
    with pytest.raises(ModelError):
        read_snapshot(tmp_path / "missing.onnx")


def test_two_nodes_in_a_circle_are_a_typed_error(tmp_path):
    nodes = [helper.make_node("Relu", ["b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    graph = helper.make_graph(nodes, "g", [], [helper.make_tensor_value_info("b", TensorProto.FLOAT, [])])
    (tmp_path / "m.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(ModelError, match="circle"):
        read_snapshot(tmp_path / "m.onnx")


def test_scrambles_do_something():
    """The control of the property: each of them changes the file."""
    model = onnx.parser.parse_model(MODEL)
    for scramble in (rename, reorder):
        other = copy_of(model)
        for seed in range(20):
            scramble(other, random.Random(seed))
        assert other.SerializeToString() != model.SerializeToString()
