"""The numeric stage on a tiny decoder: every seeded fault is found and located, and nothing is found where nothing is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import octavo
import onnx
import onnx_ir as ir
import pytest
from octavo.compiler.diff.numeric import Side, compare_numbers
from octavo.compiler.diff.source import read_snapshot
from octavo.errors import OptionError
from octavo.models.tiny import tiny_llama_onnx
from octavo.passes.attention.lower_paged import LowerPaged
from octavo.passes.attention.packed_rows import PackedRows
from octavo.passes.cache_interface import CacheInterface
from octavo.passes.logits import LogitRows
from octavo.passes.normalize import Normalize
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


def _mask(model: ModelProto) -> None:
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
    "mask off by one": (_mask, "Less", "mask"), "wrong rotary base": (_base, "RotaryEmbedding", "layers.0"),
    "sign bit of a weight": (_bit(31), "MatMul", "layers.1.mlp.up_proj"), "exponent bit of a weight": (_bit(23), "MatMul", "layers.1.mlp.up_proj"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_found_and_located(source, tmp_path, fault):
    change, op, place = FAULTS[fault]
    found = octavo.diff(source, variant(source, tmp_path / "bad", change), numeric=True)
    assert found.moved and found.exit_code == 1 and found.edits, found.to_text()
    assert found.numbers is not None and found.numbers.first is not None, found.to_text()
    first = found.numbers.first
    assert first.op == op and place in first.after, first
    assert first.inputs == 0 and first.relative > 0
    assert "first divergent node" in found.to_text()


def windowed(size: int) -> Callable[[ModelProto], None]:
    """A key is seen while it is less than `size` positions behind the query."""
    def change(model: ModelProto) -> None:
        causal = _node(model, "LessOrEqual")
        at = list(model.graph.node).index(causal) + 1
        both, causal.output[0] = causal.output[0], "window/causal"
        nodes = [
            helper.make_node("Sub", [causal.input[1], "window"], ["window/far"], name="window/far"),
            helper.make_node("Greater", [causal.input[0], "window/far"], ["window/near"], name="window/near"),
            helper.make_node("And", ["window/causal", "window/near"], [both], name="window/window"),
        ]
        for k, node in enumerate(nodes):
            model.graph.node.insert(at + k, node)
        model.graph.initializer.append(numpy_helper.from_array(np.array(size, np.int64), "window"))

    return change


def test_a_window_off_by_one_is_found_and_located(source, tmp_path):
    good, bad = (variant(source, tmp_path / str(size), windowed(size)) for size in (8, 9))
    found = octavo.diff(good, bad, numeric=True)
    assert found.moved and [edit.kind for edit in found.edits] == ["constant"]
    assert found.numbers.first.op == "Sub" and "window/far" in found.numbers.first.after
    assert {case.runs for case in found.numbers.cases if not case.ok} >= {"as they run", "fp32 cache", "fp16 cache", "int8 cache"}
    for path in (good, bad):
        report = octavo.compile(path, path.parent / "art")
        assert all("window" in site.mask for site in report.sites)
    between = octavo.diff(good.parent / "art", bad.parent / "art", numeric=True)
    assert between.moved and between.numbers.first.op == "ai.octavo::PagedAttention" and between.numbers.first.inputs == 0
    assert any("local_window_size 8 → 9" in edit.line for edit in between.edits)


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
        count = threads if len(calls) in (3, 5, 7, 9) else 2
        return octavo.load(path, options=octavo.RuntimeOptions(optimize_graph=fusions, threads=count))

    snapshot = read_snapshot(source)
    found = compare_numbers(Side.open(source, snapshot), Side.open(source, snapshot), load=load)
    assert found.ok and len(calls) == 9 and found.first is None and len(found.cases) == 8 + 3 * 8
    assert all(case.mean_kl < 1e-12 for case in found.cases)


def test_a_good_compile_has_moved_nowhere(source, artifact):
    found = octavo.diff(source, artifact, numeric=True)
    assert not found.moved and not found.same and found.exit_code == 1
    assert {case.runs for case in found.numbers.cases} == {"as they run", "fp32", "fp32 cache", "fp16 cache", "int8 cache"}
    assert len({case.case for case in found.numbers.cases if case.runs == "int8 cache"}) == 8, "the whole state machine"
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


# Which pass did it.


def _broken(monkeypatch, cls: type, change: Callable[[ir.Model], None]) -> None:
    """A pass that does its work and then `change`."""
    real = cls.call

    def call(self, model):
        result = real(self, model)
        change(model)
        return result

    monkeypatch.setattr(cls, "call", call)


def _louder(model: ir.Model) -> None:
    value = next(value for name, value in model.graph.initializers.items() if "layers.1.mlp.up_proj" in name)
    array = value.const_value.numpy().copy()
    array[0] *= 1.3
    value.const_value = ir.Tensor(array, name=value.name)


def _rescaled(model: ir.Model) -> None:
    node = [node for node in model.graph if node.op_type == "PagedAttention"][1]
    node.attributes["scale"] = ir.AttrFloat32("scale", node.attributes["scale"].as_float() * 1.01)


def _crossed(model: ir.Model) -> None:
    node = next(node for node in model.graph if node.op_type == "Mul")
    node.replace_input_with(1, node.inputs[0])


BROKEN = {
    "normalize": (Normalize, _louder, "MatMul"), "lower_paged": (LowerPaged, _rescaled, "PagedAttention"), "logit_rows": (LogitRows, _louder, "MatMul"),
    "cache_interface": (CacheInterface, _crossed, "Mul"), "packed_rows": (PackedRows, _louder, "MatMul"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_pass_that_broke_a_model_is_named(source, tmp_path, monkeypatch, name):
    cls, change, op = BROKEN[name]
    _broken(monkeypatch, cls, change)
    octavo.compile(source, tmp_path / "art")
    found = octavo.diff(source, tmp_path / "art", numeric=True)
    fault = found.numbers.fault
    assert found.moved and fault is not None and fault.stage == name, found.to_text()
    assert fault.before < 1e-5 < fault.after and fault.first is not None and op in str(fault.first)
    assert f"introduced by the pass {name}" in found.to_text() and f"Introduced by the pass `{name}" in found.to_markdown()
    if name == "lower_paged":
        assert octavo.diff(tmp_path / "art", source, numeric=True).numbers.fault.stage == name, "whichever side is the artifact"


def test_no_pass_is_blamed_for_what_none_did(source, artifact, tmp_path, monkeypatch):
    """An artifact whose graph was changed afterwards, and one of another source."""
    octavo.compile(source, tmp_path / "art", options=octavo.CompileOptions(kv_cache="fp32"))
    model = onnx.load(tmp_path / "art" / "model.onnx", load_external_data=False)
    next(a for node in model.graph.node if node.op_type == "PagedAttention" for a in node.attribute if a.name == "scale").f *= 1.1
    onnx.save(model, tmp_path / "art" / "model.onnx")
    numbers = octavo.diff(source, tmp_path / "art", numeric=True).numbers
    assert not numbers.ok and numbers.fault is None and any("no pass moves the numbers" in note for note in numbers.notes)
    numbers = octavo.diff(variant(source, tmp_path / "bad", _scale), artifact, numeric=True).numbers
    assert not numbers.ok and numbers.fault is None and any("is not the file" in note for note in numbers.notes)
