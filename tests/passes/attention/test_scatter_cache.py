"""Caches of a fixed number of places that the graph writes by index: paged where the indices are proved to be positions and the mask to be causal."""

from __future__ import annotations

import pytest
from drivers import MAX_CONTEXT, Original, Paged, contiguous_error, paged_error, seen
from octavo.models.onnx_reader import graph_interface
from octavo.passes.attention.lower_contiguous import ContiguousPlan, plan_contiguous
from octavo.passes.attention.match import sites_of
from octavo.passes.attention.rotary import context_bound
from octavo.passes.attention.site import Mask
from octavo.passes.cache_interface import TokenFlatPlan, plan_token_flat
from octavo.passes.outcome import Refusal
from octavo.passes.scatter_cache import scatter_interface
from sketches import PLACES, VOCAB, Sketch, build

SKETCHES = {
    "scatter_nd": Sketch(cache="scatter_nd", padding=False),
    "scatter_elements": Sketch(cache="scatter_elements"),
    "tensor_scatter": Sketch(cache="tensor_scatter", opset=24, heads="tile"),
    "window": Sketch(cache="scatter_nd", window=5),
    "op": Sketch(cache="tensor_scatter", opset=24, op=True, padding=False, rotary="op"),
    "shared": Sketch(cache="scatter_nd", second="shared", second_window=7),
}


@pytest.mark.parametrize("sketch", SKETCHES.values(), ids=SKETCHES)
def test_the_logits_are_the_exporters(sketch: Sketch) -> None:
    model, interface = build(sketch)
    observation, found = seen(model, interface)
    sites = sites_of(found)
    assert len(sites) == len(found), found
    assert observation.capacity == PLACES and context_bound(observation) == (PLACES, "its cache")
    assert sites[0].mask == Mask("window" if sketch.window else "causal", sketch.window or None, key_padding=sketch.padding)
    plan = plan_token_flat(observation, sites, max_context=MAX_CONTEXT)
    assert isinstance(plan, TokenFlatPlan), str(plan)
    assert paged_error(Original(build(sketch)[0], interface), Paged(model, plan), VOCAB) < 1e-4


@pytest.mark.parametrize(("sketch", "word"), [
    (Sketch(cache="late"), "can't be traced"),                    # one place behind each token's position
    (Sketch(cache="circular", opset=24), "can't be traced"),
    (Sketch(cache="scatter_nd", mask="none"), "bidirectional"),   # places that are not written yet are seen
    (Sketch(cache="scatter_nd", hole=True), "none that is known"),
    (Sketch(cache="scatter_nd", heads="permuted"), "can't be traced"),
    (Sketch(cache="wrapped", padding=False), "can't be traced"),  # beyond what a short probe writes
    (Sketch(cache="stopped", padding=False), "can't be traced"),
    (Sketch(cache="shifted", padding=False), "can't be traced"),
], ids=["late", "circular", "unwritten", "hole", "permuted", "wrapped", "stopped", "shifted"])
def test_near_misses_do_not_page(sketch: Sketch, word: str) -> None:
    observation, (found,) = seen(*build(sketch))
    refusal = found if isinstance(found, Refusal) else plan_token_flat(observation, [found], max_context=MAX_CONTEXT)
    assert isinstance(refusal, Refusal)
    assert word in refusal.reason


def test_stock_attention_gets_a_cache_that_grows() -> None:
    sketch = Sketch(cache="scatter_elements")
    model, interface = build(sketch)
    observation, found = seen(model, interface)
    plan = plan_contiguous(observation, sites_of(found), max_context=MAX_CONTEXT)
    assert isinstance(plan, ContiguousPlan), str(plan)
    assert contiguous_error(Original(build(sketch)[0], interface), model, plan, VOCAB) < 1e-4
    other, interface = build(sketch)
    observation, found = seen(other, interface)
    assert isinstance(plan_contiguous(observation, sites_of(found), max_context=MAX_CONTEXT, refused=1), Refusal)


def test_roles_follow_from_what_is_written() -> None:
    model, interface = build(SKETCHES["scatter_nd"])
    assert [port.role for port in interface.inputs] == ["input_ids", "position_ids", "cache_position", "past_key", "past_value"]
    assert [port.role for port in interface.outputs] == ["logits", "present_key", "present_value"]
    grown, interface = build(Sketch())
    assert scatter_interface(grown, interface) is interface
    assert [port.role for port in graph_interface(model).inputs][2:] == ["other"] * 3
