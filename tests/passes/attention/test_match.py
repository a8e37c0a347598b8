"""Every spelling leads to the same site; near misses lead to a refusal that says what was found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from drivers import seen
from octavo.models.onnx_reader import graph_interface, read_onnx
from octavo.passes.attention.match import match_attention, refusals_of, sites_of
from octavo.passes.attention.site import AttentionSite, Mask
from octavo.passes.outcome import Refusal
from sketches import Sketch, build, s_factor

SPELLINGS = {
    "expand": Sketch(),
    "no_past": Sketch(past=False),
    "no_padding": Sketch(padding=False),
    "tile": Sketch(heads="tile"),
    "gather": Sketch(heads="gather"),
    "broadcast": Sketch(heads="broadcast"),
    "mha": Sketch(G=4),
    "mqa": Sketch(G=1),
    "scale_divided": Sketch(scale="divided"),
    "scale_on_both_sides": Sketch(scale="both_sides"),
    "scale_at_run_time": Sketch(scale="runtime"),
    "scale_before_rotary": Sketch(scale="folded_query"),
    "key_in_three_dimensions": Sketch(key="three_d"),
    "mask_min": Sketch(mask="min"),
    "mask_where": Sketch(mask="boolean_where"),
    "guard": Sketch(guard=True),
    "softcap": Sketch(softcap=5.0),
    "fused": Sketch(fused=True),
    "query_norm": Sketch(norm="q"),
    "rotary_interleaved": Sketch(rotary="interleaved"),
    "rotary_split": Sketch(rotary="split"),
    "rotary_partial": Sketch(rotary="partial", D=16),
    "rotary_op": Sketch(rotary="op"),
    "rotary_op_interleaved": Sketch(rotary="op_interleaved"),
    "rotary_microsoft": Sketch(rotary="microsoft"),
    "rotary_none": Sketch(rotary="none"),
    "window": Sketch(window=5),
    "window_where": Sketch(window=7, mask="boolean_where", past=False),
    "op": Sketch(op=True),
    "op_no_past": Sketch(op=True, past=False),
    "op_causal": Sketch(op=True, past=False, is_causal=True, padding=False),
    "op_tokens_first": Sketch(op=True, op_heads_first=False, op_cache=True),
    "op_cache": Sketch(op=True, op_cache=True, rotary="op"),
    "op_cache_causal": Sketch(op=True, op_cache=True, is_causal=True, padding=False),
    "op_softcap_window": Sketch(op=True, op_cache=True, softcap=4.0, window=6),
}


def only(found: tuple[AttentionSite | Refusal, ...]) -> AttentionSite:
    assert len(found) == 1, found
    assert isinstance(found[0], AttentionSite), str(found[0])
    return found[0]


@pytest.mark.parametrize("sketch", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_is_the_same_site(sketch: Sketch) -> None:
    _, found = seen(*build(sketch))
    site = only(found)
    assert (site.num_heads, site.kv_heads, site.head_size, site.value_size) == (sketch.H, sketch.G, sketch.D, sketch.D)
    # A factor before the rotary embedding stays where it is: the query then holds it.
    assert site.scale == pytest.approx(1.0 if sketch.scale == "folded_query" else s_factor(sketch), rel=1e-6)
    assert site.softcap == pytest.approx(sketch.softcap, rel=1e-5)
    assert site.mask == Mask("window" if sketch.window else "causal", sketch.window or None, sketch.padding)
    assert (site.cache is not None) == sketch.past
    if site.cache is not None:
        assert [value.name for value in (site.cache.past_key, site.cache.past_value, site.cache.present_key, site.cache.present_value)] == [
            "past_key_values.0.key", "past_key_values.0.value", "present.0.key", "present.0.value"]
    assert site.output_layout == "BSH"
    assert site.value_layout == "BSH"
    assert site.nodes


@pytest.mark.parametrize(("rotary", "width", "interleaved"), [
    ("half", 16, False), ("interleaved", 16, True), ("split", 16, False), ("partial", 8, False), ("op", 16, False), ("op_interleaved", 16, True),
    ("microsoft", 16, False),
])
def test_rotary_is_recognised_by_what_it_does(rotary: str, width: int, interleaved: bool) -> None:
    site = only(seen(*build(Sketch(rotary=rotary, D=16)))[1])
    assert site.rotary is not None
    assert (site.rotary.width, site.rotary.interleaved) == (width, interleaved)
    assert site.query is not site.turned_query
    assert only((site.with_rotary_in_graph(),)).query is site.turned_query


def test_the_site_reaches_back_to_the_projection() -> None:
    site = only(seen(*build(Sketch()))[1])
    assert [value.producer().op_type for value in (site.query, site.key, site.value)] == ["Add", "Add", "Add"]
    assert site.query_layout == site.key_layout == "BSH"


@pytest.mark.parametrize(("sketch", "word"), [
    (Sketch(heads="permuted"), "key can't be traced"),
    (Sketch(mask="ids"), "depends on data"),
    (Sketch(hole=True), "none that is known"),
    (Sketch(hole=True, op=True), "none that is known"),
    (Sketch(slopes="curved"), "none that is known"),
    (Sketch(sinks="by_query"), "not one logit a head"),
    (Sketch(sinks="plain", slopes="shifted"), "none that is known"),
    (Sketch(empty="wrong"), "none that is known"),
    (Sketch(shuffled=True), "changed before it meets the values"),
    (Sketch(op=True, op_cache=True, extra={"softmax_precision": 11}), "softmax_precision"),
    (Sketch(op=True, past=False, opset=25, extra={"left_window_size": 3}), "a window of its own"),
], ids=["permuted", "ids", "hole", "hole_op", "curved", "sinks_by_query", "sinks_and_shifted_rows", "emptied_rows", "shuffled", "precision", "op_window"])
def test_near_misses_are_refused(sketch: Sketch, word: str) -> None:
    _, found = seen(*build(sketch))
    assert len(found) == 1
    refusal = found[0]
    assert isinstance(refusal, Refusal)
    assert word in refusal.reason
    assert refusal.where == "layers.0.attention"
    assert refusal.nearest


def test_a_refused_hole_names_the_first_cell() -> None:
    refusal = seen(*build(Sketch(hole=True)))[1][0]
    assert isinstance(refusal, Refusal)
    assert "query 5, key 2" in refusal.nearest or "key 2: expected visible, found hidden" in refusal.nearest


def test_foreign_attention_is_refused_by_name() -> None:
    model, interface = build(Sketch(op=True, past=False, is_causal=True, padding=False))
    observation, _ = seen(model, interface)
    node = next(node for node in model.graph if node.op_type == "Attention")
    node.domain = "com.example"
    refusal, = match_attention(model, observation)
    assert isinstance(refusal, Refusal)
    assert "com.example::Attention" in refusal.reason


def test_a_router_is_no_attention() -> None:
    """A Softmax with no product of data on either side is passed over."""
    model, interface = build(Sketch())
    logits = next(value for value in model.graph.outputs if value.name == "logits")
    producer = logits.producer()
    softmax = ir.node("Softmax", [producer.outputs[0]], attributes={"axis": -1}, name="head")
    model.graph.append(softmax)
    softmax.outputs[0].name, logits.name = "logits", "scores"
    softmax.outputs[0].type, softmax.outputs[0].shape = logits.type, logits.shape
    model.graph.outputs[0] = softmax.outputs[0]
    only(seen(model, interface)[1])


@pytest.mark.parametrize(("gate", "layout", "rank"), [("heads_first", "BHSD", 4), ("tokens_first", "BSH", 4), ("none", "BSH", 3)])
@pytest.mark.parametrize("op", [True, False])
def test_the_output_is_the_last_movement_of_the_product(gate: str, layout: str, rank: int, op: bool) -> None:
    site = only(seen(*build(Sketch(gate=gate, op=op)))[1])
    assert (site.output_layout, len(site.output.shape)) == (layout, rank)


def test_two_times_the_same_matching() -> None:
    model, interface = build(Sketch())
    observation, first = seen(model, interface)
    second = match_attention(model, observation, max_context=64)
    assert replace(only(first), rotary=None) == replace(only(second), rotary=None)


VARIANTS = [
    ("llama", {"opset": 18}), ("llama", {"opset": 18, "with_past": False}), ("llama", {"opset": 23}),
    ("qwen2", {"exporter": "torchscript", "opset": 17, "attention": "eager"}), ("mha", {"opset": 23, "attention_mask": False}),
]


@pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=[f"{n}_" + "_".join(map(str, v.values())) for n, v in VARIANTS])
def test_exported_decoders(exported: Callable[..., Path], name: str, variant: dict[str, object]) -> None:
    model = read_onnx(exported(name, **variant) / "model.onnx")
    _, found = seen(model, graph_interface(model))
    assert not refusals_of(found)
    assert [site.name for site in sites_of(found)] == ["layers.0.attention", "layers.1.attention"]
    for site in sites_of(found):
        assert (site.num_heads, site.kv_heads, site.head_size) == (4, 4 if name == "mha" else 2, 16)
        assert site.mask == Mask("causal", None, variant.get("attention_mask", True))
        assert site.scale == pytest.approx(0.25)
        assert site.rotary is not None and site.rotary.width == 16
        assert np.isclose(site.softcap, 0)
