"""The numeric stage on a tiny decoder: every seeded fault is found and located, and nothing is found where nothing is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import octavo
import onnx
import pytest
from octavo.compiler.diff.numeric import Side, compare_numbers
from octavo.compiler.diff.source import read_snapshot
from octavo.errors import OptionError
from octavo.models.tiny import tiny_llama_onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny_llama_onnx(tmp_path_factory.mktemp("numeric"))


@pytest.fixture(scope="module")
def artifact(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("numeric") / "art"
    assert octavo.compile(source, folder, options=octavo.CompileOptions(kv_cache="fp16")).kind == "paged"
    return folder


def variant(source: Path, folder: Path, change: Callable[[ModelProto], None]) -> Path:
    model = onnx.load(source)
    change(model)
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(source.parent / name, folder)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def _node(model: ModelProto, op: str, which: int = 0) -> onnx.NodeProto:
    return [node for node in model.graph.node if node.op_type == op][which]


def _scale(model: ModelProto) -> None:
    next(a for a in _node(model, "Attention", 1).attribute if a.name == "scale").f *= 1.01


def _swapped(model: ModelProto) -> None:
    """The halves of a gate: sigmoid of the other operand."""
    node = _node(model, "RotaryEmbedding", 2)
    node.input[1], node.input[2] = node.input[2], node.input[1]


def _window(model: ModelProto) -> None:
    """Keys at or before the query become keys before it: the mask's comparison is off by one."""
    _node(model, "LessOrEqual").op_type = "Less"


def _base(model: ModelProto) -> None:
    for name, function in (("cos", np.cos), ("sin", np.sin)):
        tensor = next(t for t in model.graph.initializer if t.name == f"rotary.{name}")
        rows, half = tensor.dims
        angles = np.arange(rows)[:, None] * 10_100.0 ** (-np.arange(half) / half)
        tensor.CopyFrom(numpy_helper.from_array(function(angles).astype(np.float32), tensor.name))


def _bit(bit: int) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if "layers.1.mlp.up_proj" in t.name)
        array = numpy_helper.to_array(tensor).copy()
        at = np.unravel_index(np.abs(array).argmax(), array.shape)
        array.view(np.uint32)[at] ^= np.uint32(1 << bit)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    return change


FAULTS = {
    "scale off by 1 %": (_scale, "Attention", "layers.1"), "swapped inputs": (_swapped, "RotaryEmbedding", "layers.1"),
    "mask off by one": (_window, "Less", "mask"), "wrong rotary base": (_base, "RotaryEmbedding", "layers.0"),
    "sign bit of a weight": (_bit(31), "MatMul", "layers.1.mlp.up_proj"), "exponent bit of a weight": (_bit(23), "MatMul", "layers.1.mlp.up_proj"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_found_and_located(source, tmp_path, fault):
    change, op, place = FAULTS[fault]
    found = octavo.diff(source, variant(source, tmp_path / "bad", change), numeric=True)
    assert found.moved and found.exit_code == 1 and found.edits, found.to_text()
    assert found.numbers is not None and found.numbers.first is not None, found.to_text()
    first = found.numbers.first
    # A comparison of another op is no match of the old one: what reads it is the first that can be told.
    assert (first.op == op or fault == "mask off by one") and (place in first.after or fault == "mask off by one"), first
    assert first.inputs == 0 and first.relative > 0
    assert "first divergent node" in found.to_text()


@pytest.mark.parametrize("fault", ["scale off by 1 %", "exponent bit of a weight"])
def test_a_fault_in_a_compiled_model_is_located_to_its_layer(source, artifact, tmp_path, fault):
    """Between an export and what it was compiled to only some nodes match, and caches round: the twin with fp32 caches tells."""
    octavo.compile(variant(source, tmp_path / "bad", FAULTS[fault][0]), tmp_path / "art", options=octavo.CompileOptions(kv_cache="fp16"))
    found = octavo.diff(source, tmp_path / "art", numeric=True).numbers
    assert found is not None and not found.ok and found.first is not None
    assert {case.runs for case in found.cases if not case.ok} >= {"fp32"}
    between = octavo.diff(artifact, tmp_path / "art", numeric=True)
    assert between.numbers is not None and between.numbers.first is not None
    assert between.numbers.first.op == {"scale off by 1 %": "ai.octavo::PagedAttention"}.get(fault, "MatMul")


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_graph_at_another_thread_count_has_moved_nowhere(source, threads):
    """The control: fp32 runs with another number of threads on the new side."""
    calls = []

    def load(path, fusions):
        calls.append(path)
        count = threads if len(calls) == 3 else 2
        return octavo.load(path, options=octavo.RuntimeOptions(optimize_graph=fusions, threads=count))

    snapshot = read_snapshot(source)
    found = compare_numbers(Side.open(source, snapshot), Side.open(source, snapshot), load=load)
    assert found.ok and len(calls) == 3 and found.first is None and len(found.cases) == 8


def test_a_good_compile_has_moved_nowhere(source, artifact):
    found = octavo.diff(source, artifact, numeric=True)
    assert not found.moved and not found.same and found.exit_code == 1
    assert {case.runs for case in found.numbers.cases} == {"as they run", "fp32"}
    assert found.numbers.worst("max_perplexity")[0] < 1e-2 and found.numbers.worst("min_top1")[0] == 1


def test_structure_alone_never_loads_a_model(source, artifact, monkeypatch):
    def load(path, fusions):
        raise AssertionError("loaded")

    from octavo.compiler.diff import diff

    assert not diff(source, artifact, load=load).same


def test_a_graph_that_is_no_decoder(tmp_path):
    weight = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    for name, factor in (("a", 1.0), ("b", 1.001)):
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Softmax", ["y"], ["p"])], "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])], [helper.make_tensor_value_info("p", TensorProto.FLOAT, ["n", 4])],
            [numpy_helper.from_array(weight * np.float32(factor), "w")],
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / f"{name}.onnx")
    assert not octavo.diff(tmp_path / "a.onnx", tmp_path / "a.onnx", numeric=True).moved
    found = octavo.diff(tmp_path / "a.onnx", tmp_path / "b.onnx", numeric=True)
    assert found.moved and found.numbers.first.op == "MatMul" and "no decoder" in found.numbers.notes[0]


def test_policies_about_figures_run_the_models(source, artifact, tmp_path):
    policy = tmp_path / "octavo.diff.toml"
    policy.write_text('rules = ["max_kl 1e-4", "min_top1 0.99", "max_perplexity 0.01"]')
    found = octavo.diff(source, artifact, policy=policy)
    assert found.numbers is not None and found.ok and found.exit_code == 1
    policy.write_text('rules = ["max_relative 1e-5", "min_top1 0.1"]')
    bad = octavo.diff(source, variant(source, tmp_path / "bad", _base), policy=policy)
    assert bad.exit_code == 2 and [verdict.ok for verdict in bad.verdicts] == [False, True]
    snapshot = tmp_path / "a.graph.txt"
    snapshot.write_text(octavo.snapshot(source))
    with pytest.raises(OptionError, match="snapshot"):
        octavo.diff(snapshot, source, policy=policy)
    assert not octavo.diff(snapshot, source, policy=policy, numeric=False).ok, "a rule that can't be judged does not pass"


def test_numbers_read_as_json(source, artifact):
    data = json.loads(json.dumps(octavo.diff(source, artifact, numeric=True).to_json()))
    assert data["numbers"]["ok"] is True and data["moved"] is False and data["numbers"]["cases"][0]["rows"] > 0
