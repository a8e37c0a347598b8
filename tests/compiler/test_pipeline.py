"""Every option of a compile: the ops it leads to, the decision it records, and what it computes, through the public API."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import octavo
import onnx
import onnx_ir as ir
import pytest
from octavo.compiler import pipeline
from octavo.errors import ModelError, OptionError, RefusedError

IDS = np.random.default_rng(7).integers(0, 300, 70)


def _compile(source: Any, out: Path, **options: Any) -> tuple[octavo.CompileReport, Counter[str], dict[str, str]]:
    report = octavo.compile(source, out, options=octavo.CompileOptions(**options))
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    return report, Counter(node.op_type for node in graph.node), {d.feature: d.value for d in report.decisions}


def _relative_error(artifact: Path, source: Path) -> float:
    """Over prefill, and the same tokens through a cached sequence in chunks."""
    with octavo.load(source / "model.onnx", options=octavo.RuntimeOptions(optimize_graph=False)) as original:
        expected = original.predict(IDS)
    with octavo.load(artifact) as model, model.begin_session() as session:
        sequence = session.new_sequence()
        chunks = np.concatenate([sequence.append(IDS[a:b], rows="all") for a, b in ((0, 31), (31, 32), (32, 33), (33, 70))])
        return float(max(np.abs(rows - expected).max() for rows in (model.predict(IDS), chunks)) / np.abs(expected).max())


# The limits of rounded weights only tell a model from noise: random weights amplify rounding. That QuantLinear computes what its weights mean
# is held bit for bit in tests/custom_ops and tests/passes/linears.
OPTIONS: dict[str, tuple[dict[str, Any], str, str | None, dict[str, str], float]] = {
    # options, kind, attention op, decisions, relative error: rounding of fp32, or of keys and values to fp16
    "default": ({}, "paged", "PagedAttention", {"paged": "on", "kv_cache": "paged", "kv_precision": "fp16", "flash_attention": "off"}, 5e-3),
    "kv_cache fp32": ({"kv_cache": "fp32"}, "paged", "PagedAttention", {"kv_precision": "fp32"}, 1e-5),
    "kv_cache fp16": ({"kv_cache": "fp16"}, "paged", "PagedAttention", {"kv_precision": "fp16"}, 5e-3),
    "kv_cache int8": ({"kv_cache": "int8"}, "paged", "PagedAttention", {"kv_precision": "int8"}, 0.1),
    "kv_cache False": ({"kv_cache": False}, "stateless", "FlashAttention", {"kv_cache": "off", "paged": "off", "flash_attention": "on"}, 1e-5),
    "no cache, no flash": ({"kv_cache": False, "flash_attention": False}, "stateless", "Attention", {"flash_attention": "off"}, 1e-5),
    "paged False": ({"paged": False}, "contiguous", "GroupQueryAttention", {"paged": "off", "kv_cache": "contiguous", "kv_precision": "fp32"}, 1e-5),
    "flash False": ({"flash_attention": False, "kv_cache": "fp32"}, "paged", "PagedAttention", {"paged": "on"}, 1e-5),
    "weights int8": ({"weights": "int8", "kv_cache": "fp32"}, "paged", "PagedAttention", {"weights": "int8", "activations": "int8"}, 0.15),
    "weights int8, fp32 activations": (
        {"weights": "int8", "activations": "fp32", "kv_cache": "fp32"}, "paged", "PagedAttention", {"weights": "int8", "activations": "fp32"}, 0.1,
    ),
    "weights int4": ({"weights": "int4", "kv_cache": "fp32", "quantizer": "rtn"}, "paged", "PagedAttention", {"weights": "int4"}, 0.8),
    "weights by layer": (
        {"weights": {"head": "int8", "layers.0.*": "fp32", "*": "int4"}, "kv_cache": "fp32"}, "paged", "PagedAttention", {"activations": "int8"}, 0.8,
    ),
    "masking causal": ({"masking": "causal", "kv_cache": "fp32"}, "paged", "PagedAttention", {"masking": "causal with key padding"}, 1e-5),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_leads_to_its_op_its_decision_and_the_same_logits(name: str, tiny_onnx: Path, tmp_path: Path) -> None:
    options, kind, op, decisions, limit = OPTIONS[name]
    report, ops, decided = _compile(tiny_onnx / "model.onnx", tmp_path / "out", **options)
    assert report.kind == kind and not report.refusals
    attentions = {other: ops[other] for other in ("Attention", "PagedAttention", "FlashAttention", "GroupQueryAttention") if ops[other]}
    assert attentions == {op: 2}
    assert decisions.items() <= decided.items()
    assert _relative_error(tmp_path / "out", tiny_onnx) < limit


def test_a_mask_that_is_not_what_was_asserted_is_an_error(tiny_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r'masking="none" was asserted, and the mask of layers\.0\.attention was proved to be causal'):
        _compile(tiny_onnx / "model.onnx", tmp_path / "out", masking="none")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [{"kv_cache": "int7"}, {"kv_cache": True}, {"kv_cache": {"*": "auto"}}, {"kv_cache": ["int8"]},
     {"masking": "full"}, {"weights": "int3"}, {"weights": {"*": "int3"}}, {"group_size": 48},
     {"quantizer": "best"}, {"activations": "int4"}, {"max_context": 0}, {"max_context": True}, {"paged": 1}, {"strict": None}],
)
def test_options_are_validated(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        octavo.CompileOptions(**options)


def test_options_of_another_type_are_refused(tiny_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="CompileOptions"):
        octavo.compile(tiny_onnx / "model.onnx", tmp_path / "out", options={"paged": False})  # type: ignore[arg-type]


def test_quantized_weights_are_in_one_node_a_group_and_other_patterns_are_named(tiny_onnx: Path, tmp_path: Path) -> None:
    report, ops, _ = _compile(tiny_onnx / "model.onnx", tmp_path / "out", weights="int8")
    # A layer is four nodes: q, k, v together, o, gate and up together, down. The head is one.
    assert ops["QuantLinear"] == 2 * 4 + 1 and ops["MatMul"] == ops["Gemm"] == 0
    assert report.sizes.bytes_after < 0.4 * report.sizes.bytes_before
    octavo_check = octavo.check(tmp_path / "out", tiny_onnx / "model.onnx")
    assert octavo_check.ok, octavo_check.to_text()
    with pytest.raises(OptionError, match=r"no linear is called 'layers\.9\.\*'"):
        _compile(tiny_onnx / "model.onnx", tmp_path / "other", weights={"layers.9.*": "int4"})
    with pytest.raises(RefusedError, match="contiguous"):
        _compile(tiny_onnx / "model.onnx", tmp_path / "other", weights="int8", paged=False)


def test_the_mask_is_gone_and_logits_are_of_the_rows_asked_for(tiny_onnx: Path, tmp_path: Path) -> None:
    _compile(tiny_onnx / "model.onnx", tmp_path / "out")
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    inputs = {value.name for value in graph.input}
    assert {"input_ids", "position_ids", "logit_rows", "parent", "block_table.0", "slot_mapping.0", "kv.0.key", "kv.1.value"} <= inputs
    assert "attention_mask" not in inputs and not any("past" in name and name != "past_seqlens" for name in inputs)
    assert [value.name for value in graph.output] == ["logits"]
    assert not {"Range", "LessOrEqual", "Softmax", "IsNaN"} & {node.op_type for node in graph.node}


def test_max_context_bounds_a_sequence(tiny_onnx: Path, tmp_path: Path) -> None:
    _, _, decided = _compile(tiny_onnx / "model.onnx", tmp_path / "out", max_context=40)
    assert decided["max_context"] == "40"
    with octavo.load(tmp_path / "out") as model, pytest.raises(octavo.OctavoError, match="40"):
        model.predict(IDS)


def test_more_context_than_the_tables_have_rows_is_an_error(tiny_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="rows of"):
        _compile(tiny_onnx / "model.onnx", tmp_path / "out", max_context=10**6)


# ---- what goes wrong


def test_an_exception_in_a_target_is_recorded_and_the_next_one_is_taken(tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("injected")

    monkeypatch.setattr(pipeline.LogitRows, "call", broken)  # after PagedAttention was put in: the graph is half rewritten
    report, ops, _ = _compile(tiny_onnx / "model.onnx", tmp_path / "out")
    assert report.kind == "contiguous" and ops["GroupQueryAttention"] == 2 and ops["PagedAttention"] == 0
    assert any(d.feature == "paged" and d.value == "off" and "ZeroDivisionError: injected" in d.reason for d in report.decisions)
    assert _relative_error(tmp_path / "out", tiny_onnx) < 1e-5
    with pytest.raises(RefusedError, match="injected"):
        _compile(tiny_onnx / "model.onnx", tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


def test_a_lowered_graph_that_does_not_run_is_not_taken(tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lower = pipeline.LowerContiguous.call

    def broken(self: Any, model: ir.Model) -> Any:
        result = lower(self, model)
        for node in model.graph:
            if node.op_type == "Mul":
                node.outputs[0].shape = ir.Shape([7])    # onnxruntime believes what a graph says
        return result

    monkeypatch.setattr(pipeline.LowerContiguous, "call", broken)
    report, ops, decided = _compile(tiny_onnx / "model.onnx", tmp_path / "out", paged=False)
    assert report.kind == "baseline" and ops["Attention"] == 2 and not ops["GroupQueryAttention"]
    assert decided["contiguous"] == "off"
    assert any(refusal.reason in ("the lowered graph does not run", "the lowered graph does not load") for refusal in report.refusals)
    assert _relative_error(tmp_path / "out", tiny_onnx) < 1e-5
    with pytest.raises(RefusedError, match="the lowered graph does not"):
        _compile(tiny_onnx / "model.onnx", tmp_path / "strict", paged=False, strict=True)


def test_sizes_of_other_inputs_are_not_kept(tiny_onnx: Path, tmp_path: Path) -> None:
    """Beside an attention that stays the exporter's inputs do too, for one sequence: what it said of several is not true any more."""
    source = _with_a_hole(tiny_onnx, tmp_path / "holed")
    before = onnx.load(source / "model.onnx", load_external_data=False).graph
    assert any(value.type.tensor_type.shape.dim for value in before.value_info)
    _compile(source / "model.onnx", tmp_path / "out")
    after = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    assert not [value.name for value in after.value_info if any(dim.dim_param for dim in value.type.tensor_type.shape.dim)]


@pytest.mark.parametrize("stage", ["Normalize", "FoldDequantize"])
def test_a_model_that_cannot_be_rewritten_is_a_baseline_with_the_exception(
    stage: str, tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise MemoryError("injected")

    monkeypatch.setattr(getattr(pipeline, stage), "call", broken)
    report, ops, _ = _compile(tiny_onnx / "model.onnx", tmp_path / "out")
    assert report.kind == "baseline" and ops["Attention"] == 2
    assert any("MemoryError: injected" in d.reason for d in report.decisions)
    assert "EXCEPTION CAUGHT" in report.headline
    assert _relative_error(tmp_path / "out", tiny_onnx) == 0 or _relative_error(tmp_path / "out", tiny_onnx) < 1e-5
    with pytest.raises(RefusedError, match="fp16"):
        _compile(tiny_onnx / "model.onnx", tmp_path / "fp16", kv_cache="fp16")


def test_one_refused_site_keeps_the_model_from_paging_and_is_named(tiny_onnx: Path, tmp_path: Path) -> None:
    """A second layer whose mask has a hole: not causal, not a window."""
    source = _with_a_hole(tiny_onnx, tmp_path / "holed")
    report, ops, decided = _compile(source / "model.onnx", tmp_path / "out")
    assert report.kind == "contiguous" and decided["paged"] == "off"
    assert ops["GroupQueryAttention"] == 1 and ops["Attention"] == 1
    assert len(report.refusals) == 1 and report.refusals[0].where == "layers.1.attention"
    assert "layers.1.attention" in report.to_text() and "layers.1.attention" in report.to_markdown()
    assert _relative_error(tmp_path / "out", source) < 1e-5
    with pytest.raises(RefusedError, match=r"layers\.1\.attention"):
        _compile(source / "model.onnx", tmp_path / "strict", strict=True)


def _with_a_hole(tiny: Path, folder: Path) -> Path:
    """The tiny model, its second attention unable to see position 3 from position 9 on."""
    folder.mkdir()
    model = onnx.load(tiny / "model.onnx")
    graph = model.graph
    second = [node for node in graph.node if node.op_type == "Attention"][1]
    mask = second.input[3]
    for name, value in (("hole.key", 3), ("hole.query", 9)):
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.int64), name))
    position = graph.initializer
    position.append(onnx.numpy_helper.from_array(np.array(0, np.int64), "hole.zero"))
    position.append(onnx.numpy_helper.from_array(np.array(1, np.int64), "hole.one"))
    position.append(onnx.numpy_helper.from_array(np.array([0], np.int64), "hole.axis0"))
    position.append(onnx.numpy_helper.from_array(np.array([1], np.int64), "hole.axis1"))
    ids = "input_ids"
    make = onnx.helper.make_node
    nodes = [
        make("Shape", ["attention_mask"], ["hole.total1"], start=1, end=2), make("Squeeze", ["hole.total1"], ["hole.total"]),
        make("Shape", [ids], ["hole.new1"], start=1, end=2), make("Squeeze", ["hole.new1"], ["hole.new"]),
        make("Sub", ["hole.total", "hole.new"], ["hole.past"]),
        make("Range", ["hole.past", "hole.total", "hole.one"], ["hole.queries"]), make("Range", ["hole.zero", "hole.total", "hole.one"], ["hole.keys"]),
        make("GreaterOrEqual", ["hole.queries", "hole.query"], ["hole.late"]), make("Equal", ["hole.keys", "hole.key"], ["hole.at"]),
        make("Unsqueeze", ["hole.late", "hole.axis1"], ["hole.late2"]), make("Unsqueeze", ["hole.at", "hole.axis0"], ["hole.at2"]),
        make("And", ["hole.late2", "hole.at2"], ["hole.hidden"]), make("Not", ["hole.hidden"], ["hole.visible"]),
    ]
    kind = next((v.type.tensor_type.elem_type for v in graph.value_info if v.name == mask), onnx.TensorProto.BOOL)
    if kind == onnx.TensorProto.BOOL:
        nodes.append(make("And", [mask, "hole.visible"], ["hole.mask"]))
    else:
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(-np.inf, np.float32), "hole.inf"))
        nodes.append(make("Where", ["hole.visible", mask, "hole.inf"], ["hole.mask"]))
    at = list(graph.node).index(second)
    second.input[3] = "hole.mask"
    for offset, node in enumerate(nodes):
        graph.node.insert(at + offset, node)
    onnx.save(model, folder / "model.onnx")
    return folder


# ---- what is left alone


def _fingerprint(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def test_file_proto_and_ir_model_are_untouched(tiny_onnx: Path, tmp_path: Path) -> None:
    before = _fingerprint(tiny_onnx)
    proto = onnx.load(tiny_onnx / "model.onnx")
    serialized = proto.SerializeToString(deterministic=True)
    model = ir.from_proto(onnx.load(tiny_onnx / "model.onnx"))
    text = ir.to_proto(model).SerializeToString(deterministic=True)
    reports = [octavo.compile(source, tmp_path / str(i)) for i, source in enumerate((tiny_onnx / "model.onnx", proto, model))]
    assert [report.kind for report in reports] == ["paged"] * 3
    assert _fingerprint(tiny_onnx) == before
    assert proto.SerializeToString(deterministic=True) == serialized
    assert ir.to_proto(model).SerializeToString(deterministic=True) == text


def test_parameters_keep_their_bits(tiny_onnx: Path, tmp_path: Path) -> None:
    _compile(tiny_onnx / "model.onnx", tmp_path / "out")
    graphs = (onnx.load(path / "model.onnx").graph for path in (tiny_onnx, tmp_path / "out"))
    original, compiled = ({t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer} for graph in graphs)
    kept = {hashlib.sha256(array.tobytes()).digest() for array in compiled.values()}
    weights = {name: array for name, array in original.items() if array.dtype == np.float32 and array.ndim and array.size > 32 and "rotary" not in name}
    assert len(weights) > 10
    missing = [name for name, array in weights.items() if hashlib.sha256(array.tobytes()).digest() not in kept]
    assert not missing


def test_a_compile_is_reproducible(tiny_onnx: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        _compile(tiny_onnx / "model.onnx", tmp_path / name)
    first, second = (_fingerprint(tmp_path / name) for name in ("a", "b"))
    assert {k: v for k, v in first.items() if k.startswith("model.onnx")} == {k: v for k, v in second.items() if k.startswith("model.onnx")}


def test_a_report_survives_its_json(tiny_onnx: Path, tmp_path: Path) -> None:
    report, _, _ = _compile(tiny_onnx / "model.onnx", tmp_path / "out")
    again = octavo.inspect(tmp_path / "out")
    assert again == report


def test_inspecting_a_graph_writes_nothing(tiny_onnx: Path) -> None:
    before = _fingerprint(tiny_onnx)
    assert octavo.inspect(tiny_onnx / "model.onnx").kind == "paged"
    assert _fingerprint(tiny_onnx) == before


def test_bad_input_is_a_model_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("this is no model")
    for source in (tmp_path / "missing.onnx", tmp_path / "text.onnx"):
        with pytest.raises(ModelError):
            octavo.compile(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
