"""observe: kinds, formulas and evaluation, against what the text of a graph says and what onnxruntime computes on the whole graph."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import combinations, combinations_with_replacement
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from octavo.models.onnx_reader import graph_interface, read_onnx
from octavo.passes.normalize import Normalize
from octavo.passes.observe import Dim, Observation, ObservationError, Probe, observe
from octavo.passes.probe import feed_of, port_of
from octavo.passes.value_shapes import PROBES

CACHED = """
<ir_version: 10, opset_import: ["" : 18]>
g (int64[B,S] input_ids, int64[B,T] attention_mask, float[B,2,P,4] past_0_key, float[B,2,P,4] past_0_value)
 => (float[B,S,8] logits, float[B,2,T,4] present_0_key, float[B,2,T,4] present_0_value)
<float[16,8] table = {TABLE}, int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3}, int64 zero = {0}, int64 step = {1},
 int64[4] split = {0, 0, 2, 4}, int64[1] mask_axis = {1}>
{
    embedded = Gather(table, input_ids)
    heads = Reshape(embedded, split)
    new = Transpose<perm = [0, 2, 1, 3]>(heads)
    present_0_key = Concat<axis = 2>(past_0_key, new)
    present_0_value = Concat<axis = 2>(past_0_value, new)
    total_1 = Shape<start = 2, end = 3>(present_0_key)
    past_1 = Shape<start = 2, end = 3>(past_0_key)
    total = Squeeze(total_1)
    past = Squeeze(past_1)
    positions = Range(past, total, step)
    counted = CumSum(attention_mask, mask_axis)
    flat_1 = Shape<start = 1, end = 2>(new)
    flat = Concat<axis = 0>(flat_1, past_1, total_1)
    turned = Transpose<perm = [0, 1, 3, 2]>(present_0_key)
    pairs = MatMul(new, turned)
    where = NonZero(embedded)
    nonzeros = Shape(where)
    logits = Identity(embedded)
}
""".replace("TABLE", ", ".join(["0.5"] * 128))


def cached_model() -> ir.Model:
    return ir.from_onnx_text(CACHED)


@pytest.fixture
def cached() -> Observation:
    model = cached_model()
    return observe(model, graph_interface(model))


def value(observation: Observation, name: str) -> ir.Value:
    values = [*observation.model.graph.inputs, *observation.model.graph.initializers.values()]
    values += [output for node in observation.model.graph for output in node.outputs]
    return next(v for v in values if v.name == name)


@pytest.mark.parametrize(("name", "kind"), [
    ("table", "constant"), ("input_ids", "data"), ("attention_mask", "structural"), ("past_0_key", "data"), ("embedded", "data"),
    ("total_1", "structural"), ("positions", "structural"), ("counted", "structural"), ("pairs", "data"),
    ("nonzeros", "data"),  # a shape, but one that follows from the tokens
])
def test_kinds(cached: Observation, name: str, kind: str) -> None:
    assert cached.kind(value(cached, name)) == kind


@pytest.mark.parametrize(("name", "dims"), [
    ("input_ids", "B S"), ("attention_mask", "B T"), ("past_0_key", "B 2 P 4"), ("embedded", "B S 8"), ("new", "B 2 S 4"),
    ("present_0_key", "B 2 T 4"), ("pairs", "B 2 S T"), ("positions", "S"), ("counted", "B T"), ("table", "16 8"),
])
def test_dims(cached: Observation, name: str, dims: str) -> None:
    found = cached.dims(value(cached, name))
    assert found is not None and " ".join(map(str, found)) == dims


def test_a_shape_that_follows_from_data_has_no_formula(cached: Observation) -> None:
    """With zeros for weights NonZero finds nothing at every probe: a formula would fit by accident."""
    assert cached.dims(value(cached, "where")) is None


def test_evaluate_at_any_probe(cached: Observation) -> None:
    mask = np.array([[0, 1, 1, 1], [1, 1, 1, 1]])
    positions, counted = cached.evaluate([value(cached, "positions"), value(cached, "counted")], Probe(2, 3, 1, attention_mask=mask))
    assert positions.tolist() == [1, 2, 3] and counted.tolist() == np.cumsum(mask, axis=1).tolist()
    assert cached.evaluate([value(cached, "positions")], Probe(1, 3, 8191))[0].tolist() == [8191, 8192, 8193]


def test_evaluate_with_something_replaced(cached: Observation) -> None:
    found = cached.evaluate([value(cached, "positions")], Probe(1, 2, 3), replace={value(cached, "total"): np.array(9)})
    assert found[0].tolist() == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("name", ["embedded", "past_0_key", "pairs", "nonzeros"])
def test_data_is_not_evaluated(cached: Observation, name: str) -> None:
    with pytest.raises(ObservationError, match=r"follows from the content of|fits no formula"):
        cached.evaluate([value(cached, name)], Probe(1, 2, 3))


def test_contents(cached: Observation) -> None:
    """A mask's running sum has no formula in lengths for contents of that rank; shapes do."""
    assert cached.contents(value(cached, "flat")) == (Dim(2), Dim(1, ("P",)), Dim(1, ("T",)))
    assert cached.contents(value(cached, "split")) == (Dim(0), Dim(0), Dim(2), Dim(4))
    assert cached.contents(value(cached, "counted")) is None


def test_the_model_is_not_changed() -> None:
    model = cached_model()
    before = ir.serde.serialize_model(model).SerializeToString()
    observation = observe(model, graph_interface(model))
    observation.evaluate([value(observation, "positions")], Probe(1, 2, 3))
    assert ir.serde.serialize_model(model).SerializeToString() == before


def test_no_two_products_fit_all_probes() -> None:
    """The probes tell any two formulas apart, with a past and without."""
    products = [letters for count in range(4) for letters in combinations_with_replacement("BSPT", count)]
    for probes, usable in ((PROBES, "BSPT"), (tuple(Probe(p.batch, p.length, 0) for p in PROBES), "BS")):
        chosen = [letters for letters in products if set(letters) <= set(usable)]
        for a, b in combinations(chosen, 2):
            assert len({Fraction(Dim(1, a).at(p), Dim(1, b).at(p)) for p in probes}) > 1, (a, b)


PLAIN = """
<ir_version: 10, opset_import: ["" : 18]>
g (int64[%s] input_ids) => (float[1,s,8] logits) <float[4,8] table = {%s}, int64[3] target = {%s}>
{
    embedded = Gather(table, input_ids)
    logits = Reshape(embedded, target)
}
"""
ZEROS = ", ".join(["0"] * 32)


def test_a_batch_of_one_that_is_baked_in() -> None:
    """Reshape to [1, S, 8] would run with several sequences if S were −1; [1, 0, 8] does not."""
    model = ir.from_onnx_text(PLAIN % ("b,s", ZEROS, "1, 0, 8"))
    observation = observe(model, graph_interface(model))
    assert not observation.batched and "onnxruntime can't run the graph at batch 2" in observation.unbatched
    assert observation.dims(model.graph.outputs[0]) == (Dim(1), Dim(1, ("S",)), Dim(8))


def test_a_length_that_is_baked_in() -> None:
    model = ir.from_onnx_text(PLAIN % ("b,s", ZEROS, "1, 3, 8"))
    with pytest.raises(ObservationError, match="can't run the graph at batch 1, 5 tokens over 0") as caught:
        observe(model, graph_interface(model))
    assert caught.value.probe is not None and caught.value.probe.length == 5 and caught.value.hint


def test_an_input_of_unknown_role_is_fed_by_its_shape() -> None:
    text = PLAIN.replace("int64[%s] input_ids)", "int64[%s] input_ids, float[8] extra)")
    text = text.replace("Gather(table, input_ids)", "Add(gathered, extra)")
    text = text.replace("    embedded", "    gathered = Gather(table, input_ids)\n    embedded")
    model = ir.from_onnx_text(text % ("b,s", ZEROS, "0, 0, 8"))
    observation = observe(model, graph_interface(model))
    assert observation.dims(model.graph.outputs[0]) == (Dim(1, ("B",)), Dim(1, ("S",)), Dim(8))
    assert observation.kind(value(observation, "extra")) == "data"


CROSS = """
<ir_version: 10, opset_import: ["" : 18]>
g (int64[b,s] input_ids, float[b,frames,4] encoder_hidden_states, int64[%s] token_type_ids) => (float[b,s,f] out) <float[4,4] table = {%s}>
{
    words = Gather(table, input_ids)
    types = Gather(table, token_type_ids)
    h = Add(words, types)
    turned = Transpose<perm = [0, 2, 1]>(encoder_hidden_states)
    out = MatMul(h, turned)
}
"""


@pytest.mark.parametrize("types", ["b,s", "rows,tokens"], ids=["by_name", "by_place"])
def test_sizes_of_other_inputs_are_letters_of_their_own(types: str) -> None:
    """An encoder's length is no length of ours; a size that an exporter names anew is found to be ours where the graph runs no other way."""
    model = ir.from_onnx_text(CROSS % (types, ", ".join(["0"] * 16)))
    observation = observe(model, graph_interface(model))
    assert observation.batched and not observation.static
    assert observation.dims(model.graph.outputs[0]) == (Dim(1, ("B",)), Dim(1, ("S",)), Dim(1, ("frames",)))


def test_a_graph_of_fixed_sizes_runs_in_its_one_situation() -> None:
    model = ir.from_onnx_text(PLAIN % ("2,3", ZEROS, "0, 0, 8"))
    observation = observe(model, graph_interface(model))
    assert observation.static and not observation.batched
    assert observation.dims(model.graph.outputs[0]) == (Dim(2), Dim(3), Dim(8))


def test_weights_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight whose contents can't be had: shapes are learned all the same."""
    model = ir.from_onnx_text(PLAIN % ("b,s", ZEROS, "0, 0, 8"))
    table = model.graph.initializers["table"]

    def unreadable() -> ir.Tensor:
        raise AssertionError("a weight was read")

    table.const_value = ir.LazyTensor(unreadable, dtype=ir.DataType.FLOAT, shape=ir.Shape([50_000, 8]), name="table")
    table.shape = ir.Shape([50_000, 8])
    assert observe(model, graph_interface(model)).dims(model.graph.outputs[0]) == (Dim(1, ("B",)), Dim(1, ("S",)), Dim(8))


SPELLINGS = [
    {"exporter": "dynamo", "opset": 18}, {"exporter": "dynamo", "opset": 18, "with_past": False}, {"exporter": "dynamo", "opset": 23},
    {"exporter": "torchscript", "opset": 17}, {"exporter": "torchscript", "opset": 17, "with_past": False},
]


@pytest.mark.parametrize("variant", SPELLINGS, ids=lambda v: "-".join(map(str, v.values())))
def test_formulas_hold_on_exported_graphs(exported: Callable[..., Path], variant: dict[str, object]) -> None:
    """Every value that has a formula has that shape in a run of the whole graph at a probe that taught none of them."""
    model = ir.external_data.load_to_model(read_onnx(exported("llama", **variant) / "model.onnx"))
    Normalize()(model)
    observation = observe(model, graph_interface(model))
    probe = Probe(3 if observation.batched else 1, 7, 4 if observation.cached else 0)
    feeds = {str(v.name): feed_of(port_of(observation.interface, v), v, probe) for v in model.graph.inputs}
    asked = [output for node in model.graph for output in node.outputs if output.name]
    model.graph.outputs.extend(output for output in asked if output not in model.graph.outputs)
    session = ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString(), providers=["CPUExecutionProvider"])
    for output, array in zip(session.get_outputs(), session.run(None, feeds)):
        dims = observation.dims(next(v for v in asked if v.name == output.name))
        assert dims is not None and tuple(dim.at(probe) for dim in dims) == array.shape, output.name


def test_what_follows_from_weights_alone_is_not_computed() -> None:
    """A transposed or dequantized weight is as large as the weight: where its size is known, zeros stand for it too."""
    model = ir.from_onnx_text("""
<ir_version: 10, opset_import: ["" : 21]>
g (int64[b,s] input_ids) => (float[b,s,n] logits) <uint8[1,1] codes = {0}, float scale = {0.5}>
{
    table = DequantizeLinear(codes, scale)
    turned = Transpose<perm = [1, 0]>(table)
    h = Gather(table, input_ids)
    logits = MatMul(h, turned)
}
""")

    def unreadable() -> ir.Tensor:
        raise AssertionError("a weight was read")

    codes = model.graph.initializers["codes"]
    codes.const_value = ir.LazyTensor(unreadable, dtype=ir.DataType.UINT8, shape=ir.Shape([40_000, 8]), name="codes")
    codes.shape = ir.Shape([40_000, 8])
    Normalize()(model)
    observation = observe(model, graph_interface(model))
    names = {str(output.name): observation.dims(output) for node in model.graph for output in node.outputs}
    assert names["table"] == (Dim(40_000), Dim(8)) and names["turned"] == (Dim(8), Dim(40_000))
    assert names["logits"] == (Dim(1, ("B",)), Dim(1, ("S",)), Dim(40_000))
