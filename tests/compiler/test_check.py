"""`check` passes what is right and fails what is wrong: an untouched artifact, and artifacts with one fault put into their graph."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import octavo
import onnx
import pytest
from octavo.compiler.check import CheckReport, compare, dequantized
from octavo.compiler.thresholds import Limits, quality
from octavo.custom_ops.contract import CHUNK
from octavo.errors import ArtifactError, ModelError
from octavo.models.tiny import tiny_llama_onnx
from onnx import TensorProto, helper, numpy_helper

LIMITS = Limits(relative=1e-3, mean_kl=1e-6, top1=0.9)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny_llama_onnx(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def artifacts(source, tmp_path_factory) -> dict[str, Path]:
    """Compiled once for each cache format, and not changed."""
    folder = tmp_path_factory.mktemp("artifacts")
    for cache in ("fp32", "fp16", "int8"):
        assert octavo.compile(source, folder / cache, options=octavo.CompileOptions(kv_cache=cache)).kind == "paged"
    return {cache: folder / cache for cache in ("fp32", "fp16", "int8")}


# What is right passes.


@pytest.mark.parametrize("cache", ["fp32", "fp16", "int8"])
def test_an_untouched_artifact_passes(artifacts, source, cache):
    report = octavo.check(artifacts[cache], source)
    assert report.ok, report.to_text()
    assert {result.comparison for result in report.results} == {"reference", "original", *(["rewrite"] if cache != "fp32" else [])}
    cases = [result.case for result in report.results if result.comparison == "reference"]
    assert cases == [
        "predict", "prefill", "chunks of 1", "chunks of 7", "decode over a past", "mixed batch", "after fork", "after truncate",
    ]
    (note,) = report.notes
    assert str(CHUNK + 40) in note and "up to 512" in note, "positions that no case reaches are named"


@pytest.mark.parametrize("kind, options", [("contiguous", {"paged": False}), ("stateless", {"kv_cache": False})])
def test_the_other_kinds_are_checked_too(source, tmp_path, kind, options):
    octavo.compile(source, tmp_path / "art", options=octavo.CompileOptions(**options))
    report = octavo.check(tmp_path / "art", source)
    assert report.kind == kind and report.ok, report.to_text()


def test_a_graph_that_is_no_decoder_is_compared_on_its_own_inputs(tmp_path):
    weight = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Softmax", ["y"], ["p"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(weight, "w")],
    )
    for name, scale in (("a", 1.0), ("b", 1.001)):
        graph.initializer[0].CopyFrom(numpy_helper.from_array(weight * np.float32(scale), "w"))
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / f"{name}.onnx")
    octavo.compile(tmp_path / "a.onnx", tmp_path / "art")
    good, bad = octavo.check(tmp_path / "art", tmp_path / "a.onnx"), octavo.check(tmp_path / "art", tmp_path / "b.onnx")
    assert good.ok, good.to_text()
    assert "no decoder" in good.notes[0] and good.results[0].mean_kl is None and "–" in good.to_text()
    assert not bad.ok


# What is wrong fails, in the comparison that decides.


def _attentions(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    nodes = [node for node in model.graph.node if node.op_type == "PagedAttention"]
    assert nodes
    return nodes


def _insert(model: onnx.ModelProto, node: onnx.NodeProto, index: int, op: str, operands: Callable[[str], list[str]], **attributes) -> None:
    """Puts `op` between input `index` of `node` and what feeds it."""
    new = helper.make_node(op, operands(node.input[index]), [f"{node.output[0]}/{op}"], **attributes)
    node.input[index] = new.output[0]
    model.graph.node.insert(list(model.graph.node).index(node), new)


def _constant(model: onnx.ModelProto, array: np.ndarray) -> str:
    name = f"fault_{len(model.graph.initializer)}"
    model.graph.initializer.append(numpy_helper.from_array(array, name))
    return name


def _scale_off_by_one_percent(model: onnx.ModelProto) -> None:
    for node in _attentions(model):
        scale = next(a for a in node.attribute if a.name == "scale")
        assert scale.f > 0
        scale.f *= 1.01


def _two_heads_swapped(model: onnx.ModelProto) -> None:
    node = _attentions(model)[0]
    heads = next(a.i for a in node.attribute if a.name == "num_heads")
    order = np.arange(heads * 16).reshape(heads, 16)[[1, 0, *range(2, heads)]].ravel()
    _insert(model, node, 0, "Gather", lambda value: [value, _constant(model, order)], axis=-1)


def _written_one_slot_off(model: onnx.ModelProto) -> None:
    """Key and value of one layer go into the slot before their own."""
    _insert(model, _attentions(model)[0], 10, "Sub", lambda value: [value, _constant(model, np.array(1, np.int32))])


def _key_of_the_token_before(model: onnx.ModelProto) -> None:
    """Of one layer alone the key is one slot off: the rows of a step are rolled by one."""
    node = _attentions(model)[-1]
    # (rows 1 … T−1 and row 0): the slices of [k; k] from 1 to T + 1
    one = _constant(model, np.array([1], np.int64))
    zero = _constant(model, np.array([0], np.int64))
    rows = _constant(model, np.array([-2], np.int64))
    far = _constant(model, np.array([2**31], np.int64))
    at = list(model.graph.node).index(node)
    key = node.input[1]
    for new in (
        helper.make_node("Slice", [key, one, far, rows], ["fault/tail"]),
        helper.make_node("Slice", [key, zero, one, rows], ["fault/head"]),
        helper.make_node("Concat", ["fault/tail", "fault/head"], ["fault/rolled"], axis=-2),
    ):
        model.graph.node.insert(at, new)
        at += 1
    node.input[1] = "fault/rolled"


def _one_weight_changed(model: onnx.ModelProto) -> None:
    """In the fault farthest from attention: the last norm of the graph is doubled in one of its channels."""
    node = [n for n in model.graph.node if n.op_type in ("MatMul", "Gemm")][-1]
    factor = np.ones(64, np.float32)
    factor[5] = 2
    _insert(model, node, 0, "Mul", lambda value: [value, _constant(model, factor)])


def _broken(artifact: Path, target: Path, fault: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy of the artifact with `fault` in its graph, and with a manifest that fits."""
    shutil.copytree(artifact, target)
    graph = target / "model.onnx"
    model = onnx.load(graph, load_external_data=False)
    fault(model)
    graph.write_bytes(model.SerializeToString())
    manifest = json.loads((target / "octavo.json").read_text())
    data = graph.read_bytes()
    manifest["files"]["model.onnx"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (target / "octavo.json").write_text(json.dumps(manifest))
    return target


FAULTS = [_scale_off_by_one_percent, _two_heads_swapped, _written_one_slot_off, _key_of_the_token_before, _one_weight_changed]


@pytest.mark.parametrize("cache", ["fp32", "fp16"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__.strip("_"))
def test_a_wrong_artifact_fails(artifacts, source, tmp_path, fault, cache):
    report = octavo.check(_broken(artifacts[cache], tmp_path / "art", fault), source)
    assert not report.ok
    assert any(not result.ok for result in report.results if result.comparison == "reference"), report.to_text()
    assert "FAILED" in report.to_text()


def _one_scale_off_by_a_thousandth(model: onnx.ModelProto) -> None:
    next(a for a in _attentions(model)[0].attribute if a.name == "scale").f *= 1.001


@pytest.mark.parametrize("cache", ["fp16", "int8"])
def test_a_fault_below_what_caches_round_is_seen_with_fp32_caches(artifacts, source, tmp_path, cache):
    report = octavo.check(_broken(artifacts[cache], tmp_path / "art", _one_scale_off_by_a_thousandth), source)
    by = {name: all(result.ok for result in report.results if result.comparison == name) for name in ("rewrite", "reference")}
    assert by == {"rewrite": False, "reference": True} and not report.ok, report.to_text()


def test_a_copy_without_a_fault_passes(artifacts, source, tmp_path):
    """The control of the controls: what `_broken` does besides the fault is harmless."""
    assert octavo.check(_broken(artifacts["fp32"], tmp_path / "art", lambda model: None), source).ok


# What can't be checked is an error that says so.


def test_changed_contents_are_found(artifacts, source, tmp_path):
    shutil.copytree(artifacts["fp32"], tmp_path / "art")
    weights = tmp_path / "art" / "model.onnx.data"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    octavo.load(tmp_path / "art").close()                       # sizes are all that load looks at
    with pytest.raises(ArtifactError, match="contents"):
        octavo.check(tmp_path / "art", source)


def test_a_source_that_is_missing_is_an_error(artifacts, tmp_path):
    with pytest.raises(ModelError):
        octavo.check(artifacts["fp32"], tmp_path / "nothing.onnx")


def test_another_source_is_noted(artifacts, tmp_path):
    other = tiny_llama_onnx(tmp_path / "other", seed=1)
    report = octavo.check(artifacts["fp32"], other)
    assert not report.ok and "not the file" in report.notes[0]


# The reference has fp32 weights and computes what the source computes.


def test_dequantized_source(tmp_path):
    rng = np.random.default_rng(0)
    quantized = rng.integers(-127, 127, (8, 4)).astype(np.int8)
    scale = rng.uniform(0.01, 0.1, 4).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=1), helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(quantized, "q"), numpy_helper.from_array(scale, "s")],
    )
    path = tmp_path / "q.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    result = onnx.load(dequantized(path, tmp_path))
    assert [node.op_type for node in result.graph.node] == ["MatMul"]
    (weight,) = (numpy_helper.to_array(t) for t in result.graph.initializer)
    assert np.array_equal(weight, quantized.astype(np.float32) * scale)


def test_a_source_without_quantized_weights_is_its_own_reference(source, tmp_path):
    assert dequantized(source, tmp_path) == source and not list(tmp_path.iterdir())


# Figures and verdicts.


def test_figures_of_a_case():
    theirs = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], np.float32))
    ours = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]], np.float32))
    result = compare("reference", "x", ours, theirs, LIMITS)
    assert result.rows == 2 and result.top1 == 0.5
    assert result.mean_kl == pytest.approx(0.5 * (0.5 * np.log(2) - 0.25 * np.log(2)), rel=1e-5)
    assert result.max_abs == pytest.approx(np.log(2), rel=1e-5)
    assert result.relative == pytest.approx(np.log(2) / np.log(10), rel=1e-5)
    assert not result.ok


def test_a_constant_added_to_a_row_is_no_divergence():
    rows = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32)
    assert compare("reference", "x", rows + 100, rows, Limits(mean_kl=1e-6)).ok


def test_equal_logits_differ_by_nothing():
    rows = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32)
    result = compare("original", "x", rows, rows, Limits(relative=0, mean_kl=0, top1=1))
    assert (result.max_abs, result.mean_kl, result.top1) == (0, 0, 1) and result.ok


@pytest.mark.parametrize("ours", [
    np.full((2, 4), np.nan, np.float32), np.full((2, 4), np.inf, np.float32), np.zeros((1, 4), np.float32), np.zeros((2, 5), np.float32),
], ids=["nan", "inf", "rows", "width"])
def test_what_can_not_be_compared_fails(ours):
    assert not compare("reference", "x", ours, np.zeros((2, 4), np.float32), Limits(relative=1e9)).ok


@pytest.mark.parametrize("limits, ok", [
    (Limits(), True),
    (Limits(relative=0.2), True), (Limits(relative=0.05), False),
    (Limits(mean_kl=1), True), (Limits(mean_kl=1e-9), False),
    (Limits(top1=1.0), True),
])
def test_each_limit_decides_by_itself(limits, ok):
    theirs = np.array([[10.0, 0.0]], np.float32)
    assert compare("reference", "x", theirs + np.array([[-1.0, 0.0]], np.float32), theirs, limits).ok == ok


@pytest.mark.parametrize("rows, other, ok", [(1, 1, True), (5, 1, True), (5, 2, False), (100, 10, True), (100, 11, False)])
def test_top1_allows_one_row_and_then_its_share(rows, other, ok):
    theirs = np.tile(np.array([1.0, 0.0], np.float32), (rows, 1))
    ours = theirs.copy()
    ours[:other] = ours[:other, ::-1]
    assert compare("original", "x", ours, theirs, Limits(top1=0.9)).ok == ok


def test_an_unknown_threshold_is_refused():
    with pytest.raises(ArtifactError, match="'speed'"):
        quality({"relative": 1.0, "speed": 1.0})


def test_report_shows_every_limit_and_reads_as_json():
    theirs = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32)
    good = compare("reference", "prefill", theirs, theirs, LIMITS)
    bad = compare("original", "after fork", theirs + np.float32(0.3) * theirs[::-1], theirs, LIMITS)
    text = CheckReport("art", "model.onnx", "paged", (good, bad), ("a note",)).to_text()
    assert "1e-03" in text and "1e-06" in text and "0.90" in text and "a note" in text and "1 of 2" in text
    data = json.loads(json.dumps(CheckReport("art", "model.onnx", "paged", (good, bad)).to_json()))
    assert data["ok"] is False and [result["ok"] for result in data["results"]] == [True, False]
    assert CheckReport("art", "model.onnx", "paged", (good,)).ok
    assert not CheckReport("art", "model.onnx", "paged", ()).ok, "nothing compared is nothing shown"
