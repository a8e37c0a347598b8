"""What reading costs and what it never does: weights stay on disk, nothing runs, hostile files get a typed answer."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
from octavo.compiler.diff.hashing import CHUNK, Hasher, digest_of
from octavo.compiler.diff.parse import parse
from octavo.compiler.diff.source import read_snapshot
from octavo.compiler.diff.write import write
from octavo.errors import ModelError, OctavoError, UnsafePathError
from onnx import TensorProto, helper, numpy_helper

# How many broken files `make test` reads; the whole run is OCTAVO_FUZZ=10000.
FUZZED = int(os.environ.get("OCTAVO_FUZZ", "300"))

_PEAK = r"""
import re, sys
import octavo
text = octavo.snapshot(sys.argv[1])
loaded = [m for m in ("onnxruntime", "onnxscript", "onnx_ir", "torch", "tokenizers") if m in sys.modules]
peak = int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1]) // 1024
print(len(text), peak, *loaded)
"""


def _weight(name: str, location: str, nbytes: int) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.UINT8, dims=[nbytes], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", str(nbytes))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def _model(weights: list[TensorProto]) -> onnx.ModelProto:
    nodes = [helper.make_node("Add", ["x" if i == 0 else f"y{i - 1}", tensor.name], [f"y{i}"]) for i, tensor in enumerate(weights)]
    info = [helper.make_tensor_value_info(name, TensorProto.UINT8, None) for name in ("x", f"y{len(weights) - 1}")]
    return helper.make_model(helper.make_graph(nodes, "g", info[:1], info[1:], weights), opset_imports=[helper.make_opsetid("", 18)])


@pytest.mark.parametrize("external", [True, False], ids=["external", "in the file"])
def test_a_large_model_is_hashed_in_little_memory_and_no_runtime_is_loaded(tmp_path, external):
    """400 MB (sparse zeros) in far less: the peak of the process with Python, NumPy and onnx in it is under 200 MB."""
    size = 400 << 20
    path = tmp_path / "m.onnx"
    if external:
        with (tmp_path / "w").open("wb") as stream:
            stream.truncate(size)
        path.write_bytes(_model([_weight("w", "w", size)]).SerializeToString())
    else:
        # A field of raw bytes that protobuf would copy: written by hand, so that this test doesn't hold it either.
        empty = _model([TensorProto(name="w", data_type=TensorProto.UINT8, dims=[size], raw_data=b"")])
        path.write_bytes(_with_payload(empty, size))
        with path.open("r+b") as stream:
            stream.truncate(path.stat().st_size + size)
    out = subprocess.run([sys.executable, "-c", _PEAK, str(path)], capture_output=True, text=True, check=True).stdout.split()
    assert int(out[1]) < 200 and out[2:] == [], out


def _with_payload(model: onnx.ModelProto, size: int) -> bytes:
    """The model, whose one tensor's raw data has `size` bytes that follow after what is returned."""

    def varint(value: int) -> bytes:
        return bytes([value & 0x7F | 0x80]) + varint(value >> 7) if value > 0x7F else bytes([value])

    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    head = tensor.SerializeToString() + b"\x4a" + varint(size)
    graph = onnx.GraphProto()
    graph.CopyFrom(model.graph)
    graph.ClearField("initializer")
    inner = graph.SerializeToString() + b"\x2a" + varint(len(head) + size) + head
    model.ClearField("graph")
    return model.SerializeToString() + b"\x3a" + varint(len(inner) + size) + inner


def test_hashes_are_remembered_and_forgotten(tmp_path, monkeypatch):
    """A second read opens the cache and not the data; another size, time stamp or content is hashed again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "w"
    file.write_bytes(bytes(1000))
    old = time.time() - 100
    os.utime(file, (old, old))
    monkeypatch.setattr("octavo.compiler.diff.hashing._SETTLED", -1.0)      # ctime can't be set back

    def digest() -> str:
        hasher = Hasher()
        found = hasher.digest(file, 100, 800)
        hasher.close()
        return found

    expected = digest_of([bytes(800)])
    assert digest() == expected
    (cached,) = (tmp_path / "cache" / "octavo" / "hashes").iterdir()
    data = json.loads(cached.read_text())
    cached.write_text(json.dumps({**data, "hashes": {"100+800": "sha256:remembered"}}))
    assert digest() == "sha256:remembered"
    os.utime(file, (old + 1, old + 1))
    assert digest() == expected
    cached.write_text("not JSON")
    assert digest() == expected


def test_hashes_of_what_is_longer_than_a_chunk_are_those_of_the_bytes(tmp_path):
    data = np.random.default_rng(0).bytes(2 * CHUNK + 12345)
    (tmp_path / "w").write_bytes(data)
    hasher = Hasher()
    assert hasher.digest(tmp_path / "w", 7, len(data) - 7) == f"sha256:{hashlib.sha256(data[7:]).hexdigest()[:32]}"
    with pytest.raises(ModelError, match="ends before"):
        hasher.digest(tmp_path / "w", 0, len(data) + 1)
    hasher.close()


def test_a_graph_made_to_be_slow_is_folded_in_bounds(tmp_path):
    """A hundred different repeats one after the other: only so many are looked for, and the text still reads back."""
    nodes, last = [], "x"
    for k in range(100):
        for i in range(12):
            nodes.append(helper.make_node(f"Op{k}_{i % 4}", [last], [f"v{k}_{i}"], domain="test"))
            last = f"v{k}_{i}"
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", last)]
    model = helper.make_model(helper.make_graph(nodes, "g", info[:1], info[1:]), opset_imports=[helper.make_opsetid("test", 1)])
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    snapshot = read_snapshot(tmp_path / "m.onnx")
    text = write(snapshot)
    assert 0 < text.count("repeat ") <= 64 and parse(text) == snapshot


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "w").write_bytes(bytes(1000))
    hasher = Hasher()
    hasher.digest(tmp_path / "w", 0, 1000)
    hasher.close()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("location", ["../w", "/etc/passwd", "a/../../w", "link"])
def test_data_outside_the_folder_is_never_opened(tmp_path, location):
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "w").write_bytes(bytes(64))
    (folder / "link").symlink_to(tmp_path / "w")
    (folder / "m.onnx").write_bytes(_model([_weight("w", location, 64)]).SerializeToString())
    with pytest.raises(UnsafePathError):
        read_snapshot(folder / "m.onnx")


def test_a_mark_in_a_files_own_text_is_no_place(tmp_path):
    """What the reader writes into `doc_string` for itself a file can't forge."""
    tensor = numpy_helper.from_array(np.zeros(20, np.uint8), "w")
    tensor.doc_string = "0123456789abcdef:0"
    (tmp_path / "m.onnx").write_bytes(_model([tensor]).SerializeToString())
    assert digest_of([bytes(20)]) in write(read_snapshot(tmp_path / "m.onnx"))


@pytest.mark.parametrize("array", [
    np.arange(2000, dtype=np.int64), np.arange(2000, dtype=np.float32), np.arange(2000, dtype=np.float16), np.arange(2000, dtype=np.float64),
    np.arange(2000) % 2 == 0, np.arange(2000, dtype=np.uint8),
], ids=lambda a: str(a.dtype))
def test_a_tensor_is_the_same_in_every_field_that_can_hold_it(tmp_path, array):
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    values = array.view(np.uint16) if array.dtype == np.float16 else array
    typed = helper.make_tensor("w", kind, array.shape, array.ravel().tolist()) if array.dtype != np.float16 else TensorProto(
        name="w", data_type=kind, dims=array.shape, int32_data=[int(v) for v in values])
    texts = []
    for tensor in (numpy_helper.from_array(array, "w"), typed):
        (tmp_path / "m.onnx").write_bytes(_model([tensor]).SerializeToString())
        texts.append(write(read_snapshot(tmp_path / "m.onnx")))
    assert texts[0] == texts[1] and "sha256:" in texts[0]


def test_three_thousand_nodes_with_layers(tmp_path):
    """64 layers of 50 nodes fold into one body; the time is printed, not asserted."""
    nodes, weights, last = [], [], "x"
    for layer in range(64):
        first = last
        for i in range(49):
            out = f"n{layer}_{i}"
            if i % 5 == 0:
                weights.append(numpy_helper.from_array(np.full(30, layer * 50 + i, np.float32), f"w{layer}_{i}"))
                nodes.append(helper.make_node("Mul", [last, weights[-1].name], [out]))
            else:
                nodes.append(helper.make_node("Relu" if i % 2 else "Neg", [last], [out]))
            last = out
        nodes.append(helper.make_node("Add", [last, first], [f"r{layer}"]))
        last = f"r{layer}"
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", last)]
    model = helper.make_model(helper.make_graph(nodes, "g", info[:1], info[1:], weights), opset_imports=[helper.make_opsetid("", 18)])
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    start = time.perf_counter()
    text = write(read_snapshot(tmp_path / "m.onnx"))
    print(f"{len(nodes)} nodes in {time.perf_counter() - start:.2f} s")
    assert "repeat 64 r0" in text and text.count("Mul(") == 10


def test_broken_files_get_a_typed_answer(decoder, tmp_path):
    """Cuts, flipped and overwritten bytes, pieces doubled or left out: each file is read or refused, never anything else."""
    rng = random.Random(0)
    onnx.save(onnx.load(decoder), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=256)
    seeds = [(tmp_path / "m.onnx").read_bytes(), _small(), write(read_snapshot(decoder)).encode()]
    answers = {"read": 0, "refused": 0}
    path = tmp_path / "fuzzed"
    for _ in range(FUZZED):
        path.write_bytes(_fuzzed(bytearray(rng.choice(seeds)), rng))
        try:
            write(read_snapshot(path))
            answers["read"] += 1
        except OctavoError as error:
            assert isinstance(error, ModelError)
            answers["refused"] += 1
    print(answers)
    assert answers["refused"] > FUZZED // 10 and answers["read"] > 0


def _small() -> bytes:
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 18, "f" : 1]>
    g (float[n, 4] x, bool flag) => (float[n, 4] y) <float[4] w = {1, 2, 3, 4}> {
        a = Softmax<axis = 1>(x)
        c = f.twice(a)
        y = If(flag)<then_branch = t () => (float e) { e = Mul(c, w) }, else_branch = f () => (float h) { h = Neg(c) }>
    }
    <opset_import: ["" : 18], domain: "f">
    twice (a) => (b) { b = Add(a, a) }""")
    return model.SerializeToString()


def _fuzzed(data: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.choice([1, 1, 1, 3])):
        at = rng.randrange(len(data) or 1)
        kind = rng.randrange(6)
        if kind == 0:
            del data[at:]
        elif kind == 1 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2 and data:
            data[at] = rng.randrange(256)
        elif kind == 3:
            data[at:at] = data[at : at + rng.randrange(1, 40)]
        elif kind == 4:
            del data[at : at + rng.randrange(1, 40)]
        else:
            data[at:at] = rng.randbytes(rng.randrange(1, 8))
        if not data:
            break
    return bytes(data) or b"\0"
