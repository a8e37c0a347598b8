"""What is read is the user's model, and stays the user's: nothing a pass does to our copy shows on theirs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from octavo.errors import ModelError, UnsafePathError
from octavo.models.onnx_reader import graph_interface, read_onnx
from onnx import TensorProto, helper, numpy_helper

WEIGHTS = np.arange(64, dtype=np.float32).reshape(8, 8)


def small_model(opset: int = 23) -> onnx.ModelProto:
    """y = x·w + c + f(), with an If, a function with a constant, and an initializer that is also an input."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8]) for name in "xy")
    c = helper.make_tensor_value_info("c", TensorProto.FLOAT, [8])
    branch = [
        helper.make_graph([helper.make_node("Add", ["product", name], [f"o_{name}"])], name, [],
                          [helper.make_tensor_value_info(f"o_{name}", TensorProto.FLOAT, None)],
                          [numpy_helper.from_array(np.full(8, fill, np.float32), name)])
        for name, fill in (("p", 1), ("q", 2))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True))),
        helper.make_node("If", ["yes"], ["chosen"], then_branch=branch[0], else_branch=branch[1]),
        helper.make_node("f", [], ["extra"], domain="local"),
        helper.make_node("Sum", ["chosen", "extra", "c"], ["y"]),
    ]
    constant = helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(np.full(8, 3, np.float32), "k"))
    function = helper.make_function("local", "f", [], ["k"], [constant], [helper.make_opsetid("", opset)])
    weights = [numpy_helper.from_array(WEIGHTS, "w"), numpy_helper.from_array(np.ones(8, np.float32), "c")]
    graph = helper.make_graph(nodes, "g", [x, c], [y], weights)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=10)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The small model with every tensor, a function's constant too, in w.data."""
    path = tmp_path / "model" / "m.onnx"
    path.parent.mkdir()
    onnx.save(small_model(), path, save_as_external_data=True, location="w.data", size_threshold=0, convert_attribute=True)
    return path


def wreck(model: ir.Model) -> None:
    """Does to a model what passes do: renames, retypes, reshapes, replaces, removes."""
    for graph in model.graphs():
        for name in list(graph.initializers):
            value = graph.initializers[name]
            value.name = f"renamed_{name}"
            value.dtype = ir.DataType.FLOAT16
            value.const_value.name = "again"
    for value in model.graph.inputs:
        value.dtype = ir.DataType.DOUBLE
        value.shape = ir.Shape([1])
        value.name = f"renamed_{value.name}"
    for holder in (model.graph, *model.functions.values()):
        for node in list(holder):
            node.name = "renamed"
            for attr in node.attributes.values():
                if attr.type == ir.AttributeType.TENSOR:
                    attr.value.name = "renamed"
                    if isinstance(attr.value, ir.ExternalTensor):
                        attr.value.base_dir = "/nowhere"
            node.attributes.clear()
            node.metadata_props["x"] = "y"
        holder.opset_imports[""] = 1
    model.metadata_props["x"] = "y"
    model.functions.clear()


def snapshot(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


def test_a_proto_is_not_touched() -> None:
    proto = small_model()
    before = proto.SerializeToString(deterministic=True)
    wreck(read_onnx(proto))
    assert proto.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("external", [False, True])
def test_an_ir_model_is_not_touched(external: bool, saved: Path) -> None:
    theirs = ir.load(saved) if external else ir.from_proto(small_model())
    folders = [tensor.base_dir for tensor in all_external(theirs)]
    before = snapshot(theirs)
    ours = read_loaded(theirs)
    wreck(ours)
    assert snapshot(theirs) == before
    assert [tensor.base_dir for tensor in all_external(theirs)] == folders


def read_loaded(model: ir.Model) -> ir.Model:
    """ir.load gives the tensors of functions no folder: those are refused, so they get one here."""
    for function in model.functions.values():
        for node in function:
            for attr in node.attributes.values():
                if isinstance(attr.value, ir.ExternalTensor):
                    attr.value.base_dir = model.graph.initializers["w"].const_value.base_dir
    return read_onnx(model)


def all_external(model: ir.Model) -> list[ir.ExternalTensor]:
    return [value.const_value for value in model.graph.initializers.values() if isinstance(value.const_value, ir.ExternalTensor)]


def test_a_file_is_not_touched_and_every_source_gives_the_same_model(saved: Path) -> None:
    files = {file: file.read_bytes() for file in saved.parent.iterdir()}
    models = [read_onnx(source) for source in (saved, str(saved), small_model(), ir.from_proto(small_model()))]
    for model in models:
        assert np.array_equal(model.graph.initializers["w"].const_value.numpy(), WEIGHTS)
        assert list(model.functions) == [("local", "f", "")]
        (constant,) = model.functions["local", "f", ""]
        assert constant.attributes["value"].value.numpy().tolist() == [3.0] * 8
        wreck(model)
    assert {file: file.read_bytes() for file in saved.parent.iterdir()} == files


def test_weights_stay_on_disk_under_an_absolute_folder(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    model = read_onnx(saved.name)
    monkeypatch.chdir("/")
    (constant,) = model.functions["local", "f", ""]
    for tensor in (model.graph.initializers["w"].const_value, constant.attributes["value"].value):
        assert isinstance(tensor, ir.ExternalTensor)
        assert tensor.base_dir == saved.parent and Path(tensor.path) == saved.parent / "w.data"
        assert tensor.raw is None  # not mapped before it is read
    assert np.array_equal(model.graph.initializers["w"].const_value.numpy(), WEIGHTS)


def test_external_data_of_a_model_in_memory_needs_an_absolute_folder(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsafePathError, match="not known here"):
        read_onnx(onnx.load(saved, load_external_data=False))
    monkeypatch.chdir(saved.parent)
    with pytest.raises(UnsafePathError, match="not known here"):
        read_onnx(ir.load(saved.name))


def test_external_data_of_an_ir_model_is_checked_as_a_files_is(saved: Path) -> None:
    theirs = ir.load(saved)
    weight = theirs.graph.initializers["w"]
    weight.const_value = ir.ExternalTensor("../x", 0, 256, ir.DataType.FLOAT, shape=ir.Shape([8, 8]), name="w", base_dir=saved.parent)
    with pytest.raises(UnsafePathError, match=r"'\.\.'"):
        read_loaded(theirs)


def unsorted() -> ir.Model:
    model = ir.from_proto(small_model())
    first = model.graph[0]
    model.graph.remove(first)
    model.graph.append(first)
    return model


def changed(change: Callable[[onnx.ModelProto], Any]) -> onnx.ModelProto:
    model = small_model()
    change(model)
    return model


def cut_weight(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-1]


def sparse(model: onnx.ModelProto) -> None:
    model.graph.node[2].attribute[0].g.sparse_initializer.add()


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "opset": (lambda: small_model(opset=26), "opset 26; Octavo reads up to 25"),
    "ir version": (lambda: changed(lambda m: setattr(m, "ir_version", 99)), "IR version 99"),
    "no ir version": (lambda: changed(lambda m: m.ClearField("ir_version")), "IR version 0"),
    "no graph": (lambda: changed(lambda m: m.ClearField("graph")), "holds no graph"),
    "no opset": (lambda: changed(lambda m: (m.ClearField("opset_import"), m.ClearField("functions"))), "imports no opset"),
    "short tensor": (lambda: changed(cut_weight), "'w' needs 256 bytes and has 255"),
    "negative size": (lambda: changed(lambda m: m.graph.initializer[0].dims.__setitem__(0, -8)), "no valid shape"),
    "sparse": (lambda: changed(sparse), "sparse"),
    "training": (lambda: changed(lambda m: m.training_info.add()), "training"),
    "unsorted": (unsorted, "can't be copied"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_a_hint(name: str, tmp_path: Path) -> None:
    make, message = REFUSED[name]
    source = make()
    sources = [source]
    if isinstance(source, onnx.ModelProto):
        path = tmp_path / "m.onnx"
        path.write_bytes(source.SerializeToString())
        sources.append(path)
    for bad in sources:
        with pytest.raises(ModelError, match=message) as caught:
            read_onnx(bad)
        assert caught.value.hint


def test_a_length_that_is_not_the_tensors_is_refused(tmp_path: Path) -> None:
    proto = small_model()
    weight = proto.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    (tmp_path / "w.data").write_bytes(WEIGHTS.tobytes())
    for length, message in (("128", "needs 256 bytes and its external data has 128"), (None, "")):
        del weight.external_data[:]
        weight.external_data.add(key="location", value="w.data")
        if length:
            weight.external_data.add(key="length", value=length)
        onnx.save(proto, tmp_path / "m.onnx")
        if length:
            with pytest.raises(ModelError, match=message):
                read_onnx(tmp_path / "m.onnx")
        else:
            assert np.array_equal(read_onnx(tmp_path / "m.onnx").graph.initializers["w"].const_value.numpy(), WEIGHTS)
    (tmp_path / "w.data").write_bytes(WEIGHTS.tobytes()[:-4])
    with pytest.raises(ModelError, match="needs 256 bytes, the file has 252"):
        read_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_no_model(cut: float, tmp_path: Path) -> None:
    content = small_model().SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes(content[: int(len(content) * cut)])
    with pytest.raises(ModelError, match="truncated"):
        read_onnx(path)


def test_an_input_with_an_initializer_is_no_input(saved: Path) -> None:
    interface = graph_interface(read_onnx(saved))
    assert [(port.name, port.dtype, port.shape) for port in interface.inputs] == [("x", "float32", ("n", 8))]
    assert [port.name for port in interface.outputs] == ["y"]
