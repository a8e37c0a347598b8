"""No file outside the model's folder is ever opened, whatever the model says and wherever in the model it says it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.errors import ModelError, UnsafePathError
from octavo.models.external_data import ExternalEntry, check_entry, check_external_paths, entry_from_pairs, read_entries, source_sha256
from onnx import TensorProto, helper


def external(name: str, location: str, offset: int | None = 0, length: int | None = 16) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def model_with(initializer: TensorProto) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [initializer])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with w.data and sub/w.data of 16 bytes, and secret.data beside it."""
    inside = tmp_path / "model"
    (inside / "sub").mkdir(parents=True)
    for file in (inside / "w.data", inside / "sub" / "w.data", tmp_path / "secret.data"):
        file.write_bytes(np.arange(4, dtype=np.float32).tobytes())
    return inside


def write(folder: Path, tensor: TensorProto) -> Path:
    path = folder / "model.onnx"
    onnx.save(model_with(tensor), path)
    return path


@pytest.mark.parametrize("location", ["w.data", "sub/w.data", "./w.data", "sub//w.data"])
def test_data_in_the_folder_is_found(location: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(folder, external("w", location))
    assert check_external_paths(path) == (folder / location,)
    monkeypatch.chdir(folder)
    assert check_external_paths("model.onnx") == (folder / location,)


def link(folder: Path) -> str:
    (folder / "link.data").symlink_to(folder.parent / "secret.data")
    return "link.data"


def inner_link(folder: Path) -> str:
    (folder / "link.data").symlink_to(folder / "w.data")
    return "link.data"


def linked_folder(folder: Path) -> str:
    (folder / "out").symlink_to(folder.parent)
    return "out/secret.data"


def hard_link(folder: Path) -> str:
    os.link(folder.parent / "secret.data", folder / "hard.data")
    return "hard.data"


def pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe.data")
    return "pipe.data"


UNSAFE: dict[str, Callable[[Path], str]] = {
    "absolute": lambda folder: str(folder / "w.data"),
    "dotdot": lambda folder: "../secret.data",
    "dotdot inside": lambda folder: "sub/../w.data",
    "hidden dotdot": lambda folder: "sub/./../../secret.data",
    "link": link, "link inside": inner_link, "linked folder": linked_folder, "hard link": hard_link, "pipe": pipe,
    "a folder": lambda folder: "sub", "the folder": lambda folder: ".", "empty": lambda folder: "",
    "backslash": lambda folder: "..\\secret.data", "drive": lambda folder: "C:/secret.data", "nul": lambda folder: "w.data\0.txt",
    "memory": lambda folder: "*/_ORT_MEM_ADDR_/*",
}


@pytest.mark.parametrize("make", UNSAFE.values(), ids=UNSAFE)
def test_a_location_that_breaks_a_rule_is_refused(make: Callable[[Path], str], folder: Path) -> None:
    path = write(folder, external("w", make(folder)))
    for read in (check_external_paths, source_sha256):
        with pytest.raises(ModelError, match="'w'") as caught:
            read(path)
        assert caught.value.hint
        assert isinstance(caught.value, UnsafePathError) or "ORT_MEM" in str(caught.value)


PARTS = st.sampled_from(["w.data", "sub", "..", ".", "", "absent", "link", "hard.data", "secret.data", "/", "~"])


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(PARTS, min_size=1, max_size=5))
def test_what_is_accepted_lies_inside(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    root = tmp_path_factory.getbasetemp() / "contained"
    inside = root / "model"
    if not root.exists():
        (inside / "sub").mkdir(parents=True)
        for file in (inside / "w.data", inside / "sub" / "w.data", root / "secret.data", root / "w.data"):
            file.write_bytes(bytes(16))
        (inside / "link").symlink_to(root)
        os.link(root / "secret.data", inside / "hard.data")
    location = "/".join(parts)
    try:
        found = check_entry(ExternalEntry("w", location, 0, 16), inside)
    except ModelError:
        return
    assert found.resolve() in (inside / "w.data", inside / "sub" / "w.data")
    assert found.resolve() == (inside / location).resolve()


@pytest.mark.parametrize(("offset", "length"), [(0, 17), (1, 16), (17, None), (10**17, 1), (0, 10**17)])
def test_data_beyond_the_file_is_refused(offset: int, length: int | None, folder: Path) -> None:
    with pytest.raises(ModelError, match="the file has 16"):
        check_external_paths(write(folder, external("w", "w.data", offset, length)))


def test_a_missing_data_file_is_named(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.data"):
        check_external_paths(write(folder, external("w", "absent.data")))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("offset", "0")], "no location"),
        ([("location", "a"), ("location", "b")], "twice"),
        ([("location", "a"), ("basepath", "/etc")], "unknown key 'basepath'"),
        ([("location", "a"), ("offset", "-1")], "offset '-1'"),
        ([("location", "a"), ("length", "0x10")], "length '0x10'"),
        ([("location", "a"), ("length", "٣")], "no size"),
    ],
)
def test_malformed_entries_are_refused(pairs: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        entry_from_pairs("w", pairs)


def every_place() -> onnx.ModelProto:
    """A model with an external tensor in each place where the format allows a tensor."""
    model = model_with(external("initializer", "1"))
    model.graph.sparse_initializer.add(values=external("sparse values", "2"), indices=external("sparse indices", "3"))
    node = model.graph.node[0]
    node.attribute.append(helper.make_attribute("t", external("attribute", "4")))
    node.attribute.append(helper.make_attribute("ts", [external("attributes", "5")]))
    sub = helper.make_graph([], "sub", [], [], [external("subgraph", "6")])
    node.attribute.append(helper.make_attribute("g", helper.make_graph([helper.make_node("If", [], [], b=sub)], "outer", [], [])))
    node.attribute.append(helper.make_attribute("gs", [helper.make_graph([], "sub", [], [], [external("subgraphs", "7")])]))
    node.attribute.add(name="s", type=onnx.AttributeProto.SPARSE_TENSOR).sparse_tensor.values.CopyFrom(external("sparse attribute", "8"))
    node.attribute.add(name="ss", type=onnx.AttributeProto.SPARSE_TENSORS).sparse_tensors.add(values=external("sparse attributes", "9"))
    constant = helper.make_node("Constant", [], ["c"], value=external("function", "10"))
    function = helper.make_function("d", "f", [], ["c"], [constant], [helper.make_opsetid("", 23)])
    function.attribute_proto.append(helper.make_attribute("default", external("function default", "11")))
    model.functions.append(function)
    model.training_info.add().initialization.initializer.append(external("training", "12"))
    model.training_info[0].algorithm.initializer.append(external("training step", "13"))
    return model


def test_no_place_is_overlooked() -> None:
    entries = read_entries(memoryview(every_place().SerializeToString()))
    assert sorted(int(entry.location) for entry in entries) == list(range(1, 14))
    assert {(entry.offset, entry.length) for entry in entries} == {(0, 16)}


def test_a_tensor_that_does_not_call_itself_external_counts() -> None:
    """Readers merge repeated messages, so data_location may come from another copy."""
    tensor = external("w", "../x")
    tensor.data_location = TensorProto.DEFAULT
    assert [entry.location for entry in read_entries(memoryview(model_with(tensor).SerializeToString()))] == ["../x"]


def test_nesting_does_not_exhaust_the_stack() -> None:
    graph = wrapped(external("w", "deep").SerializeToString(), 5)  # an initializer
    for _ in range(3000):
        graph = wrapped(graph, 6, 5, 1)  # an attribute's graph, a node's attribute, a graph's node
    assert [entry.location for entry in read_entries(memoryview(wrapped(graph, 7)))] == ["deep"]


def wrapped(payload: bytes, *fields: int) -> bytes:
    """The payload as a message field of a message field …, innermost first."""
    for number in fields:
        payload = bytes([number << 3 | 2]) + varint(len(payload)) + payload
    return payload


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


WHOLE = every_place().SerializeToString()


@settings(max_examples=300, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=4), cut=st.integers(0, len(WHOLE)))
def test_malformed_bytes_are_a_model_error_or_read(edits: list[tuple[int, int]], cut: int) -> None:
    content = bytearray(WHOLE[:cut])
    for at, byte in edits:
        if at < len(content):
            content[at] = byte
    try:
        read_entries(memoryview(bytes(content)))
    except ModelError as error:
        assert error.hint


@given(content=st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_whatever_onnx_reads_as_external_is_seen(content: bytes) -> None:
    """Bytes that protobuf accepts with a graph show us at least the tensors that protobuf shows."""
    model = onnx.ModelProto()
    noisy = model_with(external("w", "w.data")).SerializeToString() + content
    try:
        model.ParseFromString(noisy)
    except Exception:
        return
    try:
        seen = {entry.location for entry in read_entries(memoryview(noisy))}
    except ModelError:
        return
    assert {pair.value for tensor in model.graph.initializer for pair in tensor.external_data if pair.key == "location"} <= seen


def not_models(tmp_path: Path) -> dict[str, Path]:
    files = {"empty": b"", "text": b"this is not a model\n" * 9, "random": np.random.default_rng(0).bytes(999), "no graph": b"\x08\x0a"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return {**{name: tmp_path / name for name in files}, "folder": tmp_path, "missing": tmp_path / "missing.onnx"}


@pytest.mark.parametrize("name", ["empty", "text", "random", "no graph", "folder", "missing"])
def test_what_is_no_model_is_said_to_be_none(name: str, tmp_path: Path) -> None:
    for read in (check_external_paths, source_sha256):
        with pytest.raises(ModelError) as caught:
            read(not_models(tmp_path)[name])
        assert caught.value.hint
        assert str(tmp_path) in caught.value.message


def test_a_gguf_file_is_sent_to_the_import(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03" + bytes(99))
    with pytest.raises(ModelError, match="GGUF") as caught:
        check_external_paths(tmp_path / "model.gguf")
    assert "octavo import" in caught.value.hint


def test_the_hash_covers_graph_and_data_and_nothing_else(folder: Path) -> None:
    path = write(folder, external("w", "w.data"))
    before = source_sha256(path)
    (folder / "unrelated.txt").write_text("x")
    assert source_sha256(path) == before
    (folder / "w.data").write_bytes(np.arange(1, 5, dtype=np.float32).tobytes())
    changed = source_sha256(path)
    assert changed != before
    path.write_bytes(path.read_bytes() + b"\x12\x00")  # a producer name: another graph file, the same data
    assert source_sha256(path) not in (before, changed)
    moved = folder.with_name("moved")
    folder.rename(moved)
    assert source_sha256(moved / "model.onnx") not in (before, changed)


def test_the_check_needs_no_package(folder: Path) -> None:
    path = write(folder, external("w", "w.data"))
    code = (
        "import sys\n"
        "for name in ('onnx', 'onnx_ir', 'numpy', 'google'): sys.modules[name] = None\n"
        "from octavo.models.external_data import check_external_paths\n"
        f"assert len(check_external_paths({str(path)!r})) == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
