"""verify: token-flat graphs by hand, right and with one thing wrong each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from octavo.models.interface import GraphInterface, GraphPort
from octavo.models.onnx_reader import graph_interface, read_onnx
from octavo.passes.extract import LARGE
from octavo.passes.verify import Verify

DECODER = """
<ir_version: 10, opset_import: ["" : 21, "ai.octavo" : 1]>
g (int64[1,T] input_ids, int64[1,T] position_ids, int32[b] cumulative_sequence_length, int32[B] past_seqlens, int64[R] logit_rows,
   int32[T] parent, int32[B,M] block_table_0, int32[T] slot_mapping_0, float[N,1,4,P] kv_0_key, float[N,1,P,4] kv_0_value)
 => (float[R,8] logits)
<float[8,8] table = {TABLE}, float[64,8] places = {PLACES}, float[8,4] wk = {WK}, int64[1] zero = {0}, int64[1] one = {1}, int64[2] rows = {-1, 8},
 int64[1] last = {-1}, int64 axis0 = {0}>
{
    ids = Squeeze(input_ids, zero)
    at = Squeeze(position_ids, zero)
    word = Gather(table, ids)
    place = Gather(places, at)
    h = Add(word, place)
    k = MatMul(h, wk)
    a = ai.octavo.PagedAttention<num_heads = 2, kv_num_heads = 1>(h, k, k, kv_0_key, kv_0_value, cumulative_sequence_length, past_seqlens,
        block_table_0, , , slot_mapping_0, , , , , , , parent)
    x = Add(a, h)
    chosen = Gather(x, logit_rows)
    logits = MatMul(chosen, table)
}
"""


def decoder(*changes: tuple[str, str]) -> ir.Model:
    text = DECODER
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    draw = np.random.default_rng(0)
    for name, size in (("TABLE", 64), ("PLACES", 512), ("WK", 32)):
        text = text.replace(name, ", ".join(f"{x:.4f}" for x in draw.standard_normal(size)))
    return ir.from_onnx_text(text)


def interface(model: ir.Model) -> GraphInterface:
    ports = [tuple(GraphPort(str(v.name), str(np.dtype(v.dtype.numpy())), None, "other") for v in model.graph.inputs)]
    return GraphInterface(ports[0], (GraphPort("logits", "float32", ("R", 8), "logits"),))


def told(model: ir.Model, expected: GraphInterface | None = None) -> str:
    result = Verify(expected or interface(model))(model)
    assert not result.modified and result.model is model
    return " | ".join(map(str, result.outcome.refusals))


def test_a_right_one() -> None:
    model = decoder()
    result = Verify(interface(model))(model)
    assert result.outcome.refusals == () and result.outcome.matched == 1 and result.outcome.notes


@pytest.mark.parametrize(("old", "new", "reason"), [
    ('"ai.octavo" : 1', '"ai.octavo" : 2', "imported in version 2"),
    ("ai.octavo.PagedAttention<", "ai.octavo.PageAttention<", "no op of this name"),
    ("num_heads = 2, ", "", "attribute num_heads is absent"),
    ("num_heads = 2,", "num_heads = 2, do_rotary = 1,", "attribute do_rotary does not exist"),
    ("num_heads = 2,", "num_heads = 2, scale = 1,", "attribute scale is no float"),
    ("num_heads = 2, kv_num_heads = 1", "num_heads = 2, kv_num_heads = 3", "2 heads over 3"),
    (", past_seqlens,\n", ", ,\n", "input past_seqlens is absent"),
    ("slot_mapping_0, , , , ,", "slot_mapping_0, , , , h,", "input k_scale has no meaning yet"),
    ("int32[T] parent", "int64[T] parent", "input parent is int64"),
    ("a = ai", "b = com.microsoft.MultiHeadAttention<num_heads = 2>(h, h, h) a = ai", "an attention is left"),
])
def test_contracts(old: str, new: str, reason: str) -> None:
    assert reason in told(decoder((old, new)))


def test_the_signature() -> None:
    model = decoder()
    expected = interface(model)
    fewer = GraphInterface(expected.inputs[1:], expected.outputs)
    assert "input_ids: the graph's inputs are not the interface's" in told(model, fewer)
    other = GraphInterface(expected.inputs, (GraphPort("logits", "float16", None, "logits"),))
    assert "output logits is float32" in told(model, other)


@pytest.mark.parametrize(("old", "new", "reason"), [
    ("x = Add(a, h)", "m = ReduceMean(a, zero) x = Sub(a, m)", "follow from another row"),
    ("x = Add(a, h)", "x = CumSum(a, axis0)", "follow from another row"),
    ("x = Add(a, h)", "q, s, z = DynamicQuantizeLinear(a) x = DequantizeLinear(q, s, z)", "follow from another row"),
    ("place = Gather(places, at)", "top = ReduceMax(at, zero) place = Gather(places, top)", "changed the position"),
    ("x = Add(a, h)", "n = Shape<start = 0, end = 1>(a) f = Cast<to = 1>(n) x = Div(a, f)", "how many rows there are"),
    ("chosen = Gather(x, logit_rows)", "chosen = Identity(x)", "how many rows there are, or which"),
    ("word = Gather(table, ids)", "word = Gather(places, at)", "do not follow from its own token"),
    ("at = Squeeze(position_ids, zero)", "p = Cast<to = 7>(parent) at = Max(p, axis0)", "read outside attention"),
])
def test_rows(old: str, new: str, reason: str) -> None:
    assert reason in told(decoder((old, new)))


@pytest.mark.parametrize("missing", ["h, k, k", "k, h, k", "k, k, h"])
def test_the_stub_passes_on_query_key_and_value(missing: str) -> None:
    """Rows see each other through any one of q, k and v alone."""
    mixed = "m = ReduceMean(h, zero) hm = Sub(h, m) km = MatMul(hm, wk)"
    inputs = {"h, k, k": "hm, k, k", "k, h, k": "h, km, k", "k, k, h": "h, k, km"}[missing]
    model = decoder(("a = ai", f"{mixed} a = ai"), ("(h, k, k,", f"({inputs},"), ("x = Add(a, h)", "x = Identity(a)"))
    assert "follow from another row" in told(model)


def test_large_weights_are_not_read() -> None:
    """They are random in the run: a weight whose contents can't be had doesn't matter."""
    model = decoder()

    def unreadable() -> ir.Tensor:
        raise AssertionError("a weight was read")

    places = model.graph.initializers["places"]
    places.shape = ir.Shape([LARGE, 8])
    places.const_value = ir.LazyTensor(unreadable, dtype=ir.DataType.FLOAT, shape=ir.Shape([LARGE, 8]), name="places")
    assert told(model) == ""


def test_a_graph_that_is_not_token_flat(tiny_onnx: Path) -> None:
    model = read_onnx(tiny_onnx / "model.onnx")
    assert "an attention is left" in told(model, graph_interface(model))
